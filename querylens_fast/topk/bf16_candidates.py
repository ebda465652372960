"""Candidates from a bfloat16 product on the CPU, where a processor that has it is several times faster than in float32.

The epilogue is folded into the product, so that a tile of scores is read only by the selection:

    (<f, w> + o) s + b = <[f, o, o, o', 1, 1], [s w, s, s', s, b, b']>

where o, s and b are the bfloat16 parts of offset, scale and bias and o', s', b' what is left of them. `certified`
turns the candidates into exact float32 results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import buffers, certify, selection, torch_backend
from querylens_fast.topk.statistics import Moments
from querylens_fast.topk.torch_backend import Epilogue

NARROW = torch.bfloat16
MAX_COPY_BYTES = 1 << 31
"""Largest bfloat16 copy of W; beyond it the float32 path, which needs none."""
MIN_ROWS = 192
"""Fewer rows of F do not pay for the copy of W."""
WIDER = 4
"""Times as many candidates for a row that the first ones do not settle."""
INFINITY_BITS = 0x7F80
MAX_APART = 16
"""Rows of W, at most, that are kept out of the bfloat16 product."""
_EXTRA = 32
_BLOCK_ROWS = 1024
_MIN_TILE_ROWS = 32
_TILE_ELEMENTS = 1 << 26
"""Scores held at a time (128 MiB in bfloat16)."""


def candidates_for(k: int) -> int:
    """How many candidates a side: room for the rounding of the product where scores are as good as random."""
    return k + max(31, k // 2)


def pays(F: Tensor, W: Tensor, k: int, limit: int | None = None) -> bool:
    """Whether this processor and these shapes gain from the bfloat16 pass, in ``limit`` bytes if there is a limit."""
    copy = 2 * len(W) * (W.shape[1] + _EXTRA)
    room = MAX_COPY_BYTES if limit is None else min(MAX_COPY_BYTES, limit - _MIN_TILE_ROWS * _row_bytes(W))
    return (
        F.device.type == "cpu"
        and F.dtype == torch.float32
        and len(F) >= MIN_ROWS
        and len(W) >= 32 * candidates_for(k)
        and copy <= room
        and faster_in_bfloat16()
    )


def tile_rows(F: Tensor, W: Tensor, limit: int | None = None) -> int:
    """Rows of F to score at a time, in ``limit`` bytes together with the copy of W."""
    rows = min(_BLOCK_ROWS, _TILE_ELEMENTS // len(W))
    if limit is not None:
        rows = min(rows, (limit - 2 * len(W) * (W.shape[1] + _EXTRA)) // _row_bytes(W))
    return max(1, min(rows, len(F)))


def _row_bytes(W: Tensor) -> int:
    """Of a row of scores in bfloat16, with room for their extremes and candidates."""
    return 3 * len(W)


@cache
def faster_in_bfloat16() -> bool:
    """Whether products are at least twice as fast in bfloat16 here: measured once in a process, in some 50 ms."""
    device = torch.device("cpu")
    F, W = torch.ones(256, 512, device=device), torch.ones(4096, 512, device=device)

    def shortest(F: Tensor, W: Tensor) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(F, W.T)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch_backend.full_float32(device):
        return 2 * shortest(F.to(NARROW), W.to(NARROW)) < shortest(F, W)


class NarrowBound(NamedTuple):
    """How far the folded bfloat16 product can be from the exact score, before its result is rounded."""

    norm: float
    """max ‖s w‖."""
    rounding: float
    """max ‖s w - its bfloat16‖."""
    scale: float
    """max |s|."""
    bias: float
    """max |b| over the finite ones: an infinite bias makes the same score either way."""

    def rows(self, F: Tensor, epilogue: Epilogue) -> Tensor:
        """[r] bounds for rows of F [r, d] float32 and the epilogue of these rows."""
        norms, errors = certify.norms_of(F, NARROW)
        seen = norms + errors
        unit = 2.0**-24
        size = seen * (self.norm + self.rounding) + self.bias
        folded = self.bias
        if epilogue.offset is not None:
            offset = epilogue.offset.abs().to(F)
            size = size + offset * self.scale
            folded = folded + offset * self.scale
        dots = errors * self.norm + seen * self.rounding
        lost = certify.underflow(F.shape[1])
        # Two bfloat16 parts leave 2^-16 of a number; the sums, twice (here and in the exact score), any order.
        return 1.001 * (dots + 2.0**-14 * folded + 4 * (F.shape[1] + _EXTRA) * unit * size) + lost


def topk(
    F: Tensor,
    W: Tensor,
    k: int,
    epilogue: Epilogue,
    *,
    top: bool,
    bottom: bool,
    block_rows: int | None,
    moments: Moments | None = None,
    exact: bool = True,
    tile_elements: int = torch_backend.TILE_ELEMENTS,
) -> certify.Outcome:
    """The k best of each row by bfloat16 candidates; arguments as for `blocked.topk`.

    ``exact`` proves and scores them in float32; else they stand as the bfloat16 product has them.
    """
    with torch.no_grad():
        folded = _fold_columns(W, epilogue, set_apart=exact)
    m, (V, width) = candidates_for(k), folded.W.shape
    rows = max(1, min(block_rows or tile_rows(F, W), len(F)))
    tile = buffers.take("narrow tile", rows * V, NARROW, F.device)

    def score(rows: slice) -> Tensor:
        narrow_F = _fold_rows(F[rows], epilogue.of_rows(rows), width)
        scores = torch.mm(narrow_F, folded.W.T, out=tile[: len(narrow_F) * V].view(-1, V))
        if moments is not None:
            moments.add_tile(scores, rows.start)
            if len(folded.apart):
                others = torch_backend.scores_of_columns(F[rows], W, folded.apart, epilogue.of_rows(rows))
                moments.add_tile(others, rows.start)
        return scores

    if not exact:
        with torch.no_grad(), torch_backend.full_float32(F.device):
            return _as_scored(F, k, score, rows, top, bottom)

    def propose(rows: slice, wide: bool) -> tuple[certify.Proposal | None, certify.Proposal | None]:
        scores = score(rows)
        best = _candidates(scores, m, wide, folded, largest=True) if top else None
        worst = _candidates(scores, m, wide, folded, largest=False) if bottom else None
        return best, worst

    return certify.topk(
        F,
        W,
        k,
        epilogue,
        propose,
        folded.bound,
        top=top,
        bottom=bottom,
        block_rows=rows,
        moments=moments,
        tile_elements=tile_elements,
    )


def _as_scored(
    F: Tensor, k: int, score: Callable[[slice], Tensor], block_rows: int, top: bool, bottom: bool
) -> certify.Outcome:
    """The k best of each row by the bfloat16 scores themselves."""
    sides = {largest: torch_backend.empty_side(F, k) for largest, wanted in ((True, top), (False, bottom)) if wanted}
    for start in range(0, len(F), block_rows):
        rows = slice(start, min(start + block_rows, len(F)))
        scores = score(rows)
        for largest, side in sides.items():
            numbers, extremes = selection.without_nan(scores, largest)
            ids = selection.best_places(numbers, extremes, k, largest).ids
            # A NaN stands behind every number again.
            found = selection.best_of_candidates(scores.gather(1, ids), ids, k, largest=largest)
            side.scores[rows], side.ids[rows] = found
    return certify.Outcome(sides.get(True), sides.get(False), 0, 0)


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 parts high + low ≈ values; low is 0 where high is not finite."""
    high = values.to(NARROW)
    return high, (values - high).to(NARROW).masked_fill(~high.isfinite(), 0)


