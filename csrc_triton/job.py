"""Arguments of a launch over a block of rows: the terms of its scores, the kind of its keys, where results go."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Terms(NamedTuple):
    """What turns dot products into scores, (dots * factor + offset) * scale + bias; float32 and contiguous."""

    factor: Tensor
    """[n]."""
    offset: Tensor
    """[n]."""
    scale: Tensor
    """[V]."""
    bias: Tensor
    """[V]."""


class Keys(NamedTuple):
    """Which winners are kept, and as what integers."""

    top: bool = True
    """The largest; the first of the sides."""
    bottom: bool = True
    """The smallest; the last of the sides."""
    fixed: bool = True
    """Fixed-point keys; else float keys, which take any score (`csrc_triton.epilogue`)."""


class Job(NamedTuple):
    """How the dot products of a block of rows are scored, and where their winners go."""

    unit: Tensor
    """[n] float32, units of the keys a score; with fixed-point keys every |score * unit| < 2^22."""
    winners: Tensor
    """[sides, n, 2, G] int32, written: best and second of each group, the top first."""
    keys: Keys = Keys()
    terms: Terms | None = None
    """Applied to the dot products, or None."""
    shift: Tensor | None = None
    """[n] float32 asks for partial sums about it; needs terms."""
    sums: Tensor | None = None
    """[n, 7, tiles] float32, written with shift."""

    def of_rows(self, rows: slice) -> Job:
        """The same for some rows of the block."""
        terms = self.terms
        return Job(
            self.unit[rows],
            self.winners[:, rows],
            self.keys,
            None if terms is None else terms._replace(factor=terms.factor[rows], offset=terms.offset[rows]),
            None if self.shift is None else self.shift[rows],
            None if self.sums is None else self.sums[rows],
        )

    def pointers(self) -> tuple[Tensor, ...]:
        """The kernels' arguments from ``unit`` to ``sums``; placeholders stand for None and are never read."""
        terms = self.terms or (self.unit,) * 4
        shift, sums = (self.unit if x is None else x for x in (self.shift, self.sums))
        return (self.unit, *terms, shift, self.winners, sums)

    def flags(self) -> dict[str, bool]:
        """The kernels' switches."""
        return {
            "TERMS": self.terms is not None,
            "FIXED": self.keys.fixed,
            "TOP": self.keys.top,
            "BOTTOM": self.keys.bottom,
            "STATISTICS": self.shift is not None,
        }
