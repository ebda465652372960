"""Streamed top-k against what one would write otherwise, in one process: ``python -m bench topk --help``.

Peers take turns within each repetition, so a busy machine slows all of them; what counts is the ratio. Nothing is
printed before the results have been compared with float64.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES, Case
from bench.machine import machine
from bench.record import save
from bench.timing import measure
from querylens_fast.topk.api import TopK, streamed_topk

CPU_ROWS = 4096
CHUNK_ROWS = 512
"""Rows of the product that the peers hold on a CPU: more are no faster."""
GOALS = {"torch chunked + 2 x topk": 3.0, "faiss.knn": 4.0, "gemm alone bf16": 1 / 1.8}
"""On a CPU with bfloat16 products, k=25 and V=50,257: at least so many times our time."""
KINDS = ("gaussian", "sorted", "equal", "dead", "heavy-tailed", "one outlier")
"""Rows of scores: as good as random; ascending with the id; all the same; half of F zero; columns of very different
norm; one column a thousand times as long."""


def inputs(case: Case, rows: int, dtype: torch.dtype, device: str, kind: str = "gaussian") -> tuple[Tensor, Tensor]:
    """F [rows, d] and W [V, d], seeded; rows of a Gaussian W differ in norm by some 10 % as embeddings do."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    F, W = normal(rows, case.d), normal(case.V, case.d)
    W *= 1 + 0.1 * normal(case.V, 1)
    if kind == "sorted":
        W = torch.linspace(0, 1, case.V, device=device)[:, None] * W[:1]
    elif kind == "equal":
        W = W[:1].expand(case.V, -1).contiguous()
    elif kind == "dead":
        F[::2] = 0
    elif kind == "heavy-tailed":
        W *= normal(case.V, 1).exp()
    elif kind == "one outlier":
        W[case.V // 2] *= 1000
    return F.to(dtype), W.to(dtype)


def chunked(F: Tensor, W: Tensor, use: Callable[[Tensor], Any]) -> list[Any]:
    """F Wᵀ in chunks of rows, each written over the one before and given to ``use``."""
    step = CHUNK_ROWS if F.device.type == "cpu" else max(1, (1 << 30) // len(W))
    room = _room(F, min(step, len(F)) * len(W))
    found = []
    for start in range(0, len(F), step):
        rows = F[start : start + step]
        found.append(use(torch.mm(rows, W.T, out=room[: len(rows) * len(W)].view(len(rows), len(W)))))
    return found


_chunks: dict[torch.dtype, Tensor] = {}


def _room(F: Tensor, n_elements: int) -> Tensor:
    """A peer's chunk; on the CPU kept between calls, as mapping fresh memory would be a part of its time."""
    if F.device.type != "cpu":
        return torch.empty(n_elements, dtype=F.dtype, device=F.device)
    kept = _chunks.get(F.dtype)
    if kept is None or len(kept) < n_elements:
        kept = _chunks[F.dtype] = torch.empty(n_elements, dtype=F.dtype)
    return kept[:n_elements]


def torch_topk(F: Tensor, W: Tensor, k: int) -> TopK:
    """The plain alternative: chunks of the product and two torch.topk."""
    parts = chunked(F, W, lambda S: (*S.topk(k), *S.topk(k, largest=False)))
    top, top_ids, bottom, bottom_ids = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopK(top, top_ids, bottom, bottom_ids)


def faiss_topk(F: Tensor, W: Tensor, k: int) -> None:
    """Both sides by faiss' brute force."""
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    for features in (F.numpy(), (-F).numpy()):
        faiss.knn(features, W.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)


def peers(F: Tensor, W: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name; ``ours`` first."""
    narrow_F, narrow_W = F.bfloat16(), W.bfloat16()
    found: dict[str, Callable[[], object]] = {
        "ours": lambda: streamed_topk(F, W, k),
        "torch chunked + 2 x topk": lambda: torch_topk(F, W, k),
        "gemm alone": lambda: chunked(F, W, lambda S: None),
        "gemm alone bf16": lambda: chunked(narrow_F, narrow_W, lambda S: None),
    }
    if F.device.type == "cuda":
        for method in ("fused", "gemm"):
            found[f"ours, {method}"] = lambda method=method: streamed_topk(F, W, k, method=method)
        found["ours, torch backend"] = lambda: streamed_topk(F, W, k, backend="torch")
        found |= gpu_peers(F, W, k)
    elif F.dtype == torch.float32 and importlib.util.find_spec("faiss") is not None:
        found["faiss.knn"] = lambda: faiss_topk(F, W, k)
    return found


def modes(F: Tensor, W: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """Our own other ways: the narrow product's own scores, a plain pass (on a CPU), and either with row statistics."""
    found: dict[str, Callable[[], object]] = {}
    for precision in ("bf16",) if F.device.type == "cuda" else ("float32", "bf16"):
        for statistics in (False, True):
            name = f"ours, {precision}" + (" + statistics" if statistics else "")
            settings = {"precision": precision, "statistics": statistics}
            found[name] = lambda settings=settings: streamed_topk(F, W, k, **settings)
    return found


def gpu_peers(F: Tensor, W: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """Other libraries' answers, where they are installed: top side alone where they know no other."""
    found: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("faiss") is not None and hasattr(importlib.import_module("faiss"), "knn_gpu"):
        faiss = importlib.import_module("faiss")
        resources = faiss.StandardGpuResources()

        def faiss_gpu() -> None:
            for features in (F, -F):
                faiss.knn_gpu(resources, features.float(), W.float(), k, metric=faiss.METRIC_INNER_PRODUCT)

        found["faiss.knn_gpu"] = faiss_gpu
    if importlib.util.find_spec("cuvs") is not None:
        search = importlib.import_module("cuvs.neighbors.brute_force")
        index = search.build(W.float(), metric="inner_product")
        found["cuvs brute_force (top side)"] = lambda: search.search(index, F.float(), k)
    if importlib.util.find_spec("flashinfer") is not None:
        flashinfer = importlib.import_module("flashinfer")
        if hasattr(flashinfer, "top_k"):
            found["gemm + flashinfer.top_k (top side)"] = lambda: chunked(F, W, lambda S: flashinfer.top_k(S, k))
    return found


def worst_error(found: TopK, F: Tensor, W: Tensor, k: int) -> tuple[float, float]:
    """Largest errors against float64 on up to 32 rows: of the scores, and of the true scores at the ids."""
    rows = torch.linspace(0, len(F) - 1, min(32, len(F)), device=F.device).long()
    S = F[rows].double() @ W.double().T
    of_scores = of_ids = 0.0
    sides = ((found.top_scores, found.top_ids, True), (found.bottom_scores, found.bottom_ids, False))
    for scores, ids, largest in sides:
        assert scores is not None and ids is not None
        expected = S.topk(k, largest=largest).values
        of_scores = max(of_scores, float((scores[rows].double() - expected).abs().max()))
        of_ids = max(of_ids, float((S.gather(1, ids[rows]) - expected).abs().max()))
    return of_scores, of_ids


def check(F: Tensor, W: Tensor, k: int) -> dict[str, float]:
    """Our errors and torch's own; raises SystemExit when ours are more than three times torch's."""
    ours, theirs = worst_error(streamed_topk(F, W, k), F, W, k), worst_error(torch_topk(F, W, k), F, W, k)
    limit = 3 * max(theirs) + 1e-5 * F.shape[1] ** 0.5
    if not max(ours) <= limit:
        raise SystemExit(f"wrong results: error {max(ours):.3g} where torch's is {max(theirs):.3g}; no time reported")
    return {"ours": max(ours), "torch": max(theirs), "limit": limit}


def run_case(
    case: Case, rows: int, dtype: torch.dtype, device: str, repeat: int, kind: str = "gaussian"
) -> dict[str, Any]:
    """Check, then measure one case; the record that goes into the JSON."""
    F, W = inputs(case, rows, dtype, device, kind)
    error = check(F, W, case.k)
    measured = peers(F, W, case.k)
    if kind == "gaussian":
        measured |= modes(F, W, case.k)
    times = measure(measured, F.device, repeat)
    ours = times["ours"]["p50_ms"]
    return {
        "case": case.name,
        "kind": kind,
        "shape": {"rows": rows, "d": case.d, "V": case.V, "k": case.k, "dtype": str(dtype).removeprefix("torch.")},
        "error": error,
        "widened": streamed_topk(F, W, case.k).widened_rows / (2 * rows),
        "times": times,
        "tflops": 2e-9 * rows * case.d * case.V / ours,
        "speedup_over": {name: t["p50_ms"] / ours for name, t in times.items() if name != "ours"},
    }


def report(record: dict[str, Any]) -> None:
    """A record as a small table."""
    shape = record["shape"]
    size = f"{shape['rows']} x {shape['d']} x {shape['V']}"
    print(f"\n{record['case']}: {size}, k={shape['k']}, {shape['dtype']}, {record['kind']}, both sides")
    for name, t in record["times"].items():
        ratio = record["speedup_over"].get(name)
        beside = "" if ratio is None else f"   {ratio:6.2f} x ours"
        goal = GOALS.get(name)
        if goal and ratio and record["kind"] == "gaussian" and record["times"]["ours"].get("extra_mib") is None:
            beside += f" (goal {goal:.2f}: {'reached' if ratio >= goal else 'missed'})"
        print(f"  {name:26s} {t['p50_ms']:9.1f} ms  ({t['p20_ms']:.1f} .. {t['p80_ms']:.1f}){beside}")
    error = record["error"]
    proof = f"{record['widened']:.1%} of rows and sides widened"
    print(f"  error {error['ours']:.2g} (torch {error['torch']:.2g}); {record['tflops']:.2f} TFLOP/s; {proof}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench topk", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: gpt2; may be repeated")
    parser.add_argument("--rows", type=int, help=f"rows of F; default {CPU_ROWS} on the CPU, the case's own on a GPU")
    parser.add_argument("--kind", action="append", choices=[*KINDS, "all"], help="what the scores are like; gaussian")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32; GPU: bfloat16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; 1 gives steady ratios on a machine that is shared")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = options.device.startswith("cuda")
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    records = []
    for name in options.case or ["gpt2"]:
        rows = options.rows or (CASES[name].rows if on_gpu else CPU_ROWS)
        for kind in KINDS if "all" in (options.kind or []) else options.kind or ["gaussian"]:
            records.append(run_case(CASES[name], rows, dtype, options.device, options.repeat, kind))
            report(records[-1])
    if options.out:
        save(options.out, {"machine": machine(torch.device(options.device)), "cases": records})
        print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