class _Folded(NamedTuple):
    """W for the bfloat16 product."""

    W: Tensor
    """[V', d + extra] bfloat16."""
    bound: NarrowBound
    columns: Tensor | None
    """[V'] rows of the whole W; None where it is whole."""
    apart: Tensor
    """The other rows: too long, or not finite, for a bound that holds for all; always candidates."""


def _fold_columns(W: Tensor, epilogue: Epilogue, *, set_apart: bool) -> _Folded:
    """Round W, fold the epilogue into it and measure it, in one pass."""
    V, d = W.shape
    plain = all(vector is None for vector in epilogue)
    width = d if plain else d + _EXTRA
    folded = buffers.take("narrow W", V * width, NARROW, W.device).view(V, width)
    scale = None if epilogue.scale is None else epilogue.scale.float()
    norms, rounding = torch.empty(2, V, device=W.device)
    step = min(torch_backend.pass_rows(W), V)
    rounded = buffers.take("rounded", step * d, torch.float32, W.device).view(step, d)
    scaled = buffers.take("scaled", 0 if scale is None else step * d, torch.float32, W.device).view(-1, d)
    for start in range(0, V, step):
        rows = slice(start, min(start + step, V))
        block = W[rows]
        if scale is not None:
            block = torch.mul(block, scale[rows, None], out=scaled[: len(block)])
        folded[rows, :d] = block
        difference = rounded[: len(block)].copy_(folded[rows, :d]).sub_(block)
        norms[rows] = torch.linalg.vector_norm(block.float(), dim=1) + certify.norm_underflow(d)
        rounding[rows] = torch.linalg.vector_norm(difference, dim=1) + certify.norm_underflow(d)
    bias = epilogue.bias
    if not plain:
        extra = folded[:, d:].zero_()
        high, low = _split(torch.ones(V, device=W.device) if scale is None else scale)
        extra[:, 0], extra[:, 1], extra[:, 2] = high, low, high
        if bias is not None:
            extra[:, 3], extra[:, 4] = _split(bias.float())
    apart = _outlying(norms) if set_apart else torch.empty(0, dtype=torch.int64, device=W.device)
    columns = None
    if len(apart):
        inside = torch.ones(V, dtype=torch.bool, device=W.device)
        inside[apart] = False
        columns = inside.nonzero().squeeze(1)
        folded, norms, rounding = folded[columns], norms[columns], rounding[columns]
    bound = NarrowBound(
        certify.largest(norms),
        certify.largest(rounding),
        1.0 if scale is None else certify.largest(scale.abs()),
        0.0 if bias is None else certify.largest(bias[bias.isfinite()].abs()),
    )
    return _Folded(folded, bound, columns, apart)


