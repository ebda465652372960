"""How far the scores of a fast pass can be from the exact ones: the proof that its candidates are enough.

With f', w' the operands as the fast pass sees them and u = 2^-24, for any order of summation,

    |<f, w> - <f', w'>| <= |f - f'| |w| + |f'| |w - w'|                          (Cauchy-Schwarz)
    rounding of both sums <= 2 m u |f'| |w'|,   m = number of products            (each sum: m u)

Norms are those of rows of W times their scale; offset and bias add to what is summed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk.request import Epilogue, accumulation_dtype

UNIT = 2.0**-24


class Bound(NamedTuple):
    """A bound for every row of F; what depends on W, measured once (for all of W, or for each tile of it)."""

    norm: Tensor
    """max ‖s w‖, [] or [T]; infinite where nothing can be proved."""
    rounding: Tensor
    """max ‖s w - what the fast pass sees of it‖, like norm."""
    scale: float
    """max |s|."""
    bias: float
    """max |b| over the finite ones: an infinite bias makes the same score either way."""
    dtype: torch.dtype
    """What rows of F are rounded to."""
    depth: int
    """Rounded additions of a sum, at most, on either side together; a multiple where hardware truncates."""
    folded: float = 0.0
    """Relative rounding of offset and bias where they are folded into the product."""

    def rows(self, F: Tensor, epilogue: Epilogue) -> Tensor:
        """Bounds [r], or [T, r] with tiles, for rows of F [r, d] and the epilogue of these rows."""
        norms, errors = norms_of(F, self.dtype)
        seen = norms + errors
        terms = torch.full_like(norms, self.bias)
        if epilogue.offset is not None:
            terms = terms + epilogue.offset.abs().to(norms) * self.scale
        summing = self.depth * UNIT
        lost = underflow(F.shape[1]) * max(1.0, self.scale)
        norm, rounding = ((x[:, None] if x.ndim else x).to(norms) for x in (self.norm, self.rounding))
        dots = errors * norm + seen * rounding + summing * seen * (norm + rounding)
        return 1.001 * (dots + (summing + self.folded) * terms) + lost


def norms_of(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bounds on ‖x‖ and ‖x - x'‖ of each row, x' being x in dtype."""
    wide = rows.to(accumulation_dtype(rows.dtype))
    norms = torch.linalg.vector_norm(wide, dim=1)
    vanished = norm_underflow(rows.shape[1])
    if rows.dtype == dtype or (dtype == torch.float32 and rows.dtype != torch.float64):
        return norms + vanished, torch.full_like(norms, vanished)
    return norms + vanished, torch.linalg.vector_norm(wide - rows.to(dtype).to(wide.dtype), dim=1) + vanished


def norm_underflow(d: int) -> float:
    """How much shorter than it is a row of length d may look: squares, and numbers, too small for float32 are 0."""
    return math.sqrt(d) * 2.0**-63


def underflow(d: int) -> float:
    """What d products of float32 numbers, too small for one of them, and their sum may lose."""
    return max(1e-35, (d + 32) * 2.0**-125)


def largest(values: Tensor | None, default: float) -> float:
    """The largest of some values ≥ 0, infinite when one is NaN; the default for None."""
    if values is None:
        return default
    value = float(values.max()) if values.numel() else 0.0
    return math.inf if math.isnan(value) else value


def largest_terms(epilogue: Epilogue) -> tuple[float, float]:
    """max |scale| and max |bias| over the finite ones."""
    bias = epilogue.bias
    scale = largest(None if epilogue.scale is None else epilogue.scale.abs(), 1.0)
    return scale, largest(None if bias is None else bias[bias.isfinite()].abs(), 0.0)
