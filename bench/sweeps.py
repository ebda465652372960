"""What a transport's sweeps cost, timed on a sample of the basis directions: their cost is linear in the directions.

The floor of a full sweep is 2 · d_model · tokens · parameters of the blocks (each of d_model directions passes every
position's share of each weight once) at the best GEMM rate this machine reaches for the model's shapes and dtype.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import querylens_fast as ql
from bench.machine import sync
from bench.timing import seconds
from querylens_fast.transport.first_order import has_closed_form
from querylens_fast.transport.jacobians import Budget, Side, batches, linearise
from querylens_fast.transport.sums import JacobianSums

GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_")
ATTENTION = ("aten::bmm", "aten::baddbmm")


def gemm_rate(d: int, neurons: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best product of many rows with [d, neurons], [neurons, d] or [d, d], median of five."""
    rows, rates = 4096 if device.type == "cpu" else 65536, []
    for k, n in ((d, neurons), (neurons, d), (d, d)):
        a = torch.randn(rows, k, dtype=dtype, device=device)
        b, out = torch.randn(k, n, dtype=dtype, device=device), a.new_empty(rows, n)

        def ten_times(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            for _ in range(10):
                torch.mm(a, b, out=out)

        ten_times()
        rates.append(20 * rows * k * n / statistics.median(seconds(ten_times, device) for _ in range(5)))
    return max(rates)


def block_parameters(model: ql.Model) -> int:
    """Parameters in the blocks' weight matrices."""
    parts = [p for block in model.blocks for p in (block.attention, block.mlp)]
    return sum(w.numel() for p in parts for w in vars(p).values() if isinstance(w, Tensor) and w.ndim > 1)


def full_sweep(
    model: ql.Model, tokens: ql.Tokens, side: Side, n_directions: int, memory_gib: float
) -> tuple[JacobianSums, dict[str, Any]]:
    """Sweep the first n directions over every batch; the accumulators and the times.

    ``timed_s`` is what was measured; ``fit_s`` counts all d_model directions of every batch at the median of the chunks
    timed, so that a neighbour's burst on a shared machine does not enter.
    """
    budget = Budget.plan(model, tokens.ids.shape[1], memory_gib)
    sums = JacobianSums(model, (side,), ("full",), budget.directions)
    fixed, swept = 0.0, []
    for rows in batches(len(tokens.ids), budget.rows):
        start = time.perf_counter()
        lin = linearise(model, tokens, rows)
        sync(model.device)
        fixed += time.perf_counter() - start
        for chosen in batches(n_directions, budget.directions):
            spent = seconds(lambda c=chosen, at=lin: sums.add_full(at, c, side), model.device)
            swept.append((spent, len(range(*chosen.indices(n_directions)))))
    spent = sum(s for s, _ in swept)
    each = sorted(s / n for s, n in swept)
    n_batches = len(list(batches(len(tokens.ids), budget.rows)))
    return sums, {
        "directions_timed": n_directions,
        "timed_s": fixed + spent,
        "fit_s": fixed + statistics.median(each) * model.d_model * n_batches,
        "linearise_s": fixed,
        "ms_a_direction_and_batch": [1e3 * each[int(q * (len(each) - 1))] for q in (0.2, 0.5, 0.8)],
    }


def first_order_sweep(model: ql.Model, tokens: ql.Tokens, memory_gib: float) -> dict[str, float]:
    """Seconds of both sides' first-order terms over the whole sample (nothing is extrapolated), and of linearising.

    ``closed_form`` is the share of modules whose terms come in closed form; the basis is carried through the others.
    """
    length = tokens.ids.shape[1]
    budget = Budget.plan(model, length, memory_gib)
    sums = JacobianSums(model, ("value", "key"), ("first_order",), budget.directions)

    def run(add: bool) -> None:
        for rows in batches(len(tokens.ids), budget.rows):
            lin = linearise(model, tokens, rows)
            if add:
                sums.add_first_order(lin)

    modules = linearise(model, tokens, slice(0, 1)).modules
    return {
        "fit_s": seconds(lambda: run(True), model.device),
        "linearise_s": seconds(lambda: run(False), model.device),
        "closed_form": sum(has_closed_form(m, length) for m in modules) / len(modules),
    }


def time_shares(model: ql.Model, tokens: ql.Tokens, side: Side, memory_gib: float) -> dict[str, float]:
    """Shares of the time of one chunk's sweep: weight products, attention products and all else."""
    device, budget = model.device, Budget.plan(model, tokens.ids.shape[1], memory_gib)
    sums = JacobianSums(model, (side,), ("full",), budget.directions)
    lin, chosen = linearise(model, tokens, slice(0, budget.rows)), slice(0, budget.directions)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as measured:
        sums.add_full(lin, chosen, side)
        sync(device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {"weight products": 0.0, "attention products": 0.0, "copies and casts": 0.0, "elementwise and sums": 0.0}
    for event in measured.key_averages():
        if not event.key.startswith("aten::"):
            continue
        kind = (
            "weight products"
            if event.key in GEMMS
            else "attention products"
            if event.key in ATTENTION
            else "copies and casts"
            if event.key == "aten::copy_"
            else "elementwise and sums"
        )
        spent[kind] += getattr(event, attribute)
    whole = sum(spent.values())
    return {kind: value / whole for kind, value in spent.items()}
