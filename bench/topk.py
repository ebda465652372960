"""Streamed top-k against what one would write otherwise, in one process: ``python -m bench topk --help``.

Peers take turns within each repetition, so a busy machine slows all of them; what counts is the ratio. Nothing is
printed before the results have been compared with float64. ``--out`` adds cases to a record of the same machine, so
that they may be measured one by one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import (
    CASES,
    CHUNKED,
    FAISS,
    GEMM,
    HISTOGRAM,
    NARROW_GEMM,
    ON_CPU,
    PLAIN,
    STATISTICS,
    Case,
    Measurement,
)
from bench.machine import machine
from bench.record import save
from bench.timing import measure
from querylens_fast.topk.api import TopK, streamed_topk

CHUNK_ROWS = 512
"""Rows of the product that the peers hold on a CPU: more are no faster."""
KINDS = ("gaussian", "sorted", "equal", "dead", "heavy-tailed", "one outlier")
"""Rows of scores: as good as random; ascending with the id; all the same; half of F zero; columns of very different
norm; one column a thousand times as long."""


def inputs(
    case: Case, rows: int, dtype: torch.dtype, device: str, kind: str = "gaussian", W_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
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
    return F.to(dtype), W.to(W_dtype or dtype)


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


def tasks(F: Tensor, W: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """What can be timed, by name; ``ours`` first, a peer that is not installed left out."""
    narrow = functools.cache(lambda: (F.bfloat16(), W.bfloat16()))
    found: dict[str, Callable[[], object]] = {
        "ours": lambda: streamed_topk(F, W, k),
        CHUNKED: lambda: torch_topk(F, W, k),
        GEMM: lambda: chunked(F, W, lambda S: None),
        NARROW_GEMM: lambda: chunked(*narrow(), lambda S: None),
        "ours, bf16": lambda: streamed_topk(F, W, k, precision="bf16"),
        STATISTICS: lambda: streamed_topk(F, W, k, statistics=True),
    }
    if F.device.type == "cuda":
        for method in ("fused", "gemm"):
            found[f"ours, {method}"] = lambda method=method: streamed_topk(F, W, k, method=method)
        found["ours, torch backend"] = lambda: streamed_topk(F, W, k, backend="torch")
        return found | gpu_peers(F, W, k)
    found[PLAIN] = lambda: streamed_topk(F, W, k, precision="float32")
    found[HISTOGRAM] = lambda: streamed_topk(F, W, k, histogram=100)
    if F.dtype == W.dtype == torch.float32 and importlib.util.find_spec("faiss") is not None:
        found[FAISS] = lambda: faiss_topk(F, W, k)
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


def true_scores(F: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Up to 32 rows of F, and their scores [r, V] in float64."""
    rows = torch.linspace(0, len(F) - 1, min(32, len(F)), device=F.device).long()
    return rows, torch.cat([F[rows].double() @ part.double().T for part in W.split(1 << 15)], 1)


def worst_error(found: TopK, rows: Tensor, S: Tensor, k: int) -> float:
    """Largest error of the scores of some rows, and of the true scores S [r, V] at their ids."""
    worst = 0.0
    for scores, ids, largest in (
        (found.top_scores, found.top_ids, True),
        (found.bottom_scores, found.bottom_ids, False),
    ):
        assert scores is not None and ids is not None
        expected = S.topk(k, largest=largest).values
        for x in (scores[rows].double(), S.gather(1, ids[rows])):
            worst = max(worst, float((x - expected).abs().max()))
    return worst


def check(F: Tensor, W: Tensor, k: int, ours: TopK) -> dict[str, float]:
    """Errors on up to 32 rows against float64, ours and torch's; SystemExit when ours is over three times torch's."""
    rows, S = true_scores(F, W)
    dtype = torch.promote_types(F.dtype, W.dtype)
    plain = torch_topk(F[rows].to(dtype), W.to(dtype), k)
    error, theirs = worst_error(ours, rows, S, k), worst_error(plain, torch.arange(len(rows), device=F.device), S, k)
    limit = 3 * theirs + 1e-5 * F.shape[1] ** 0.5
    if not error <= limit:
        raise SystemExit(f"wrong results: error {error:.3g} where torch's is {theirs:.3g}; no time reported")
    return {"ours": error, "torch": theirs, "limit": limit}


