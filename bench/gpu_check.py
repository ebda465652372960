"""Is the compiled kernel right, and how fast is it: one command for a GPU machine, ``python -m bench.gpu_check``.

Writes gpu-check.json to $OUT, or to bench/results. Stops starting new measurements after seven minutes. Exits with 1
when a result is wrong and with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import querylens_fast as ql
from bench.cases import CASES, ODD
from bench.machine import machine
from bench.record import save
from bench.topk import inputs, report, run_case
from querylens_fast import blocked, fused, ops
from querylens_fast.demo import ASSETS

BUDGET_S = 420
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIMED = [
    ("gpt2", torch.bfloat16),
    ("gemma-2-2b", torch.bfloat16),
    ("gpt2", torch.float32),
    ("llama-3.2-1b", torch.bfloat16),
    ("gemma-2-2b", torch.float32),
    ("qwen3-1.7b", torch.bfloat16),
    ("features-x-features", torch.bfloat16),
]


def stable_topk(S: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    order = torch.sort(-S if largest else S, dim=1, stable=True).indices[:, :k]
    return S.gather(1, order), order


def check_gaussian(n: int, d: int, V: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel against float64 on Gaussian rows: largest error of scores and of the true scores at the ids."""
    generator = torch.Generator("cuda").manual_seed(n + V)
    F = torch.randn(n, d, generator=generator, device="cuda").to(dtype)
    W = torch.randn(V, d, generator=generator, device="cuda").to(dtype)
    S = F.double() @ W.double().T
    none = blocked.Epilogue(None, None, None)
    outcome = fused.topk(F, W, k, none, top=True, bottom=True, block_rows=None)
    error = 0.0
    for side, largest in ((outcome.top, True), (outcome.bottom, False)):
        assert side is not None
        expected, _ = stable_topk(S, k, largest)
        error = max(error, float((side.scores.double() - expected).abs().max()))
        error = max(error, float((S.gather(1, side.ids) - expected).abs().max()))
    name = f"gaussian {n}x{d}x{V} k={k} {dtype}"
    rates = {"crowded": outcome.widened_rows / (2 * n), "fallback": outcome.fallback_rows / (2 * n)}
    return {"name": name, "error": error, "ok": error <= 1e-5 * math.sqrt(d), **rates}


def check_exact(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel on whole numbers, where ids have to equal those of a stable sort."""
    n, d, V, k = 70, 40, 3001, 33
    generator = torch.Generator("cuda").manual_seed(1)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator, device="cuda").float()

    F, W, bias, scale, offset = integers(n, d), integers(V, d), integers(V), integers(V), integers(n)
    if kind == "equal":
        W[:] = W[:1].clone()
    if kind == "sorted":
        W[:] = (torch.arange(V, device="cuda") // 12)[:, None].float()
    if kind == "one group":
        W[:] = 0
        W[2:256:8] = 7
    if kind == "infinite":
        bias[5:40], bias[100:103] = -math.inf, math.inf
    if kind == "nan":
        bias[::3] = math.nan
        F[3] = math.nan
    S = (F.double() @ W.double().T + offset.double()[:, None]) * scale.double() + bias.double()
    result = ops.streamed_topk(F.to(dtype), W.to(dtype), k, bias=bias, scale=scale, offset=offset, backend="triton")
    ok = True
    sides = ((result.top_scores, result.top_ids, True), (result.bottom_scores, result.bottom_ids, False))
    for scores, ids, largest in sides:
        assert scores is not None and ids is not None
        expected, order = stable_topk(S, k, largest)
        ok &= torch.equal(ids, order) and torch.allclose(scores.double(), expected, rtol=0, atol=0, equal_nan=True)
    return {"name": f"exact {kind} {dtype}", "ok": ok}


def correctness() -> list[dict[str, Any]]:
    kinds = ("ties", "equal", "sorted", "one group", "infinite", "nan")
    tasks = [partial(check_gaussian, *shape, dtype) for dtype in DTYPES for shape in ODD]
    tasks += [partial(check_exact, kind, dtype) for dtype in DTYPES for kind in kinds]
    results = []
    for task in tasks:
        try:
            results.append(task())
        except Exception:
            results.append({"name": str(task.args), "ok": False, "error": traceback.format_exc()[-1500:]})
        print(results[-1], flush=True)
    return results


def check_transport(device: str) -> dict[str, Any]:
    """The demo's transport and signatures on a device against the CPU in float64, and the seconds they take."""
    model, tokens = (
        ql.load_model(ASSETS / "model", device=device),
        ql.load_tokens(ASSETS / "tokens.safetensors").head(16),
    )
    exact = ql.load_model(ASSETS / "model", dtype="float64")
    start = time.perf_counter()
    fitted = ql.fit_transport(model, tokens, energy="probes", n_probes=8, progress=False)
    fit_s = time.perf_counter() - start
    truth = ql.fit_transport(exact, tokens, energy="probes", n_probes=8, progress=False)
    errors = [
        float((found.cpu().double() - table[key]).norm() / table[key].norm())
        for ours, table in ((fitted.matrices, truth.matrices), (fitted.energies, truth.energies))
        for key, found in ours.items()
    ]
    dictionary = ql.load_dictionary(ASSETS / "sae_layer2")
    start = time.perf_counter()
    found = ql.signatures(dictionary, model, preset="query_lens_key", transport=fitted)
    read_s = time.perf_counter() - start
    expected = ql.signatures(dictionary, exact, preset="query_lens_key", transport=truth)
    errors.append(float((found.top_scores.double() - expected.top_scores).norm() / expected.top_scores.norm()))
    name = f"demo transport and signatures on {device}"
    return {"name": name, "ok": max(errors) < 1e-3, "error": max(errors), "fit_s": fit_s, "signatures_s": read_s}


def stage_times(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of the kernel with its second stage alone, beside the whole: where the time goes."""
    from csrc_triton.topk import topk

    case = CASES[name]
    F, W = inputs(case, 4096, dtype, "cuda")
    times = {}
    for label, task in (
        ("kernel_and_selection_ms", lambda: topk(F, W, case.k + 16)),
        ("whole_ms", lambda: ops.streamed_topk(F, W, case.k)),
    ):
        task()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            task()
        torch.cuda.synchronize()
        times[label] = 200 * (time.perf_counter() - start)
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench gpu_check", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked or measured", file=sys.stderr)
        raise SystemExit(2)
    start = time.perf_counter()
    out = Path(os.environ.get("OUT") or Path(__file__).parent / "results") / "gpu-check.json"
    checks = [*correctness(), check_transport("cuda")]
    wrong = [check["name"] for check in checks if not check["ok"]]
    records: list[dict[str, Any]] = []
    skipped: list[str] = []
    # No times for a kernel that is wrong.
    for name, dtype in [] if wrong else TIMED:
        if time.perf_counter() - start > BUDGET_S:
            skipped.append(f"{name} {dtype}")
            continue
        try:
            record = run_case(CASES[name], CASES[name].rows, dtype, "cuda", options.repeat)
            record["stages"] = stage_times(name, dtype)
            records.append(record)
            report(record)
        except Exception as error:
            skipped.append(f"{name} {dtype}: {error}")
        # Written after each, so that a limit on the machine loses one case and not all.
        save(out, {"machine": machine(torch.device("cuda")), "checks": checks, "skipped": skipped, "cases": records})
    save(out, {"machine": machine(torch.device("cuda")), "checks": checks, "skipped": skipped, "cases": records})
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks right" + "".join(f"\nWRONG: {name}" for name in wrong))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
