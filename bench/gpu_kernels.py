"""Each kernel of the Triton backend by itself against torch, on rows that fill no tile.

The inputs of a kernel are made by torch, not by the kernel before it, so that one that is wrong or crashes says nothing
of the others. `bench.gpu_check` runs each of these in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csrc_triton.columns import prepare
from csrc_triton.configs import INTERPRETED, Config, configs, statistics_config, target_of
from csrc_triton.finish import OPENED, PROVED, Exact, Results, finish
from csrc_triton.job import Job, Keys, Terms
from csrc_triton.rows import Rows, rows_of
from csrc_triton.select import Candidates, select
from csrc_triton.sums import N_SUMS, sums_of
from csrc_triton.topk import topk
from csrc_triton.winners import TILE, product, winners_of

KEY_BASE = 0x4B400000
"""The bits of 1.5 * 2^23, whose place in a key stands for a score of zero."""
MOST_UNITS_OFF = 64
"""Of 2^22: torch's product and a tensor core's add up in another order."""


class Data(NamedTuple):
    """A block of rows with what the rows kernel would make of it, by torch."""

    F: Tensor
    W: Tensor
    k: int
    rows: Rows


def data(dtype: torch.dtype, device: str, seed: int) -> Data:
    """Gaussian rows; the three columns that fit row 0 best lie in one group, and the least of them elsewhere too."""
    n, d, V, k = (5, 64, 700, 7) if INTERPRETED else (300, 512, 5003, 25)
    generator = torch.Generator(device).manual_seed(seed)
    F = torch.randn(n, d, generator=generator, device=device)
    W = torch.randn(V, d, generator=generator, device=device)
    W[:24:8] = F[0] * torch.tensor([0.7, 0.8, 0.9], device=device)[:, None]
    W[300] = W[0]
    F, W = F.to(dtype), W.to(dtype)
    norm, w_norm = (torch.linalg.vector_norm(x.float(), dim=1) for x in (F, W))
    unit, ones = 0.98 * 2.0**22 / (1.02 * norm * w_norm.max()), torch.ones_like(norm)
    error = 2 * (d + 60) * 2.0**-24 * norm * w_norm.max()
    return Data(F, W, k, Rows(F, unit, ones, unit, error, torch.zeros_like(norm)))


def reference_winners(data: Data, tile: Config, *, largest: bool = True) -> Tensor:
    """Group winners of one side [1, n, 2, G] as fixed-point keys."""
    part = 4 * tile.group
    S = data.F.float() @ data.W.float().T
    padded = torch.nn.functional.pad(S, (0, -S.shape[1] % tile.block_n), value=float("-inf"))
    units = (padded * data.rows.unit[:, None]).round().clamp(-(2.0**22), 2.0**22).long()
    column = torch.arange(padded.shape[1], device=S.device) % part
    keys = ((units + KEY_BASE) * 64 + column // 8 * 2 + column % 2) & 0xFFFFFFFF
    keys = torch.where(keys >= 1 << 31, keys - (1 << 32), keys)
    keys = keys.masked_fill(padded == float("-inf"), -(1 << 31) if largest else (1 << 31) - 1)
    groups = keys.view(len(S), -1, part // 8, 4, 2).transpose(2, 3).reshape(len(S), -1, tile.group)
    return groups.topk(2, dim=2, largest=largest).values.transpose(1, 2).int()[None].contiguous()


def _units_off(winners: Tensor, data: Data, tile: Config) -> int:
    """How far the keys of both sides [2, n, 2, G] are from torch's, in units of scores."""
    expected = torch.cat([reference_winners(data, tile, largest=largest) for largest in (True, False)])
    ours, theirs = (((keys >> 6) & 0x7FFFFF) - 0x400000 for keys in (winners, expected))
    return int((ours - theirs).abs().max())


def _room(data: Data, tile: Config) -> Tensor:
    shape = (2, len(data.F), 2, tile.groups(len(data.W)))
    return torch.zeros(shape, dtype=torch.int32, device=data.F.device)


def rows(data: Data) -> dict[str, Any]:
    """The bound holds for every score of the pass, and keys stay in their range."""
    dtype, scaled = data.F.dtype, data.F.dtype == torch.float32
    columns = prepare(data.W, torch.float16 if scaled else dtype, scaled=scaled)
    assert columns is not None
    found, d = rows_of(data.F, columns.bounds, scaled=scaled), data.F.shape[1]
    passed = (found.narrow[:, :d].double() @ columns.W[:, :d].double().T) * found.factor.double()[:, None]
    off = (passed - data.F.double() @ data.W.double().T).abs().amax(1)
    inside = (passed * found.per_score[:, None]).abs() < 2.0**22
    ok = bool((off <= found.error).all() and inside.all())
    return {"ok": ok, "error": float(off.max()), "bound": float(found.error.max())}


def prepared(data: Data) -> dict[str, Any]:
    """Norms, rounding and the operand, with a column of NaN, a long one and a depth that is no multiple of 16."""
    W, scaled = data.W[:, :-3].clone(), data.F.dtype == torch.float32
    W[1, 2], W[7] = torch.nan, 100 * W[7]
    dtype = torch.float16 if scaled else W.dtype
    found, scale = prepare(W, dtype, scaled=scaled), torch.linspace(0.5, 1.5, len(W), device=W.device)
    scaled_too = prepare(W, dtype, None, scale, scaled=scaled, terms=True)
    assert found is not None and scaled_too is not None and found.apart is not None
    wide = W.double().index_fill(0, torch.tensor([1, 7], device=W.device), 0)
    narrow = found.W.double() * 2.0**-found.bounds.exponent
    off = torch.linalg.vector_norm(narrow[:, : W.shape[1]] - wide, dim=1)
    limits = [x.bounds.error * 2.0**-x.bounds.exponent for x in (found, scaled_too)]
    lengths = [x.bounds.norm * 2.0**-x.bounds.exponent for x in (found, scaled_too)]
    norms = torch.linalg.vector_norm(wide, dim=1)
    ok = found.apart.tolist() == [1, 7] and bool((narrow[:, W.shape[1] :] == 0).all())
    for size, limit, length in zip((torch.ones_like(scale), scale), limits, lengths, strict=True):
        for measured, bound in ((off * size, limit), (norms * size, length)):
            # A bound, and no more than rounding above what it bounds.
            ok = ok and float(measured.max()) <= bound <= 1.01 * float(measured.max()) + 1e-12
    return {"ok": ok, "error": float(off.max()), "bound": limits[0]}


