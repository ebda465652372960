"""The torch backend of the streamed top-k: blocked matrix products, and `selection` from each block of scores.

Scores are computed in tiles of at most ``TILE_ELEMENTS`` and dropped at once, so memory does not depend on n x V.
Everything here works on any torch device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import buffers
from querylens_fast.topk.selection import Side, best_of_tile, merge
from querylens_fast.topk.statistics import Moments

TILE_ELEMENTS = 1 << 24
"""Scores held at a time (64 MiB in float32)."""
CAST_ELEMENTS = 1 << 24
"""Elements of W held at a time in the accumulation dtype, when W is narrower."""
MAX_COLUMNS = 1 << 16


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
def full_float32(device: torch.device) -> Iterator[None]:
    """Keep float32 products on device true float32: no TF32, no bf16 shortcut, no autocast, whatever was chosen."""
    with torch.autocast(device.type, enabled=False):
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:
            # The process has chosen by torch.backends.*.fp32_precision, after which the older setting can't be read.
            with _ieee_backends():
                yield
            return
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def _ieee_backends() -> Iterator[None]:
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores of these inputs are computed and returned in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pass_rows(W: Tensor) -> int:
    """Rows of W to take at a time when all of it is read once.

    On the CPU about what its last cache holds; much less would spend the time in waking and joining threads.
    """
    elements = (1 << 22) if W.device.type == "cpu" else CAST_ELEMENTS
    return max(1, elements // max(1, W.shape[1]))


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
    moments: Moments | None = None,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Side | None, Side | None]:
    """The k largest and the k smallest scores of each row of F over the rows of W (arguments already checked).

    ``moments`` sees every tile, of at most ``tile_elements`` scores.
    """
    dtype = accumulation_dtype(F.dtype)
    n, V = len(F), len(W)
    cols = min(block_cols or _columns_per_block(W, dtype), tile_elements)
    rows = block_rows or max(1, tile_elements // min(cols, V))
    sides = {largest: empty_side(F, k) for largest, wanted in ((True, top), (False, bottom)) if wanted}
    rows, cols = min(rows, max(n, 1)), min(cols, V)
    tile = buffers.take("tile", rows * cols, dtype, F.device)
    with torch.no_grad(), full_float32(F.device):
        for start in range(0, V, cols):
            columns = slice(start, min(start + cols, V))
            block = W[columns].to(dtype)
            for first in range(0, n, rows):
                row_block = slice(first, min(first + rows, n))
                out = tile[: (row_block.stop - first) * len(block)].view(-1, len(block))
                scores = torch.mm(F[row_block].to(dtype), block.T, out=out)
                scores = epilogue.apply_(scores, row_block, columns)
                if moments is not None:
                    moments.add_tile(scores, first)
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


def scores_at(F: Tensor, W: Tensor, ids: Tensor, epilogue: Epilogue, *, distinct: bool = False) -> Tensor:
    """Scores [n, m] of rows of F with the columns ids [n, m] (arguments already checked).

    ``distinct`` says that no row of ids holds one twice, which is looked up otherwise.
    """
    dtype = accumulation_dtype(F.dtype)
    n, m = ids.shape
    sampled = F.device.type == "cpu" and W.dtype == dtype and m > 0
    gathered = max(1, CAST_ELEMENTS // max(1, F.shape[1] * m))
    step = max(1, CAST_ELEMENTS // max(1, m)) if sampled else gathered
    scores = torch.empty(n, m, dtype=dtype, device=F.device)
    with torch.no_grad(), full_float32(F.device):
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            if sampled and (distinct or _distinct(ids[rows])):
                dots = _sampled_products(F[rows], W, ids[rows])
            else:
                parts = zip(F[rows].split(gathered), ids[rows].split(gathered), strict=True)
                dots = torch.cat([(W[some].to(dtype) @ f.to(dtype)[:, :, None]).squeeze(2) for f, some in parts])
            scores[rows] = epilogue.at(dots, rows, ids[rows])
    return scores


def scores_of_columns(F: Tensor, W: Tensor, ids: Tensor, epilogue: Epilogue) -> Tensor:
    """Scores [n, m] of every row of F with the same columns ids [m] (arguments already checked)."""
    dtype = accumulation_dtype(F.dtype)
    bias, scale, offset = epilogue
    taken = Epilogue(None if bias is None else bias[ids], None if scale is None else scale[ids], offset)
    with torch.no_grad(), full_float32(F.device):
        return taken.apply_(F.to(dtype) @ W[ids].to(dtype).T, slice(None), slice(None))


def _distinct(ids: Tensor) -> bool:
    ordered = ids.sort(dim=1).values
    return not bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _sampled_products(F: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    """Inner products at distinct ids [r, m] without gathering rows of W: ten times faster than that on a CPU."""
    r, m = ids.shape
    _hear_out_sparse()
    starts = torch.arange(0, r * m + 1, m, device=F.device)
    zeros = torch.zeros(r * m, dtype=F.dtype, device=F.device)
    shape = (r, len(W))
    pattern = torch.sparse_csr_tensor(starts, ids.flatten(), zeros, shape, device=F.device, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, F, W.T, beta=0.0).values().view(r, m)


@cache
def _hear_out_sparse() -> None:
    """Let torch say once, unheard, that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        torch.eye(2, device="cpu").to_sparse_csr()
