"""Everything on a GPU machine, in one command and under eight minutes: ``python -m bench.gpu_check``.

Each part (`bench.gpu_parts`) runs in a process of its own with a time limit, the most valuable first: every kernel
against torch; stage times and end to end beside the peers; every mode against float64; then traces, other shapes and
data, a tuning table, transports. What a part prints is in the JSON at once, and a part that is wrong, fails, crashes or
hangs stops no other. Parts for which no time is left are dropped, from the end of the list, and named. No time counts
towards a goal while a part of the same dtype is wrong.

The record is gpu-check.json in $OUT, or in bench/results, with the tuning table and traces beside it. Exits with 1 when
something is wrong or fails, and with 2 where there is no GPU. This process imports neither torch nor the package, so
that no import can spoil the run.

``--interpret`` runs the whole logic at small sizes on the CPU under Triton's interpreter: results are checked, times
are null, because they would say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from bench.record import RESULTS, save

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 450
LEAST_S = 10
"""A part that has less time than this is not begun: torch alone takes half of it."""


class Part(NamedTuple):
    """One child process."""

    name: str
    """A function of `bench.gpu_parts`, its arguments behind commas."""
    limit_s: float
    together: bool = False
    """May run beside the neighbours in the list that may too: it takes no times."""


def _parts() -> tuple[Part, ...]:
    kernels = ["fused,bfloat16", "fused,float16", "rows,bfloat16", "rows,float32", "select,bfloat16"]
    kernels += [
        "columns,bfloat16",
        "columns,float32",
        "finish,bfloat16",
        "finish,float32",
        "winners,bfloat16",
        "sums,bfloat16",
    ]
    modes = [f"checks,{d},{m}" for m in ("fused", "gemm") for d in ("bfloat16", "float32", "float16")]
    first = ["stages,gemma-2-2b,bfloat16,fused", "case,gemma-2-2b,bfloat16", "stages,gemma-2-2b,float32,fused"]
    first += ["case,gemma-2-2b,float32", "million,bfloat16", "stages,gpt2,bfloat16,fused", "case,gpt2,bfloat16"]
    then = ["trace,bfloat16", "case,gpt2,float32", "shapes,bfloat16", "shapes,float32", "kinds,float32"]
    then += ["kinds,bfloat16", "tuning,bfloat16", "stages,gemma-2-2b,bfloat16,gemm", "sweep,gemma3-1b,bfloat16"]
    then += ["tuning,float16", "trace,float32", "sweep,gpt2-small,float32", "stages,gemma-2-2b,float32,gemm"]
    return (
        Part("about", 60),
        *(Part(f"kernel,{name}", 60, together=True) for name in kernels),
        *(Part(name, 60) for name in first),
        *(Part(name, 120, together=True) for name in [*modes, "graph", "transport"]),
        *(Part(name, 50) for name in then),
    )


PARTS = _parts()


class Goal(NamedTuple):
    """One line of the table: a task of ours and a peer's, both of one part's times."""

    name: str
    part: str
    peer: str | None
    """None: the bound is in seconds."""
    bound: float
    at_most: bool = True
    """Ours may take at most ``bound`` times the peer's time; else the peer takes at least ``bound`` times ours."""


GOALS = (
    Goal("bf16, d=2304, V=262,144 over the GEMM alone", "case,gemma-2-2b,bfloat16", "gemm alone", 1.12),
    Goal("bf16, d=768, V=50,257 over the GEMM alone", "case,gpt2,bfloat16", "gemm alone", 1.30),
    Goal("bf16, d=2304 against chunks + 2 topk", "case,gemma-2-2b,bfloat16", "torch chunked + 2 x topk", 4.0, False),
    Goal("exact float32, d=2304 against the float32 GEMM", "case,gemma-2-2b,float32", "gemm alone", 8.0, False),
    Goal("exact float32, d=768 against the float32 GEMM", "case,gpt2,float32", "gemm alone", 8.0, False),
    Goal("a million features against a million, seconds", "million,bfloat16", None, 10.0),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="timings of each task")
    parser.add_argument("--seed", type=int, help="of the data; fresh by default, and recorded")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts together")
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time where no times are taken")
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="may be repeated")
    parser.add_argument("--interpret", action="store_true", help="small sizes on the CPU, no times")
    parser.add_argument("--out", type=Path, help="the JSON; default gpu-check.json in $OUT or bench/results")
    options = parser.parse_args(arguments)
    run = Run(options)
    run.everything([part for part in PARTS if not options.part or part.name in ("about", *options.part)])
    print(run.table())
    bad = {name: item for name, item in run.record["items"].items() if "failed" in item or not item.get("ok", True)}
    for name, item in bad.items():
        print(f"WRONG: {name}" if not item.get("ok", True) else f"FAILED: {name}: {item['failed']}")
    if run.record["dropped"]:
        print(f"dropped for want of time: {'; '.join(run.record['dropped'])}")
    print(f"written to {run.out}")
    if bad:
        raise SystemExit(2 if run.no_gpu else 1)


