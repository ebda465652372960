"""Row statistics from a pass: partial sums of each tile of scores, then those of whole rows.

Partial sums of x = score - shift, [n, 7, tiles] float32: Σ x, x², x³, x⁴, max x, Σ e, Σ (x - max) e, e = exp(x - max).
"""

# pyright does not know the types of a kernel's values and launches.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

N_SUMS = 7
BLOCK = 256
"""Tiles read at a time."""


@triton.jit
def store_sums(
    scores,  # [BLOCK_M, BLOCK_N] float32
    rows,
    columns,
    tile_n,
    shift,  # [n] float32
    sums,  # [n, 7, tiles_n] float32
    n,
    V,
    tiles_n,
):
    """Write the tile's partial sums of each row, without columns past the end."""
    inside = rows < n
    there = (columns < V)[None, :]
    out = sums + rows.to(tl.int64) * (7 * tiles_n) + tile_n
    # So low that its weight is 0, and 0 times it is 0.
    x = tl.where(there, scores - tl.load(shift + rows, mask=inside, other=0.0)[:, None], -1e30)
    peak = tl.max(x, axis=1)
    tl.store(out + 4 * tiles_n, peak, mask=inside)
    weights = tl.exp(x - peak[:, None])
    tl.store(out + 5 * tiles_n, tl.sum(weights, axis=1), mask=inside)
    tl.store(out + 6 * tiles_n, tl.sum(weights * (x - peak[:, None]), axis=1), mask=inside)
    x = tl.where(there, x, 0.0)
    tl.store(out, tl.sum(x, axis=1), mask=inside)
    tl.store(out + tiles_n, tl.sum(x * x, axis=1), mask=inside)
    tl.store(out + 2 * tiles_n, tl.sum(x * x * x, axis=1), mask=inside)
    tl.store(out + 3 * tiles_n, tl.sum((x * x) * (x * x), axis=1), mask=inside)


@triton.jit
def _sums_kernel(
    sums,  # [n, 7, tiles] float32
    totals,  # [7, n] float64
    n,
    tiles,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sums += row * 7 * tiles
    at = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, tiles, BLOCK):
        peaks = tl.maximum(peaks, tl.load(sums + 4 * tiles + start + at, mask=at < tiles - start, other=-float("inf")))
    peak = tl.max(peaks, axis=0)
    weights = tl.zeros((BLOCK,), tl.float64)
    weighted = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        inside = at < tiles - start
        drop = tl.load(sums + 4 * tiles + start + at, mask=inside, other=0.0) - peak
        factor = tl.where(inside, tl.exp(drop), 0.0)
        part = tl.load(sums + 5 * tiles + start + at, mask=inside, other=0.0)
        weights += factor * part
        # A tile far below the peak adds nothing, also where the distance is infinite.
        more = factor * (tl.load(sums + 6 * tiles + start + at, mask=inside, other=0.0) + drop * part)
        weighted += tl.where(factor == 0.0, 0.0, more)
    tl.store(totals + 4 * n + row, peak.to(tl.float64))
    tl.store(totals + 5 * n + row, tl.sum(weights, axis=0))
    tl.store(totals + 6 * n + row, tl.sum(weighted, axis=0))
    for power in range(0, 4):
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, tiles, BLOCK):
            total += tl.load(sums + power * tiles + start + at, mask=at < tiles - start, other=0.0)
        tl.store(totals + power * n + row, tl.sum(total, axis=0))


def sums_of(partial: Tensor) -> Tensor:
    """Sums of each row over all its columns from those of its tiles, in one launch.

    Args:
        partial: [n, 7, tiles] float32 as `store_sums` writes it.

    Returns:
        [7, n] float64: Σ (x - shift)^p for p = 1 to 4, the highest x - shift, and about it Σ e and Σ (x - peak) e.
    """
    n, _, tiles = partial.shape
    totals = torch.empty(N_SUMS, n, dtype=torch.float64, device=partial.device)
    with torch.cuda.device_of(partial):
        _sums_kernel[(n,)](partial, totals, n, tiles, BLOCK=BLOCK, num_warps=1)
    return totals
