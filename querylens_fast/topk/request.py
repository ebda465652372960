"""What every backend of the streamed top-k takes and returns: `Request` in, `Outcome` out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk.statistics import Moments


class Epilogue(NamedTuple):
    """What turns inner products into scores: (<f, w> + offset) * scale + bias, each [V], [V], [n] or None."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None

    def of_rows(self, rows: slice | Tensor) -> Epilogue:
        """The epilogue of some rows of F."""
        return self if self.offset is None else self._replace(offset=self.offset[rows])

    def apply_(self, dots: Tensor, rows: slice, cols: slice) -> Tensor:
        """Score a tile [r, c] of inner products in place; three separate roundings, the same on every path."""
        if self.offset is not None:
            dots += self.offset[rows, None].to(dots)
        if self.scale is not None:
            dots *= self.scale[None, cols].to(dots)
        if self.bias is not None:
            dots += self.bias[None, cols].to(dots)
        return dots

    def at(self, dots: Tensor, rows: slice | Tensor, ids: Tensor) -> Tensor:
        """Score inner products with the columns ids: both [r, m] with rows a slice, or both [m] with rows [m]."""
        if self.offset is not None:
            offset = self.offset[rows].to(dots)
            dots = dots + (offset[:, None] if dots.ndim == 2 else offset)
        if self.scale is not None:
            dots = dots * self.scale[ids].to(dots)
        if self.bias is not None:
            dots = dots + self.bias[ids].to(dots)
        return dots


class Side(NamedTuple):
    """The k best of one side of each row: scores [n, k] from the extreme inwards, ids [n, k] int64."""

    scores: Tensor
    ids: Tensor


class Outcome(NamedTuple):
    """Both sides, and how many rows needed more than the first pass."""

    top: Side | None
    bottom: Side | None
    widened_rows: int = 0
    """Rows (each side counted) that the first candidates did not settle."""
    fallback_rows: int = 0
    """Those among them that were scored again in full; equal rows are scored once and counted once."""


@dataclass(frozen=True)
class Request:
    """One checked call: the k largest and k smallest of each row of (F Wᵀ + offset) * scale + bias."""

    F: Tensor
    """[n, d]."""
    W: Tensor
    """[V, d], d ≥ 1; its dtype may differ from F's."""
    k: int
    """1 ≤ k ≤ V."""
    epilogue: Epilogue = Epilogue()
    top: bool = True
    bottom: bool = True
    statistics: Moments | None = None
    """Sums that every score of every row is counted into."""
    block_rows: int | None = None
    """Rows of F at a time; None: the backend's choice."""
    max_bytes: int | None = None
    """Bound on tiles and copies of W; None: the backend's defaults."""
    precision: str = "exact"
    """"exact", "float32" or "bf16"."""
    method: str | None = None
    """Of the Triton backend."""

    @property
    def sides(self) -> tuple[bool, ...]:
        """The sides that are asked for, each as ``largest``."""
        return tuple(largest for largest, wanted in ((True, self.top), (False, self.bottom)) if wanted)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scores."""
        return accumulation_dtype(self.F.dtype, self.W.dtype)

    def of_rows(self, rows: Tensor, *, sides: tuple[bool, ...] | None = None) -> Request:
        """The same for some rows and sides of it, without statistics."""
        sides = self.sides if sides is None else sides
        return replace(
            self,
            F=self.F[rows],
            epilogue=self.epilogue.of_rows(rows),
            top=True in sides,
            bottom=False in sides,
            statistics=None,
        )

    def empty_sides(self) -> dict[bool, Side]:
        """Uninitialised results for the sides that are asked for."""
        return {largest: empty_side(self.F, self.k, self.dtype) for largest in self.sides}


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that scores of these inputs are computed and returned in: float64 with float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def empty_side(F: Tensor, k: int, dtype: torch.dtype | None = None) -> Side:
    """Uninitialised results for the k best of every row of F."""
    shape = (len(F), k)
    scores = torch.empty(shape, dtype=dtype or accumulation_dtype(F.dtype), device=F.device)
    return Side(scores, torch.empty(shape, dtype=torch.int64, device=F.device))
