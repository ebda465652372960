"""Candidates from a bfloat16 product on the CPU, where a processor that has it is several times faster than in float32.

The epilogue is folded into the product, so that a tile of scores is read only by the selection:

    (<f, w> + o) s + b = <[f, o, o, o', 1, 1], [s w, s, s', s, b, b']>

where o, s and b are the bfloat16 parts of offset, scale and bias and o', s', b' what is left of them. `certified`
turns the candidates into exact float32 results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import blocked, certified, selection, workspace
from .blocked import Epilogue

NARROW = torch.bfloat16
MAX_COPY_BYTES = 1 << 31
"""Largest bfloat16 copy of W; beyond it the float32 path, which needs none."""
MIN_ROWS = 192
"""Fewer rows of F do not pay for the copy of W."""
WIDER = 4
"""Times as many candidates for a row that the first ones do not settle."""
_EXTRA = 32
_BLOCK_ROWS = 512
_TILE_ELEMENTS = 1 << 25
"""Scores held at a time (64 MiB in bfloat16)."""


def candidates_for(k: int) -> int:
    """How many candidates a side: room for the rounding of the product where scores are as good as random."""
    return k + max(31, k // 2)


def pays(F: Tensor, W: Tensor, k: int) -> bool:
    """Whether this processor and these shapes gain from the bfloat16 pass."""
    return (
        F.device.type == "cpu"
        and F.dtype == torch.float32
        and len(F) >= MIN_ROWS
        and len(W) >= 32 * candidates_for(k)
        and 2 * W.numel() <= MAX_COPY_BYTES
        and multiplies_bfloat16()
    )


def multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 products (AVX512-BF16 or AMX)."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


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
        norms, errors = certified.norms_of(F, NARROW)
        seen = norms + errors
        unit = 2.0**-24
        size = seen * (self.norm + self.rounding) + self.bias
        folded = self.bias
        if epilogue.offset is not None:
            offset = epilogue.offset.abs().to(F)
            size = size + offset * self.scale
            folded = folded + offset * self.scale
        dots = errors * self.norm + seen * self.rounding
        # Two bfloat16 parts leave 2^-16 of a number; the sums, twice (here and in the exact score), any order.
        return 1.001 * (dots + 2.0**-14 * folded + 4 * (F.shape[1] + _EXTRA) * unit * size) + 1e-35


def topk(
    F: Tensor, W: Tensor, k: int, epilogue: Epilogue, *, top: bool, bottom: bool, block_rows: int | None
) -> certified.Outcome:
    """The k best of each row by bfloat16 candidates; arguments as for `blocked.topk`, float32 on the CPU only."""
    with torch.no_grad():
        folded, bound = _fold_columns(W, epilogue)
    m, width = candidates_for(k), folded.shape[1]
    rows = block_rows or max(1, min(_BLOCK_ROWS, _TILE_ELEMENTS // len(W)))
    rows = max(1, min(rows, len(F)))
    tile = workspace.take("narrow tile", rows * len(W), NARROW, F.device)

    def propose(rows: slice, wide: bool) -> tuple[certified.Proposal | None, certified.Proposal | None]:
        narrow_F = _fold_rows(F[rows], epilogue.of_rows(rows), width)
        scores = torch.mm(narrow_F, folded.T, out=tile[: len(narrow_F) * len(W)].view(-1, len(W)))
        best = _candidates(scores, m, wide, largest=True) if top else None
        worst = _candidates(scores, m, wide, largest=False) if bottom else None
        return best, worst

    return certified.topk(F, W, k, epilogue, propose, bound, top=top, bottom=bottom, block_rows=rows)


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 parts high + low ≈ values; low is 0 where high is not finite."""
    high = values.to(NARROW)
    return high, (values - high).to(NARROW).masked_fill(~high.isfinite(), 0)


def _fold_columns(W: Tensor, epilogue: Epilogue) -> tuple[Tensor, NarrowBound]:
    """[V, d + extra] bfloat16 and the bound's share of W."""
    V, d = W.shape
    plain = all(vector is None for vector in epilogue)
    width = d if plain else d + _EXTRA
    folded = workspace.take("narrow W", V * width, NARROW, W.device).view(V, width)
    scale = None if epilogue.scale is None else epilogue.scale.to(W)
    norm = rounding = 0.0
    step = min(blocked.pass_rows(W), V)
    rounded = workspace.take("rounded", step * d, torch.float32, W.device).view(step, d)
    scaled = workspace.take("scaled", 0 if scale is None else step * d, torch.float32, W.device).view(-1, d)
    for start in range(0, V, step):
        rows = slice(start, min(start + step, V))
        block = W[rows]
        if scale is not None:
            block = torch.mul(block, scale[rows, None], out=scaled[: len(block)])
        folded[rows, :d] = block
        difference = rounded[: len(block)].copy_(folded[rows, :d]).sub_(block)
        norm = max(norm, certified.largest(torch.linalg.vector_norm(block, dim=1)))
        rounding = max(rounding, certified.largest(torch.linalg.vector_norm(difference, dim=1)))
    if not plain:
        extra = folded[:, d:].zero_()
        high, low = _split(torch.ones(V) if scale is None else scale)
        extra[:, 0], extra[:, 1], extra[:, 2] = high, low, high
        if epilogue.bias is not None:
            extra[:, 3], extra[:, 4] = _split(epilogue.bias.to(W))
    bias = epilogue.bias
    return folded, NarrowBound(
        norm,
        rounding,
        1.0 if scale is None else certified.largest(scale.abs()),
        0.0 if bias is None else certified.largest(bias[bias.isfinite()].abs()),
    )


def _fold_rows(F: Tensor, epilogue: Epilogue, width: int) -> Tensor:
    n, d = F.shape
    if width == d:
        return F.to(NARROW)
    folded = torch.zeros(n, width, dtype=NARROW)
    folded[:, :d] = F
    if epilogue.offset is not None:
        high, low = _split(epilogue.offset.to(F))
        folded[:, d], folded[:, d + 1], folded[:, d + 2] = high, high, low
    if epilogue.bias is not None:
        folded[:, d + 3 : d + 5] = 1
    return folded


def _candidates(scores: Tensor, m: int, wide: bool, *, largest: bool) -> certified.Proposal:
    """The m best of each row of a bfloat16 tile, in no order, and a bound on the others before they were rounded."""
    numbers, extremes = selection.without_nan(scores, largest)

    def proposal(numbers: Tensor, extremes: Tensor, m: int) -> certified.Proposal:
        ids = selection.best_places(numbers, m, largest, extremes)
        values = numbers.gather(1, ids)
        left_out = (values.amin(1) if largest else values.amax(1)).float()
        # Rounding to bfloat16 keeps order and moves a number by at most 2^-8 of itself.
        slack = left_out.abs() * 2.0**-8 + 1e-38
        return certified.Proposal(ids, left_out + slack if largest else left_out - slack)

    if wide:
        return proposal(numbers, extremes, WIDER * m)
    first = proposal(numbers, extremes, m)
    return first._replace(wider=lambda index: proposal(numbers[index], extremes[index], WIDER * m))