def _outlying(norms: Tensor) -> Tensor:
    """The few rows of W that are more than twice as long as the next (or not finite); none where they are not few."""
    if len(norms) <= MAX_APART:
        return torch.empty(0, dtype=torch.int64, device=norms.device)
    norms = norms.nan_to_num(nan=math.inf)
    usual = norms.topk(MAX_APART + 1).values[-1]
    return (norms > 2 * usual).nonzero().squeeze(1)


def _fold_rows(F: Tensor, epilogue: Epilogue, width: int) -> Tensor:
    n, d = F.shape
    if width == d:
        return F.to(NARROW)
    folded = torch.zeros(n, width, dtype=NARROW, device=F.device)
    folded[:, :d] = F
    if epilogue.offset is not None:
        high, low = _split(epilogue.offset.float())
        folded[:, d], folded[:, d + 1], folded[:, d + 2] = high, high, low
    if epilogue.bias is not None:
        folded[:, d + 3 : d + 5] = 1
    return folded


class _Tile:
    """One side of a bfloat16 tile [r, V'], from which the best of some or all rows are taken."""

    def __init__(self, scores: Tensor, largest: bool) -> None:
        self.scores, self.largest = scores, largest
        self.numbers: tuple[Tensor, Tensor] | None = None
        # Numbers from zero up are in the order of their bits, and integers are compared twice as fast.
        bits = scores.view(torch.int16)
        self.bits = (bits, selection.extremes_of(bits, True)) if largest else None

    def best(self, m: int, index: Tensor | None = None) -> selection.Side:
        """The m best of the rows index (None: all), in no order."""
        if self.bits is not None:
            found = selection.best_places(*_rows_of(self.bits, index), m, True)
            if int(found.scores.amin()) >= 0 and int(found.scores.amax()) <= INFINITY_BITS:
                return selection.Side(found.scores.view(NARROW), found.ids)
            self.bits = None
        if self.numbers is None:
            self.numbers = selection.without_nan(self.scores, self.largest)
        return selection.best_places(*_rows_of(self.numbers, index), m, self.largest)


def _rows_of(pair: tuple[Tensor, Tensor], index: Tensor | None) -> tuple[Tensor, Tensor]:
    return pair if index is None else (pair[0][index], pair[1][index])


def _candidates(scores: Tensor, m: int, wide: bool, folded: _Folded, *, largest: bool) -> certify.Proposal:
    """The m best of each row of a bfloat16 tile, in no order, and a bound on the others before they were rounded."""
    tile = _Tile(scores, largest)

    def proposal(m: int, index: Tensor | None = None) -> certify.Proposal:
        values, ids = tile.best(m, index)
        left_out = (values.amin(1) if largest else values.amax(1)).float()
        # Rounding to bfloat16 keeps order and moves a number by at most 2^-8 of itself.
        slack = left_out.abs() * 2.0**-8 + 1e-38
        if folded.columns is not None:
            ids = torch.cat([folded.columns[ids], folded.apart.expand(len(ids), -1)], 1)
        return certify.Proposal(ids, left_out + slack if largest else left_out - slack)

    if wide:
        return proposal(WIDER * m)
    return proposal(m)._replace(wider=lambda index: proposal(WIDER * m, index))
