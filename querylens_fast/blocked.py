"""The torch backend of the streamed top-k: blocked matrix products and a selection that never sorts whole rows.

Scores are computed in tiles of at most ``TILE_ELEMENTS`` and dropped at once, so memory does not depend on n x V. A
tile's winners are found in three steps: the extreme of each group of columns, the k best groups, the k best elements
of those. The k-th best *value* found that way is always right; a row is ambiguous only when other elements equal it,
and for those rows alone the lowest ids among the equals are looked up in the whole tile. Everything here works on any
torch device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24
"""Scores held at a time (64 MiB in float32)."""
CAST_ELEMENTS = 1 << 24
"""Elements of W held at a time in the accumulation dtype, when W is narrower."""
MAX_COLUMNS = 1 << 16


class Side(NamedTuple):
    """The k best of one side of each row: scores [n, k] from the extreme inwards, ids [n, k] int64."""

    scores: Tensor
    ids: Tensor


class Epilogue(NamedTuple):
    """What turns inner products into scores: (<f, w> + offset) * scale + bias, each [V], [V], [n] or None."""

    bias: Tensor | None
    scale: Tensor | None
    offset: Tensor | None

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

    def at(self, dots: Tensor, rows: slice, ids: Tensor) -> Tensor:
        """Score inner products [r, m] of rows with the columns ids [r, m]."""
        if self.offset is not None:
            dots = dots + self.offset[rows, None].to(dots)
        if self.scale is not None:
            dots = dots * self.scale[ids].to(dots)
        if self.bias is not None:
            dots = dots + self.bias[ids].to(dots)
        return dots


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep float32 products true float32 (no TF32, no bf16 shortcut), whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores of these inputs are computed and returned in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(first: Side, second: Side, k: int, *, largest: bool) -> Side:
    """The k best of two sides, where every id of ``first`` is lower than every id of ``second``."""
    scores = torch.cat([first.scores, second.scores], 1)
    ids = torch.cat([first.ids, second.ids], 1)
    return best_by_sort(scores, k, largest=largest, ids=ids)


def best_by_sort(scores: Tensor, k: int, *, largest: bool, ids: Tensor | None = None) -> Side:
    """The k best by a stable sort of whole rows (NaN last); ids default to positions and must ascend among equals."""
    # torch sorts NaN above every number, so both sides sort upwards to have it last.
    order = torch.sort(-scores if largest else scores, dim=1, stable=True).indices[:, :k]
    return Side(scores.gather(1, order), order if ids is None else ids.gather(1, order))


def best_of_tile(scores: Tensor, k: int, *, largest: bool) -> Side:
    """The k best of each row of a tile, exactly: sorted, ties by the lower column, NaN after every number.

    Args:
        scores: [r, c] float32 or float64.
        k: 1 ≤ k ≤ c.
        largest: the largest or the smallest.

    Returns:
        A Side whose ids are columns of the tile. Cost: one pass over the tile, a top-k over c/g group extremes and one
        over k·g gathered elements, g ≈ sqrt(c/k); two more passes over the rows that have a tie across the k-th place.
    """
    n_rows, n_cols = scores.shape
    group = group_size(n_cols, k)
    if group < 4 or n_rows == 0:
        return best_by_sort(scores, k, largest=largest)
    worst = -math.inf if largest else math.inf
    extremes = group_extremes(scores, group, largest)
    original = scores
    has_nan = bool(extremes.isnan().any())
    if has_nan:
        scores = scores.masked_fill(scores.isnan(), worst)
        extremes = group_extremes(scores, group, largest)
    candidates, ids = gather_best_groups(scores, extremes, group, k, largest)
    values, places = candidates.topk(min(k + 1, candidates.shape[1]), dim=1, largest=largest)
    ids, kth = ids.gather(1, places[:, :k]), values[:, k - 1 : k]
    ids = ids.sort(dim=1).values
    result = best_by_sort(scores.gather(1, ids), k, largest=largest, ids=ids)
    _settle_ties(scores, result, values, kth, extremes, k, largest)
    if has_nan:
        short = (kth == worst).squeeze(1).nonzero().squeeze(1)
        if short.numel():
            whole = best_by_sort(original[short], k, largest=largest)
            result.scores[short], result.ids[short] = whole.scores, whole.ids
    return result


def pass_rows(W: Tensor) -> int:
    """Rows of W to take at a time when all of it is read once.

    On the CPU about what its last cache holds; much less would spend the time in waking and joining threads.
    """
    elements = (1 << 22) if W.device.type == "cpu" else CAST_ELEMENTS
    return max(1, elements // max(1, W.shape[1]))


def group_size(n_cols: int, k: int) -> int:
    """Columns in a group, a power of two near sqrt(c/k): as many extremes to look through as elements of k groups."""
    return 1 << max(0, round(math.log2(math.sqrt(n_cols / k))))


def group_extremes(scores: Tensor, group: int, largest: bool) -> Tensor:
    """Extremes [r, G] of groups {j, j + G, j + 2G, ...}: the reduction then runs over whole vector registers."""
    n_groups = scores.shape[1] // group
    grouped = scores[:, : n_groups * group].unflatten(1, (group, n_groups))
    extremes = grouped.amax(1) if largest else grouped.amin(1)
    tail = scores[:, n_groups * group :]
    if tail.shape[1]:
        tail_extreme = tail.amax(1, keepdim=True) if largest else tail.amin(1, keepdim=True)
        # The short tail is always a candidate; it only has to report its NaN here.
        poison = torch.where(tail_extreme.isnan(), tail_extreme, extremes[:, :1])
        extremes = torch.cat([poison, extremes[:, 1:]], 1)
    return extremes


def gather_best_groups(scores: Tensor, extremes: Tensor, group: int, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Elements and columns [r, min(k, G)·g + tail] of the k best groups and of the tail that fills no group."""
    n_rows, n_cols = scores.shape
    n_groups = extremes.shape[1]
    best = extremes.topk(min(k, n_groups), dim=1, largest=largest, sorted=False).indices
    steps = torch.arange(0, group * n_groups, n_groups, device=scores.device)
    ids = (best[:, :, None] + steps).flatten(1)
    tail = torch.arange(group * n_groups, n_cols, device=scores.device).expand(n_rows, -1)
    ids = torch.cat([ids, tail], 1)
    return scores.gather(1, ids), ids