def run_case(case: Case, rows: int, dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    """Everything there is to time on one Gaussian case."""
    name = str(dtype).removeprefix("torch.")
    return run(Measurement(case._replace(rows=rows), dtypes=(name, name)), device, repeat, everything=True)


def run(measurement: Measurement, device: str, repeat: int, *, everything: bool = False) -> dict[str, Any]:
    """Check, then time one measurement; the record that goes into the JSON."""
    case, goals = measurement.case, measurement.goals
    F_dtype, W_dtype = (getattr(torch, name) for name in measurement.dtypes)
    F, W = inputs(case, case.rows, F_dtype, device, measurement.kind, W_dtype)
    ours = streamed_topk(F, W, case.k)
    error = check(F, W, case.k, ours)
    known = tasks(F, W, case.k)
    wanted = {"ours", *measurement.also, *(name for goal in goals for name in goal[:2])}
    times = measure({name: task for name, task in known.items() if everything or name in wanted}, F.device, repeat)
    p50 = {name: t["p50_ms"] for name, t in times.items()}
    return {
        "case": case.name,
        "kind": measurement.kind,
        "shape": {
            "rows": case.rows, "d": case.d, "V": case.V, "k": case.k,
            "dtype": " x ".join(dict.fromkeys(measurement.dtypes)),
        },
        "error": error,
        "widened": ours.widened_rows / (2 * case.rows),
        "times": times,
        "tflops": 2e-9 * case.rows * case.d * case.V / p50["ours"],
        "speedup_over": {name: t / p50["ours"] for name, t in p50.items() if name != "ours"},
        "goals": [
            {**goal._asdict(), "reached": p50[goal.task] / p50[goal.peer]} for goal in goals if goal.peer in p50
        ],
    }  # fmt: skip


def report(record: dict[str, Any]) -> None:
    """A record as a small table."""
    shape = record["shape"]
    size = f"{shape['rows']} x {shape['d']} x {shape['V']}"
    print(f"\n{record['case']}: {size}, k={shape['k']}, {shape['dtype']}, {record['kind']}, both sides")
    for name, t in record["times"].items():
        ratio = record["speedup_over"].get(name)
        beside = "" if ratio is None else f"   {ratio:6.2f} x ours"
        print(f"  {name:26s} {t['p50_ms']:9.1f} ms  ({t['p20_ms']:.1f} .. {t['p80_ms']:.1f}){beside}")
    for goal in record["goals"]:
        print(f"  {goal['task']}: {goal['reached']:.3f} x {goal['peer']} (wanted: at most {goal['at_most']:.3f})")
    error = record["error"]
    proof = f"{record['widened']:.1%} of rows and sides widened"
    print(
        f"  error {error['ours']:.2g} (torch {error['torch']:.2g}); {record['tflops']:.2f} TFLOP/s; {proof}", flush=True
    )


def add(path: Path, name: str, case: dict[str, Any], here: dict[str, Any]) -> None:
    """Add a case to the record at path, in place of an earlier one of that name; SystemExit on another machine's."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": here, "cases": []}
    for what in ("gpu", "cpu", "threads", "torch"):
        if record["machine"][what] != here[what]:
            raise SystemExit(f"{path} is of {what} {record['machine'][what]}, this is {here[what]}: name another file")
    case = {"name": name, "commit": here["commit"], "load_average": here["load_average"], **case}
    record["cases"] = [old for old in record["cases"] if old["name"] != name] + [case]
    order = list(ON_CPU)
    record["cases"].sort(key=lambda c: order.index(c["name"]) if c["name"] in order else len(order))
    save(path, record)


def main(arguments: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    known = {name: Measurement(case) for name, case in CASES.items()} if on_gpu else ON_CPU
    parser = argparse.ArgumentParser(prog="python -m bench topk", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(known), help="may be repeated; default: every one")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; 1 gives steady ratios on a machine that is shared")
    parser.add_argument("--out", type=Path, help="JSON to write, or to add the cases to")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if on_gpu else "cpu"
    for name in options.case or known:
        if on_gpu:
            found = run_case(CASES[name], CASES[name].rows, torch.bfloat16, device, options.repeat)
        else:
            found = run(known[name], device, options.repeat)
        report(found)
        if options.out:
            add(options.out, name, found, machine(torch.device(device)))


if __name__ == "__main__":
    main()
