"""W for the bfloat16 product: rounded, with the epilogue folded in, in tiles; and the error bound that follows.

    (<f, w> + o) s + b = <[f, o, o, o', 1, 1], [s w, s, s', s, b, b']>

where o, s and b are offset, scale and bias rounded to bfloat16 and o', s', b' their remainders, rounded too. Without
terms and with W in bfloat16 there is nothing to copy or to round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from querylens_fast.topk import bounds, buffers
from querylens_fast.topk.bounds import Bound
from querylens_fast.topk.products import NARROW
from querylens_fast.topk.request import Epilogue, Request

MAX_COPY_BYTES = 1 << 28
"""Rounded rows of W that are held at a time: all of them, or a panel (allocating costs more than rounding)."""
MAX_APART = 16
"""Rows of W, at most, that are kept out of the product and scored exactly for every row of F."""
EXTRA = 32
"""Columns that a folded epilogue adds, most of them zeros: libraries like multiples of 32."""
STEP_ELEMENTS = 1 << 19
"""Elements of W that are rounded and measured at a time: what stays in the cache."""


class NarrowProduct:
    """The bfloat16 product of a request.

    Args:
        request: the call.
        exact: measure the bound, set outlying rows of W apart, and sort the others by length where they differ much.
        keep: bytes of rounded rows of W that may be held.
    """

    dtype = NARROW

    def __init__(self, request: Request, *, exact: bool, keep: int = MAX_COPY_BYTES) -> None:
        W, self.request = request.W, request
        epilogue = request.epilogue
        self.plain = all(vector is None for vector in epilogue)
        self.width = W.shape[1] if self.plain else W.shape[1] + EXTRA
        self.columns: Tensor | None = None
        """Rows of W in the order of the product; None: all of them as they are."""
        self.descending = False
        """Whether they come in the order of their norms, the longest first."""
        self.apart = torch.empty(0, dtype=torch.int64, device=W.device)
        """Rows of W outside it."""
        self._panel = slice(0, 0), torch.empty(0, self.width, dtype=NARROW, device=W.device)
        """Columns that are held, and what they hold."""
        self.scale, self.bias = bounds.largest_terms(epilogue)
        if exact:
            self.norms, self.roundings = self._measure()
            self._arrange()
        if 2 * self.n_columns * self.width <= keep:
            self.load(slice(0, self.n_columns))

    @property
    def n_columns(self) -> int:
        """Rows of W that are multiplied."""
        return len(self.request.W) if self.columns is None else len(self.columns)

    def bound(self, tiles: list[slice]) -> Bound:
        """The error bound of each of some tiles of columns."""
        norm, rounding = (
            torch.stack([x[tile].amax() for tile in tiles]).nan_to_num(nan=math.inf, posinf=math.inf)
            for x in (self.norms, self.roundings)
        )
        depth = 2 * (self.request.F.shape[1] + EXTRA + 8)
        # Two bfloat16 parts leave 2^-16 of a number.
        folded = 0.0 if self.plain else 2.0**-14
        return Bound(norm, rounding, self.scale, self.bias, NARROW, depth, folded=folded)

    def start(self, rows: Tensor | slice) -> None:
        """Set the block of rows that later calls of `write` score."""
        self._F = fold_rows(self.request.F[rows], self.request.epilogue.of_rows(rows), self.width)

    def write(self, columns: slice, out: Tensor) -> None:
        """Write the scores of the block with some columns into out."""
        torch.mm(self._F, self._tile(columns).T, out=out)

    def load(self, columns: slice) -> None:
        """Round some columns, of which tiles will be asked for several times."""
        if self._ready or self._holds(columns):
            return
        n = columns.stop - columns.start
        room = buffers.take("narrow W", n * self.width, NARROW, self.request.W.device).view(n, self.width)
        step = max(1, STEP_ELEMENTS // self.width)
        for start in range(0, n, step):
            stop = min(start + step, n)
            self._round(slice(columns.start + start, columns.start + stop), room[start:stop])
        self._panel = columns, room

    def _holds(self, columns: slice) -> bool:
        held = self._panel[0]
        return held.start <= columns.start and columns.stop <= held.stop

    def _tile(self, columns: slice) -> Tensor:
        if self._ready:
            return self.request.W[columns]
        if self._holds(columns):
            held, room = self._panel
            return room[columns.start - held.start : columns.stop - held.start]
        return self._round(columns, self._empty(columns.stop - columns.start))

    @property
    def _ready(self) -> bool:
        """Whether rows of W are multiplied as they lie in memory."""
        return self.plain and self.request.W.dtype == NARROW and self.columns is None

    def _round(self, columns: slice, out: Tensor) -> Tensor:
        chosen = columns if self.columns is None else self.columns[columns]
        return fold_columns(self.request.W[chosen], _of_columns(self.request.epilogue, chosen), out)

    def _empty(self, n: int) -> Tensor:
        return torch.empty(n, self.width, dtype=NARROW, device=self.request.W.device)

    def _measure(self) -> tuple[Tensor, Tensor]:
        """Norms of (scaled) rows of W and of what rounding takes from them."""
        W, epilogue = self.request.W, self.request.epilogue
        V, d = W.shape
        norms, roundings = torch.empty(2, V, device=W.device)
        step = max(1, STEP_ELEMENTS // d)
        for start in range(0, V, step):
            rows = slice(start, min(start + step, V))
            block, terms = W[rows], _of_columns(epilogue, rows)
            block = block if W.dtype == torch.float32 else buffers.converted("wide rows", block, torch.float32)
            block = block if terms.scale is None else block * terms.scale[:, None].float()
            norms[rows] = torch.linalg.vector_norm(block, dim=1)
            if self.plain and W.dtype == NARROW:
                roundings[rows] = 0
                continue
            out = fold_columns(block, terms._replace(scale=None), self._empty(len(block)), scale=terms.scale)
            difference = buffers.converted("differences", out[:, :d], torch.float32).sub_(block)
            roundings[rows] = torch.linalg.vector_norm(difference, dim=1)
        lost = bounds.norm_underflow(d)
        return norms + lost, roundings + lost

    def _arrange(self) -> None:
        """Set a few rows of W apart that no bound holds for, or a bad one; sort the others by norm where that pays."""
        norms, bias = self.norms.nan_to_num(nan=math.inf, posinf=math.inf), self.request.epilogue.bias
        if bias is not None:
            norms = norms.masked_fill(bias.isnan(), math.inf)
        self.apart = _outlying(norms)
        inside = torch.ones(len(norms), dtype=torch.bool, device=norms.device)
        inside[self.apart] = False
        rest = norms[inside]
        # Tiles of rows of like norm have bounds of their own.
        uneven = len(rest) > 0 and float(rest.max()) > 2 * float(rest.median())
        if len(self.apart) or uneven:
            columns = inside.nonzero().squeeze(1)
            self.descending = uneven
            self.columns = columns[rest.argsort(descending=True, stable=True)] if uneven else columns
            self.norms, self.roundings = self.norms[self.columns], self.roundings[self.columns]


def _outlying(norms: Tensor) -> Tensor:
    """The few rows of W that are more than twice as long as the next (or not finite); none where they are not few."""
    if len(norms) <= MAX_APART:
        return torch.empty(0, dtype=torch.int64, device=norms.device)
    usual = norms.topk(MAX_APART + 1).values[-1]
    return (norms > 2 * usual).nonzero().squeeze(1)


def _of_columns(epilogue: Epilogue, columns: slice | Tensor) -> Epilogue:
    """The epilogue of some rows of W."""
    bias, scale, offset = epilogue
    return Epilogue(None if bias is None else bias[columns], None if scale is None else scale[columns], offset)


def fold_columns(W: Tensor, epilogue: Epilogue, out: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Rows of W [c, d] for the product: written to out [c, d + EXTRA] (or [c, d] without room for terms).

    Args:
        W: rows.
        epilogue: of these rows; they are multiplied by its scale.
        out: [c, ...] bfloat16.
        scale: a scale that W already holds.
    """
    c, d = W.shape
    if epilogue.scale is not None:
        scale = epilogue.scale.float()
        W = W.float() * scale[:, None]
    out[:, :d] = W
    if out.shape[1] > d:
        extra = out[:, d:].zero_()
        high, low = _split(torch.ones(c, device=W.device) if scale is None else scale.float())
        extra[:, 0], extra[:, 1], extra[:, 2] = high, low, high
        if epilogue.bias is not None:
            extra[:, 3], extra[:, 4] = _split(epilogue.bias.float())
    return out


def fold_rows(F: Tensor, epilogue: Epilogue, width: int) -> Tensor:
    """Rows of F [r, d] for the product, [r, width]."""
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


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 parts high + low ≈ values; low is 0 where high is not finite."""
    high = values.to(NARROW)
    return high, (values - high).to(NARROW).masked_fill(~high.isfinite(), 0)
