"""Faults injected on purpose: what is lost, silent, run, told or wrong afterwards.

    python -m bench faults [--short] [--only kills,disks] [--out FILE.json]

- kills: SIGKILL at file operations, in the middle of writes and at random, then the same call again;
- interrupts: Ctrl-C at random moments of every long command, then the same command again;
- disks: full disks (small tmpfs mounts as root, and limits on file sizes), then room and the same call again;
- corruptions: bits flipped, files cut, swapped, replaced and edited, finished and half-finished;
- hostile: files of every kind and arguments of every command that are wrong or meant to harm;
- products: random calls of the streamed top-k on both backends against a stable sort.

Every number but the counts of tries has to be 0. A kill is of the process, not of the machine: what a power failure
does to a disk's own cache is not tried. Needs Linux. About ten minutes on one core; a twentieth as many calls on Triton
as on torch, for its interpreter is slow. ``--short`` tries a little of each in some seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.faults import corruptions, disks, hostile, interrupts, kills, products
from bench.faults.workload import Workload
from bench.machine import machine
from bench.record import save

TRITON_SHARE = 20
"""Calls on torch for each under Triton's interpreter, which takes some 80 ms for one."""
PARTS = ("kills", "interrupts", "disks", "corruptions", "hostile", "products")
FULL = {"kills": 380, "interrupts": 84, "disks": 90, "corruptions": 400, "hostile": 900, "products": 10_000}
HARM = {
    "traceback": "tracebacks",
    "unexpected": "errors of no kind",
    "hang": "hangs",
    "crash": "crashes",
    "code run": "times code run",
    "secret told": "secrets told",
    "unnamed": "errors without the file's name",
}
SHORT = {"kills": 12, "interrupts": 14, "disks": 8, "corruptions": 14, "hostile": 12, "products": 40}


def measure(counts: dict[str, int], only: list[str], seed: int = 0) -> dict[str, dict[str, Any]]:
    """The chosen parts, ``counts`` tries of each, as their counts and problems."""
    found: dict[str, dict[str, Any]] = {}
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a forked process loads models best without threads
    torch.set_num_threads(1)  # a forked process has the calling thread alone
    with tempfile.TemporaryDirectory(prefix="querylens-faults-") as folder:
        workload = Workload(Path(folder))
        tries = {"kills": kills.run, "interrupts": interrupts.run, "disks": disks.run, "corruptions": corruptions.run}
        tries["hostile"] = hostile.run
        for name in only:
            if name == "products":
                found[name] = products.run(counts[name], counts[name] // TRITON_SHARE, seed)
            else:
                found[name] = tries[name](workload, counts[name], seed)
    return found


def table(parts: dict[str, dict[str, Any]]) -> str:
    """The counts of a record as the Markdown table of docs/faults.md, a row for each part that it has."""
    rows = [f"| {_tried(name, counts)} | {_found(name, counts)} |" for name, counts in parts.items()]
    return "\n".join(["| tried | found |", "|---|---|", *rows])


def _tried(name: str, counts: dict[str, Any]) -> str:
    if name == "kills":
        where = ", ".join(f"{counts[kind]} {kind}" for kind in ("at file operations", "in writes", "at random"))
        return f"{counts['kills']} kills ({where})"
    if name == "products":
        calls = {backend: counts[backend]["calls"] for backend in ("torch", "triton")}
        return f"{sum(calls.values()):,} random top-k calls ({calls['torch']:,} torch, {calls['triton']:,} Triton)"
    if name == "interrupts":
        return f"Ctrl-C {counts[name]} times ({counts['stopped']} before the end)"
    what = {"disks": "full disks", "hostile": "hostile inputs"}.get(name, name)
    return f"{counts[what]} {what}"


def _found(name: str, counts: dict[str, Any]) -> str:
    if name == "kills":
        kept = f"{counts['lost blocks']} blocks lost, {counts['leftovers']} files left over"
        return f"{kept}, {len(counts['problems'])} other results"
    if name == "hostile":
        harm = ", ".join(f"{counts[kind]} {said}" for kind, said in HARM.items())
        return f"{harm}; at most {counts['slowest_s']} s each"
    if name == "interrupts":
        return f"{len(counts['problems'])} without a word how to go on, with a traceback, or with another result"
    if name == "products":
        return f"{sum(counts[backend]['wrong'] for backend in ('torch', 'triton'))} wrong"
    return f"{len(counts['problems'])} " + ("other results" if name == "disks" else "not noticed")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a little of each")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts; the record keeps the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="record to write, or to complete")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if unknown := sorted(set(only) - set(PARTS)):
        parser.error(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    found = measure(SHORT if options.short else FULL, only, options.seed)
    problems = 0
    for name, counts in found.items():
        problems += len(counts["problems"])
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in counts.items() if key != "problems"))
        for problem in counts["problems"]:
            print(f"  {problem}")
    if options.out is not None:
        before = json.loads(options.out.read_text())["parts"] if options.out.exists() else {}
        parts = {name: (before | found)[name] for name in PARTS if name in before | found}
        save(options.out, {"machine": machine(torch.device("cpu")), "parts": parts})
    print("nothing lost, silent, run, told or wrong" if not problems else f"{problems} problems")
    raise SystemExit(problems > 0)
