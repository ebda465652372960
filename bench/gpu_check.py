"""Everything on a GPU machine, in one command and under eight minutes: ``python -m bench.gpu_check``.

First correctness of every variant and mode against float64 (fresh seeds, poisoned memory), then the machine's
ceilings, then the goals: each measured beside its peer in the same process, each written to the JSON as soon as it is
known. No time is reported for a kernel that is wrong. The file is gpu-check.json in $OUT, or in bench/results. Exits
with 1 when a result is wrong or a measurement fails, and with 2 where there is no GPU.

``--interpret`` runs the whole logic at small sizes on the CPU under Triton's interpreter: results are checked, times
are null, because they would say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

BUDGET_S = 440


class Goal(NamedTuple):
    """One line of the table: what is reached is ours over the peer's time, or the peer's over ours."""

    name: str
    case: str
    dtype: str
    peer: str
    bound: float
    at_most: bool
    """Ours may take at most ``bound`` times the peer's time; else the peer takes at least ``bound`` times ours."""


GOALS = (
    Goal("bf16, d=2304, V=262,144 over the GEMM alone", "gemma-2-2b", "bfloat16", "gemm alone", 1.12, True),
    Goal("bf16, d=768, V=50,257 over the GEMM alone", "gpt2", "bfloat16", "gemm alone", 1.30, True),
    Goal("bf16, d=2304 against chunks + 2 topk", "gemma-2-2b", "bfloat16", "torch chunked + 2 x topk", 4.0, False),
    Goal("exact float32, d=2304 against the float32 GEMM", "gemma-2-2b", "float32", "gemm alone", 5.0, False),
    Goal("exact float32, d=768 against the float32 GEMM", "gpt2", "float32", "gemm alone", 5.0, False),
)
CASES_TIMED = (
    ("gemma-2-2b", "bfloat16"),
    ("gpt2", "bfloat16"),
    ("gemma-2-2b", "float32"),
    ("gpt2", "float32"),
    ("features-x-features", "bfloat16"),
    ("llama-3.2-1b", "bfloat16"),
    ("gemma-3-1b", "bfloat16"),
    ("qwen3-1.7b", "bfloat16"),
)
SWEEPS = (("gpt2-small", "float32", 32), ("gemma3-1b", "bfloat16", 32), ("gpt2-small", "bfloat16", 64))
"""Model shape, dtype, basis directions timed."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="timings of each peer")
    parser.add_argument("--seed", type=int, help="of the correctness checks; fresh by default, and recorded")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds after which nothing new is begun")
    parser.add_argument("--interpret", action="store_true", help="small sizes on the CPU, no times")
    parser.add_argument("--out", type=Path, help="the JSON; default gpu-check.json in $OUT or bench/results")
    options = parser.parse_args(arguments)
    if options.interpret:
        # Triton decides when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.interpret and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked or measured (--interpret checks the logic)", file=sys.stderr)
        raise SystemExit(2)
    run = Run(options)
    wrong = run.everything()
    print(run.table())
    checks = run.record["checks"]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks right" + "".join(f"\nWRONG: {name}" for name in wrong))
    failed = [f"{name}: {item['failed']}" for name, item in run.record["items"].items() if "failed" in item]
    print("".join(f"FAILED: {line}\n" for line in failed) + f"written to {run.out}")
    if wrong or failed:
        raise SystemExit(1)


class Run:
    """One run: items in order of importance, the record written after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from bench.machine import machine
        from bench.record import RESULTS

        self.options, self.start = options, time.perf_counter()
        self.interpreted = options.interpret
        self.device = torch.device("cpu" if self.interpreted else "cuda")
        self.out = options.out or Path(os.environ.get("OUT") or RESULTS) / "gpu-check.json"
        self.record: dict[str, Any] = {
            "machine": machine(self.device),
            "interpreted": self.interpreted,
            "seed": secrets.randbelow(2**31) if options.seed is None else options.seed,
            "checks": [],
            "items": {},
        }

    def everything(self) -> list[str]:
        """All items; the names of the checks that failed."""
        from bench import checks

        self.record["checks"] = checks.run_all(str(self.device), self.record["seed"])
        wrong = [check["name"] for check in self.record["checks"] if not check["ok"]]
        self._save()
        if wrong:
            self.record["items"]["measurements"] = {"skipped": "a result is wrong"}
            self._save()
            return wrong
        self._item("ceilings", self._ceilings)
        for name, dtype in CASES_TIMED:
            self._item(f"case {name} {dtype}", lambda name=name, dtype=dtype: self._case(name, dtype))
        for shape, dtype, n in SWEEPS:
            self._item(f"sweep {shape} {dtype}", lambda s=shape, t=dtype, n=n: self._sweep(s, t, n))
        self._item("a million features", self._million)
        return wrong

    def _item(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        spent = time.perf_counter() - self.start
        if spent > self.options.budget:
            self.record["items"][name] = {"skipped": f"{spent:.0f} s were spent"}
        else:
            try:
                self.record["items"][name] = measure()
            except Exception as error:
                # What was measured before is worth keeping, and what comes after still worth measuring.
                self.record["items"][name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        item = self.record["items"][name]
        print(name, item.get("skipped") or item.get("failed") or "done", flush=True)
        self._save()

    def _save(self) -> None:
        from bench.record import save

        self.record["goals"] = [self._reached(goal) for goal in GOALS]
        self.record["spent_s"] = time.perf_counter() - self.start
        save(self.out, self.record)

    def _reached(self, goal: Goal) -> dict[str, Any]:
        times = self.record["items"].get(f"case {goal.case} {goal.dtype}", {}).get("times")
        reached = None
        if times and not self.interpreted:
            ours, peer = times["ours"]["p50_ms"], times[goal.peer]["p50_ms"]
            reached = ours / peer if goal.at_most else peer / ours
        return {"name": goal.name, "goal": f"{'≤' if goal.at_most else '≥'} {goal.bound}×", "reached": reached}

    def _ceilings(self) -> dict[str, Any]:
        import torch

        from bench.sweeps import gemm_rate

        d, neurons = (64, 128) if self.interpreted else (2304, 9216)
        rates = {
            str(dtype).removeprefix("torch."): gemm_rate(d, neurons, dtype, self.device) / 1e12
            for dtype in (torch.bfloat16, torch.float32)
        }
        return {"gemm_tflops": dict.fromkeys(rates) if self.interpreted else rates}

    def _case(self, name: str, dtype: str) -> dict[str, Any]:
        import torch

        from bench.cases import CASES
        from bench.topk import run_case

        case = CASES[name]
        if self.interpreted:
            case = case._replace(d=48, V=700, rows=48, k=9)
        record = run_case(
            case, case.rows, getattr(torch, dtype), str(self.device), 1 if self.interpreted else self.options.repeat
        )
        return self._without_times(record)

    def _sweep(self, shape: str, dtype: str, n: int) -> dict[str, Any]:
        import torch

        import querylens_fast as ql
        from bench import sweeps
        from bench.cases import MODEL_SHAPES, SMALL_SHAPES

        torch.manual_seed(0)
        source = (SMALL_SHAPES if self.interpreted else MODEL_SHAPES)[shape]()
        model = ql.as_model(source.to(self.device, getattr(torch, dtype)).eval().requires_grad_(False))
        sequences, length = (2, 8) if self.interpreted else (1024, 32)
        ids = torch.randint(0, model.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
        tokens = ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), "random ids")
        rate = sweeps.gemm_rate(model.d_model, model.blocks[0].mlp.W_in.shape[0], model.dtype, self.device)
        floor = 2 * model.d_model * tokens.n_valid * sweeps.block_parameters(model) / rate
        found: dict[str, Any] = {"tokens": tokens.n_valid, "floor_s": floor}
        for side in ("value", "key"):
            _, found[side] = sweeps.full_sweep(model, tokens, side, min(n, model.d_model), 8.0)
            found[side]["fit_over_floor"] = found[side]["fit_s"] / floor
        return self._without_times(found)

    def _million(self) -> dict[str, Any]:
        """Signatures of 65,536 of a million directions, d=1152, V=262,144; the million extrapolated."""
        import torch

        from bench.timing import quantiles, seconds
        from querylens_fast.topk.api import streamed_topk

        n, d, V = (64, 48, 700) if self.interpreted else (65536, 1152, 262144)
        F, W = torch.randn(n, d, device=self.device), torch.randn(V, d, device=self.device)
        times = [1e3 * seconds(lambda: streamed_topk(F, W, 25), self.device) for _ in range(3)]
        found = {"rows": n, "d": d, "V": V, **quantiles(times), "million_s": quantiles(times)["p50_ms"] * 1e3 / n}
        return self._without_times(found)

    def _without_times(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record as it is on a GPU; what the interpreter took is not kept."""
        if not self.interpreted:
            return record

        def blank(value: Any, name: str = "") -> Any:
            if isinstance(value, dict):
                return {key: blank(each, key) for key, each in value.items()}
            timed = name.endswith(("_s", "_ms", "_floor", "tflops", "_batch")) or name.startswith(("p20", "p50", "p80"))
            return None if timed or name in ("fit_s",) else value

        kept = blank(record)
        return {key: value for key, value in kept.items() if key != "speedup_over"}

    def table(self) -> str:
        """Goals and what was reached, as text."""
        lines = [f"{'goal':50s} {'wanted':>9s} {'reached':>14s}"]
        for goal in self.record["goals"]:
            reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.2f}×"
            lines.append(f"{goal['name']:50s} {goal['goal']:>9s} {reached:>14s}")
        return "\n".join(lines)


if __name__ == "__main__":
    main()
