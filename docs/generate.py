"""Write what the pages say of options and commands from the code: `python docs/generate.py`.

docs/command-line.md is written whole, the table of options in docs/signatures.md between its two marks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from querylens_fast.cli import app
from querylens_fast.lens.options import LensOptions, described

DOCS = Path(__file__).parent
BEGIN, END = "<!-- options: written by docs/generate.py -->\n", "<!-- end of options -->\n"
HEAD = (
    "# Command line\n\n`querylens-fast COMMAND --help` prints the same. Every command says where its result is. A\n"
    "mistake is one line on stderr, exit code 2, and nothing is written. Written by `python docs/generate.py`.\n\n"
)


def options_table() -> str:
    """The fields of `LensOptions` with their defaults and descriptions."""
    texts = described(LensOptions)
    rows = [
        f"| `{f.name}` | `{f.default!r}` | {_cell(texts[f.name]).replace('``', '`')} |"
        for f in dataclasses.fields(LensOptions)
    ]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows, ""])


def signatures_page() -> str:
    """docs/signatures.md with the table of options as it is now."""
    text = (DOCS / "signatures.md").read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + options_table() + text[end:]


def command_line_page() -> str:
    """docs/command-line.md: every command with its arguments and flags."""
    commands = list(_commands(typer.main.get_command(app), "querylens-fast"))
    toc = [f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(command.help)} |" for name, command in commands]
    parts = ["\n".join(["| command | |", "|---|---|", *toc]), *(_section(*one) for one in commands)]
    return HEAD + "\n\n".join(parts) + "\n"


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, *(_usage(p) for p in arguments), "[FLAGS]"])
    rows = [f"| `{_usage(p)}` | {_default(p)} | {_cell(p.help)} |" for p in arguments]
    for p in command.params:
        if p.param_type_name != "argument":
            flag = "`, `".join(p.opts) + ("" if not p.secondary_opts else f"` / `{p.secondary_opts[0]}")
            rows.append(f"| `{flag}` | {_default(p)} | {_cell(p.help)} |")
    table = ["| argument | default | |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"## {name}", "", _cell(command.help), "", f"    {usage}", "", *table])


def _usage(argument: Any) -> str:
    name = argument.name.upper().replace("_", "-") + ("..." if argument.nargs == -1 or argument.multiple else "")
    return name if argument.required else f"[{name}]"


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required or value is None or str(value) in ("", "Sentinel.UNSET"):
        return "required" if parameter.required else ""
    return f"`{value}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    """Write both pages."""
    (DOCS / "signatures.md").write_text(signatures_page(), encoding="utf-8")
    (DOCS / "command-line.md").write_text(command_line_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