class Run:
    """One run: parts in order of importance, the record written whenever one of them has something to say."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.monotonic()
        self.out: Path = (options.out or Path(os.environ.get("OUT") or RESULTS) / "gpu-check.json").resolve()
        self.lock = threading.Lock()
        self.no_gpu = False
        self.record: dict[str, Any] = {
            "interpreted": options.interpret,
            "seed": secrets.randbelow(2**31) if options.seed is None else options.seed,
            "machine": None,
            "items": {},
            "dropped": [],
        }

    def everything(self, parts: Sequence[Part]) -> None:
        """Run the parts, neighbours that take no times together."""
        for together, group in itertools.groupby(parts, key=lambda part: part.together):
            with ThreadPoolExecutor(self.options.jobs if together else 1) as pool:
                list(pool.map(self.part, group))

    def part(self, part: Part) -> None:
        """Run one part into the record, or drop it."""
        left = self.options.budget - (time.monotonic() - self.start)
        if self.no_gpu:
            return
        if left < LEAST_S:
            with self.lock:
                self.record["dropped"].append(part.name)
                self._save()
            return
        item: dict[str, Any] = {}

        def found(line: dict[str, Any]) -> None:
            with self.lock:
                for name, value in line.items():
                    known = item.get(name)
                    item[name] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
                self._save()

        with self.lock:
            self.record["items"][part.name] = item
        begun = time.monotonic()
        limit = min(left, part.limit_s * (10 if self.options.interpret else 1))
        reason = run_child(self.command(part), limit, found)
        if part.name == "about":
            self.no_gpu = "no GPU" in (reason or "")
            self.record["machine"] = item.get("machine")
        spent = {} if self.options.interpret else {"wall_s": time.monotonic() - begun}
        found(spent | ({"failed": reason} if reason else {}))
        print(part.name, reason or ("done" if item.get("ok", True) else "wrong"), flush=True)

    def command(self, part: Part) -> list[str]:
        """The child's command line."""
        command = [sys.executable, "-W", "ignore", "-m", "bench.gpu_parts", part.name, "--folder", str(self.out.parent)]
        command += ["--seed", str(self.record["seed"]), "--repeat", str(self.options.repeat)]
        return command + (["--interpret"] if self.options.interpret else [])

    def _save(self) -> None:
        self.record["goals"] = [self._reached(goal) for goal in GOALS]
        self.record["spent_s"] = None if self.options.interpret else time.monotonic() - self.start
        save(self.out, self.record)

    def _reached(self, goal: Goal) -> dict[str, Any]:
        items = self.record["items"]
        item, dtype = items.get(goal.part, {}), goal.part.split(",")[-1]
        wrong = any(not other.get("ok", True) for name, other in items.items() if dtype in name.split(","))
        reached = None
        if not wrong and not self.options.interpret and goal.peer is None:
            reached = item.get("all_s")
        elif not wrong and not self.options.interpret and {"ours", goal.peer} <= set(item.get("times", {})):
            ours, peer = (item["times"][name]["p50_ms"] for name in ("ours", goal.peer))
            reached = ours / peer if goal.at_most else peer / ours
        unit = " s" if goal.peer is None else "×"
        wanted = f"{'≤' if goal.at_most else '≥'} {goal.bound}{unit}"
        return {"name": goal.name, "goal": wanted, "unit": unit, "reached": reached}

    def table(self) -> str:
        """Goals and what was reached, as text."""
        lines = [f"{'goal':50s} {'wanted':>9s} {'reached':>14s}"]
        for goal in self.record.get("goals", []):
            reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.2f}{goal['unit']}"
            lines.append(f"{goal['name']:50s} {goal['goal']:>9s} {reached:>14s}")
        return "\n".join(lines)


def run_child(command: list[str], limit_s: float, found: Callable[[dict[str, Any]], None]) -> str | None:
    """Run a command in a process group of its own, and end the group at the limit.

    Args:
        command: prints lines of JSON, and whatever else.
        limit_s: seconds.
        found: called with each object as it is printed.

    Returns:
        How it failed, with the end of its standard error; None where it did not.
    """
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        assert child.stdout is not None
        # A thread, because a child that a driver keeps alive holds the pipe for ever.
        reader = threading.Thread(target=_read, args=(child.stdout, found), daemon=True)
        reader.start()
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        reader.join(5)
        with suppress(subprocess.TimeoutExpired):
            child.wait(5)
        errors.seek(0)
        said = errors.read().strip()[-800:]
    if status == 0:
        return None
    how = f"not done within {limit_s:.3g} s" if status is None else f"ended with status {status}"
    if status is not None and status < 0:
        how = f"ended by {signal.Signals(-status).name}"
    return f"{how}: {said}" if said else how


def _read(lines: IO[str], found: Callable[[dict[str, Any]], None]) -> None:
    for line in lines:
        with suppress(ValueError):
            read = json.loads(line)
            if isinstance(read, dict):
                found(read)


if __name__ == "__main__":
    main()