def _settle_ties(
    scores: Tensor, result: Side, values: Tensor, kth: Tensor, extremes: Tensor, k: int, largest: bool
) -> None:
    """Redo in place the rows where elements left out equal the k-th value: the lowest ids among the equals win."""
    tied = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    if values.shape[1] > k:
        tied |= values[:, k] == values[:, k - 1]
    # Groups left out can only matter when their extreme reaches the k-th value.
    reaching = (extremes >= kth) if largest else (extremes <= kth)
    tied |= reaching.sum(1) > k
    rows = tied.nonzero().squeeze(1)
    if not rows.numel():
        return
    tile, bound = scores[rows], kth[rows]
    beyond = (tile > bound) if largest else (tile < bound)
    equal = tile == bound
    wanted = k - beyond.sum(1, keepdim=True)
    keep = beyond | (equal & (equal.cumsum(1, dtype=torch.int32) <= wanted))
    ids = keep.nonzero()[:, 1].view(len(rows), k)
    fixed = best_by_sort(tile.gather(1, ids), k, largest=largest, ids=ids)
    result.scores[rows], result.ids[rows] = fixed.scores, fixed.ids


def topk(
    F: Tensor,
    W: Tensor,
    k: int,
    epilogue: Epilogue,
    *,
    top: bool,
    bottom: bool,
    block_rows: int | None = None,
    block_cols: int | None = None,
) -> tuple[Side | None, Side | None]:
    """The k largest and the k smallest scores of each row of F over the rows of W (arguments already checked)."""
    dtype = accumulation_dtype(F.dtype)
    n, V = len(F), len(W)
    cols = block_cols or _columns_per_block(W, dtype)
    rows = block_rows or max(1, TILE_ELEMENTS // min(cols, V))
    sides = {largest: empty_side(F, k) for largest, wanted in ((True, top), (False, bottom)) if wanted}
    rows, cols = min(rows, max(n, 1)), min(cols, V)
    # One tile for all blocks: fresh memory of this size costs more to map than the selection.
    tile = torch.empty(rows * cols, dtype=dtype, device=F.device)
    with torch.no_grad(), full_float32():
        for start in range(0, V, cols):
            columns = slice(start, min(start + cols, V))
            block = W[columns].to(dtype)
            for first in range(0, n, rows):
                row_block = slice(first, min(first + rows, n))
                out = tile[: (row_block.stop - first) * len(block)].view(-1, len(block))
                scores = torch.mm(F[row_block].to(dtype), block.T, out=out)
                scores = epilogue.apply_(scores, row_block, columns)
                for largest, side in sides.items():
                    _add_tile(side, scores, row_block, start, k, largest)
    return sides.get(True), sides.get(False)


def empty_side(F: Tensor, k: int) -> Side:
    """Room for the k best of every row of F."""
    shape = (len(F), k)
    scores = torch.empty(shape, dtype=accumulation_dtype(F.dtype), device=F.device)
    return Side(scores, torch.empty(shape, dtype=torch.int64, device=F.device))


def _add_tile(side: Side, scores: Tensor, rows: slice, start: int, k: int, largest: bool) -> None:
    """Merge a tile of scores, whose first column is ``start``, into the best of the columns before it."""
    found = best_of_tile(scores, min(k, scores.shape[1]), largest=largest)
    found.ids.add_(start)
    known = min(start, k)
    if known:
        found = merge(Side(side.scores[rows, :known], side.ids[rows, :known]), found, k, largest=largest)
    width = found.ids.shape[1]
    side.scores[rows, :width], side.ids[rows, :width] = found


def _columns_per_block(W: Tensor, dtype: torch.dtype) -> int:
    if W.dtype == dtype:
        return MAX_COLUMNS
    return max(1024, min(MAX_COLUMNS, CAST_ELEMENTS // max(1, W.shape[1])))


def scores_at(F: Tensor, W: Tensor, ids: Tensor, epilogue: Epilogue) -> Tensor:
    """Scores [n, m] of rows of F with the columns ids [n, m] (arguments already checked)."""
    dtype = accumulation_dtype(F.dtype)
    n, m = ids.shape
    sampled = F.device.type == "cpu" and W.dtype == dtype and m > 0
    step = max(1, (CAST_ELEMENTS if sampled else CAST_ELEMENTS // max(1, F.shape[1])) // max(1, m))
    scores = torch.empty(n, m, dtype=dtype, device=F.device)
    with torch.no_grad(), full_float32():
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            if sampled and _distinct(ids[rows]):
                dots = _sampled_products(F[rows], W, ids[rows])
            else:
                dots = (W[ids[rows]].to(dtype) @ F[rows].to(dtype)[:, :, None]).squeeze(2)
            scores[rows] = epilogue.at(dots, rows, ids[rows])
    return scores


def scores_of_columns(F: Tensor, W: Tensor, ids: Tensor, epilogue: Epilogue) -> Tensor:
    """Scores [n, m] of every row of F with the same columns ids [m] (arguments already checked)."""
    dtype = accumulation_dtype(F.dtype)
    bias, scale, offset = epilogue
    taken = Epilogue(None if bias is None else bias[ids], None if scale is None else scale[ids], offset)
    with torch.no_grad(), full_float32():
        return taken.apply_(F.to(dtype) @ W[ids].to(dtype).T, slice(None), slice(None))


def _distinct(ids: Tensor) -> bool:
    ordered = ids.sort(dim=1).values
    return not bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _sampled_products(F: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    """Inner products at distinct ids [r, m] without gathering rows of W: ten times faster than that on a CPU."""
    r, m = ids.shape
    starts = torch.arange(0, r * m + 1, m)
    zeros = torch.zeros(r * m, dtype=F.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        pattern = torch.sparse_csr_tensor(starts, ids.flatten(), zeros, (r, len(W)), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, F, W.T, beta=0.0).values().view(r, m)
