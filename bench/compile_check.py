"""Every kernel variant compiled for every target, without a GPU: ``python -m bench.compile_check [--short]``.

A table of registers, spills, shared memory, and instructions in the main loop and the epilogue. Exits with 1 when a
variant does not compile, spills registers to memory, asks for more shared or tensor memory than the target has, or
multiplies 16-bit operands on Hopper without wgmma.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import ROOT, commit, versions
from bench.record import save

TIMEOUT_S = 240
"""For one child; a variant takes about a second."""
CHUNK = 8
"""Variants to a child."""


class Limit(NamedTuple):
    """What a target has for one program."""

    shared: int
    """Bytes of shared memory (LDS)."""
    tensor_memory: int = 0
    """Columns of tensor memory."""
    product: str = ""
    """What the opcode of a product of 16-bit operands has to start with."""


LIMITS = {
    "sm_80": Limit(163 * 1024, product="HMMA"),
    "sm_90": Limit(227 * 1024, product="HGMMA"),
    "sm_100": Limit(227 * 1024, 512, "UTC"),
    "gfx942": Limit(64 * 1024, product="v_mfma"),
}


def listing(targets: Iterable[str], *, short: bool) -> list[tuple[str, str]]:
    """Target and name of each variant, asked of a child, because this process may interpret its kernels."""
    program = (
        "import json, sys; from csrc_triton.variants import variants\n"
        "print(json.dumps([(t, v.name) for t in sys.argv[2:] for v in variants(t) if v.short or sys.argv[1] == 'all']))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, "short" if short else "all", *targets]
    done = subprocess.run(command, env=_environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the list of variants cannot be read:\n{done.stderr[-2000:]}")
    return [(target, name) for target, name in json.loads(done.stdout)]


def _environment(cache: str | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    # TRITON_DEFAULT_FP_FUSION: what Triton does anyway when it is unset, less the warning.
    more = {"TRITON_CACHE_DIR": cache} if cache else {}
    return kept | {"PYTHONPATH": paths, "TRITON_DEFAULT_FP_FUSION": kept.get("TRITON_DEFAULT_FP_FUSION", "1")} | more


def compile_all(wanted: list[tuple[str, str]], jobs: int = 2) -> list[dict[str, Any]]:
    """Compile in ``jobs`` children at a time; a record for each (target, name), in their order."""
    chunks = []
    for target, group in itertools.groupby(sorted(wanted), key=lambda pair: pair[0]):
        names = [name for _, name in group]
        chunks += [(target, names[i : i + CHUNK]) for i in range(0, len(names), CHUNK)]
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        found = itertools.chain(*pool.map(lambda chunk: _compile_chunk(chunk[0], chunk[1], cache), chunks))
        records = {(record["target"], record["variant"]): record for record in found}
    return [records[pair] | {"failures": failures(records[pair])} for pair in wanted]


def _compile_chunk(target: str, names: list[str], cache: str) -> list[dict[str, Any]]:
    """Compile some variants for a target; one that ends its child is recorded, and another child does the rest."""
    records = []
    while names:
        command = [sys.executable, "-W", "ignore", "-m", "bench.compiled", target, *names]
        try:
            done = subprocess.run(
                command, env=_environment(cache), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
            )
            output, reason = done.stdout, f"the compiler ended with status {done.returncode}: {done.stderr[-1000:]}"
        except subprocess.TimeoutExpired as late:
            printed = late.stdout or b""
            output = printed.decode() if isinstance(printed, bytes) else printed
            reason = f"not compiled within {TIMEOUT_S} s"
        finished = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
        records += finished
        there = {record["variant"] for record in finished}
        names = [name for name in names if name not in there]
        if names:
            records.append({"variant": names.pop(0), "target": target, "error": reason})
    return records


def failures(record: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled variant, in words; empty when nothing is."""
    if "error" in record:
        return [f"does not compile: {record['error'].strip().splitlines()[-1]}"]
    limit, wrong = LIMITS[record["target"]], []
    if record["spills"] or record["local_memory_instructions"]:
        wrong.append(f"spills {record['spills']} bytes a thread")
    if record["shared"] > limit.shared:
        wrong.append(f"wants {record['shared']} bytes of shared memory, {record['target']} has {limit.shared}")
    if record["tensor_memory"] > limit.tensor_memory:
        wrong.append(f"wants {record['tensor_memory']} columns of tensor memory, there are {limit.tensor_memory}")
    kind = record["matrix_kind"] or "no matrix instruction"
    if record["narrow_product"] and not kind.startswith(limit.product):
        wrong.append(f"multiplies 16-bit operands by {kind}, expected {limit.product}")
    return wrong


def table(records: list[dict[str, Any]]) -> str:
    """The records as text."""
    head = ("target", "variant", "regs", "spills", "shared KiB", "loop", "epilogue", "products in the loop", "")
    lines: list[tuple[str, ...]] = [head]
    for r in records:
        verdict = "; ".join(r["failures"]) or "ok"
        if "error" in r:
            lines.append((r["target"], r["variant"], *[""] * 6, verdict))
            continue
        counts = ["–" if r[name] is None else str(r[name]) for name in ("loop_instructions", "epilogue_instructions")]
        inside = f"{r['loop_matrix_instructions']} {r['matrix_kind']}" if r["loop_matrix_instructions"] else "–"
        shared = f"{r['shared'] / 1024:.0f} / {LIMITS[r['target']].shared // 1024}"
        lines.append(
            (r["target"], r["variant"], str(r["registers"]), str(r["spills"]), shared, *counts, inside, verdict)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="the short list that the tests compile")
    parser.add_argument("--target", action="append", choices=list(LIMITS), help="default: all; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="children at a time")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    records = compile_all(listing(options.target or LIMITS, short=options.short), options.jobs)
    spent = time.perf_counter() - start
    print(table(records))
    wrong = [record for record in records if record["failures"]]
    print(f"\n{len(records) - len(wrong)} of {len(records)} compiled variants are right; {spent:.0f} s")
    if options.json:
        known = versions()
        kept = {name: known[name] for name in ("python", "torch", "triton")}
        save(options.json, {**kept, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "variants": records})
        print(f"written to {options.json}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