def fused(data: Data) -> dict[str, Any]:
    """Winners of every tile of the table, whole and ragged: in one part, in two merged ones, in two apart."""
    off = {}
    tiles = configs(target_of(data.F.device), data.F.dtype)
    for config in (tile._replace(splits=n, parts=m) for n, m in ((1, 1), (1, 2), (2, 2)) for tile in tiles):
        keys = _room(data, config)
        topk(data.F, data.W, Job(data.rows.unit, keys), config)
        off[str(tuple(config))] = _units_off(keys, data, config)
    return {"ok": max(off.values()) <= MOST_UNITS_OFF, "units_off": off}


def winners(data: Data) -> dict[str, Any]:
    """Winners of scores in memory."""
    keys = _room(data, TILE)
    winners_of(product(data.F, data.W), Job(data.rows.unit, keys))
    off = _units_off(keys, data, TILE)
    return {"ok": off <= MOST_UNITS_OFF, "units_off": off}


def selected(data: Data) -> dict[str, Any]:
    """Every winner that can be among the k best is a candidate, and nothing better is left out."""
    best = reference_winners(data, TILE)
    found = select(best, data.rows, data.k, 64, Keys(bottom=False))
    flat = best[0].flatten(1)
    kth = best[0, :, 0].topk(data.k, dim=1).values[:, -1]
    kept = [set(found.keys[i, 0, : int(found.counts[i, 0])].tolist()) for i in range(len(flat))]
    wanted = [set(row[row >= edge].tolist()) for row, edge in zip(flat, kth, strict=True)]
    ok = all(w <= k for w, k in zip(wanted, kept, strict=True)) and bool((found.left_out[:, 0] < kth).all())
    return {"ok": ok, "most candidates": int(found.counts.max())}


def finished(data: Data) -> dict[str, Any]:
    """The k best of candidates that torch has chosen, exact scores and flags; row 0's third best is behind two."""
    n, slots, device = len(data.F), 64, data.F.device
    best = reference_winners(data, TILE)[0]
    groups, count = best.shape[2], min(slots, best[0].numel())
    chosen = best.flatten(1).topk(count, dim=1)
    place = 2 * (chosen.indices % groups) + chosen.indices // groups
    keys, places = (torch.nn.functional.pad(x, (0, slots - count))[:, None].int() for x in (chosen.values, place))
    counts = torch.full((n, 1), count - 1, dtype=torch.int32, device=device)
    candidates = Candidates(keys, places, counts, chosen.values[:, -1:].contiguous())
    results = Results(
        torch.zeros(1, n, data.k, device=device),
        torch.zeros(1, n, data.k, dtype=torch.int64, device=device),
        torch.zeros(n, 1, dtype=torch.int32, device=device),
    )
    finish(data.F, data.W, candidates, data.rows, results, Exact(None, None, TILE.group), Keys(bottom=False))
    S = data.F.double() @ data.W.double().T
    expected = S.topk(data.k, dim=1).values
    off = max(float((x - expected).abs().max()) for x in (results.scores[0], S.gather(1, results.ids[0])))
    settled = ((results.flags == PROVED) | (results.flags == OPENED)).all() and int(results.flags[0]) == OPENED
    # Column 0 is scored by the second launch, its copy by the first: the same bits, and the lower column first.
    alike = results.ids[0, 0, 2:4].tolist() == [0, 300] and bool(results.scores[0, 0, 2] == results.scores[0, 0, 3])
    return {"ok": off < 1e-5 * data.F.shape[1] and bool(settled) and alike, "error": off, "alike": alike}


def summed(data: Data) -> dict[str, Any]:
    """Partial sums of the fused kernel's statistics variant, added up; against float64."""
    n, V, device = len(data.F), len(data.W), data.F.device
    config = statistics_config(target_of(device), data.F.dtype)
    terms = Terms(*(x for size in (n, V) for x in (torch.ones(size, device=device), torch.zeros(size, device=device))))
    keys = _room(data, config)
    sums = torch.zeros(n, N_SUMS, keys.shape[3] // 4, device=device)
    job = Job(data.rows.unit, keys, terms=terms, shift=torch.zeros(n, device=device), sums=sums)
    topk(data.F, data.W, job, config)
    found, S = sums_of(sums), data.F.double() @ data.W.double().T
    squares, log = (S**2).sum(1), S.logsumexp(1)
    off = max(float(((found[1] - squares) / squares).abs().max()),
              float((found[4] + found[5].log() - log).abs().max() / S.abs().max()))  # fmt: skip
    return {"ok": off < 1e-4 and _units_off(keys, data, config) <= MOST_UNITS_OFF, "error": off}


KERNELS: dict[str, Callable[[Data], dict[str, Any]]] = {
    "columns": prepared,
    "rows": rows,
    "fused": fused,
    "winners": winners,
    "select": selected,
    "finish": finished,
    "sums": summed,
}
