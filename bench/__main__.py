"""``python -m bench topk ...``, ``python -m bench lens ...`` and ``python -m bench gpu_check``."""

from __future__ import annotations

import sys

from bench import gpu_check, lens, topk

COMMANDS = {"topk": topk.main, "lens": lens.main, "gpu_check": gpu_check.main}


def main() -> None:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("topk", [])
    if name not in COMMANDS:
        raise SystemExit(f"unknown benchmark {name!r}: expected one of {', '.join(COMMANDS)}")
    COMMANDS[name](rest)


if __name__ == "__main__":
    main()
