"""Exact scores of chosen (row of F, row of W) pairs, and of chosen columns.

On a CPU the pairs are taken in the order of the rows of W, whose products torch.sparse.sampled_addmm computes without
gathering anything: four times as fast as by rows of F. A W of another dtype is widened a block at a time.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from querylens_fast.topk import buffers
from querylens_fast.topk.products import full_float32
from querylens_fast.topk.request import Epilogue, accumulation_dtype

BLOCK_ELEMENTS = 1 << 22
"""Elements gathered at a time."""
WIDENED_ELEMENTS = 1 << 20
"""Elements of W that are widened at a time: what stays in the cache."""


def pair_scores(F: Tensor, W: Tensor, rows: Tensor, columns: Tensor, epilogue: Epilogue) -> Tensor:
    """Scores [m] of rows [m] of F with columns [m], which ascend; each sum of products in one order, wherever it is."""
    dtype = accumulation_dtype(F.dtype, W.dtype)
    with torch.no_grad(), full_float32(F.device):
        wide = F.to(dtype)
        dots = torch.empty(len(rows), dtype=dtype, device=F.device)
        step = len(W) if W.dtype == dtype and W.is_contiguous() else max(1, WIDENED_ELEMENTS // W.shape[1])
        edges = torch.arange(0, len(W) + step, step, device=F.device)
        bounds = torch.searchsorted(columns, edges).tolist()
        for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if a < b:
                block = W[i * step : (i + 1) * step]
                if block.dtype != dtype or not block.is_contiguous():
                    block = buffers.converted("widened W", block, dtype)
                dots[a:b] = _sampled(wide, block, rows[a:b], columns[a:b] - i * step)
        return epilogue.at(dots, rows, columns)


def _sampled(F: Tensor, W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products of pairs, columns ascending."""
    _warn_of_sparse_once()
    if len(rows) > len(F) * len(W):
        # A pair may come twice, for either side, but torch takes no more entries than a matrix has.
        found = torch.empty(len(rows), dtype=F.dtype, device=F.device)
        for half in (slice(0, None, 2), slice(1, None, 2)):
            found[half] = _sampled(F, W, rows[half], columns[half])
        return found
    starts = torch.zeros(len(W) + 1, dtype=torch.int64, device=F.device)
    torch.cumsum(torch.bincount(columns, minlength=len(W)), 0, out=starts[1:])
    zeros = torch.zeros(len(rows), dtype=F.dtype, device=F.device)
    shape = (len(W), len(F))
    pattern = torch.sparse_csr_tensor(starts, rows, zeros, shape, device=F.device, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, W, F.T, beta=0.0).values()


def scores_at(F: Tensor, W: Tensor, ids: Tensor, epilogue: Epilogue) -> Tensor:
    """Scores [n, m] of rows of F with the columns ids [n, m] (arguments already checked)."""
    n, m = ids.shape
    dtype = accumulation_dtype(F.dtype, W.dtype)
    scores = torch.empty(n, m, dtype=dtype, device=F.device)
    on_cpu = F.device.type == "cpu"
    step = max(1, 4 * BLOCK_ELEMENTS // max(1, F.shape[1] if on_cpu else F.shape[1] * m))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        part, chosen = epilogue.of_rows(rows), ids[rows]
        if on_cpu:
            columns, order = chosen.flatten().sort()
            found = torch.empty(len(order), dtype=dtype, device=F.device)
            found[order] = pair_scores(F[rows], W, order // max(m, 1), columns, part)
            scores[rows] = found.view(len(chosen), m)
        else:
            with torch.no_grad(), full_float32(F.device):
                dots = (W[chosen].to(dtype) @ F[rows].to(dtype)[:, :, None]).squeeze(2)
                scores[rows] = part.at(dots, slice(None), chosen)
    return scores


def scores_of_columns(F: Tensor, W: Tensor, ids: Tensor, epilogue: Epilogue) -> Tensor:
    """Scores [n, m] of every row of F with the same columns ids [m] (arguments already checked)."""
    dtype = accumulation_dtype(F.dtype, W.dtype)
    bias, scale, offset = epilogue
    taken = Epilogue(None if bias is None else bias[ids], None if scale is None else scale[ids], offset)
    with torch.no_grad(), full_float32(F.device):
        return taken.apply_(F.to(dtype) @ W[ids].to(dtype).T, slice(None), slice(None))


@cache
def _warn_of_sparse_once() -> None:
    """Trigger torch's one-time warning that CSR tensors are in beta, while it is suppressed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        torch.eye(2, device="cpu").to_sparse_csr()
