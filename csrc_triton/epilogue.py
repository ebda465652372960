"""What happens to a tile of scores while it is in registers: the readout's terms, group winners, partial sums.

A tile's columns are split into four groups, {c : (c // 2) % 4 = q}: the columns that one thread of a tensor-core
accumulator holds in a row, so that finding a group's winners moves nothing between threads. A score becomes an integer
that orders like it, its low bits are replaced by its place in the group, and the two largest and the two smallest
integers of each group are written. The winners of 64 columns take 8 bytes a side.

What that loses, `select` and the caller make good: scores are rounded to 17 bits, and a group's third-best is hidden.
"""

# The types of a kernel's values are Triton's own business.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

INF_KEY = 0x7F800000
N_SUMS = 7
"""Partial sums a row and tile, of x = score - shift: Σ x, x², x³, x⁴, max x, Σ e, Σ (x - max) e, e = exp(x - max)."""

_INT_MIN = tl.constexpr(-(2**31))
# Takes the keys of -inf..inf to 0..0xFF000000 + a group, as unsigned, and what stands for nothing beyond them.
_SHIFT = tl.constexpr(INF_KEY + 4096)


@triton.jit
def ordered_key(scores):
    """int32 that order like the float32 scores (NaN beyond the infinities)."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def read_out(
    dots, rows, columns, bias, scale, offset, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_OFFSET: tl.constexpr
):
    """(dots + offset) * scale + bias, for rows and columns that exist."""
    if HAS_OFFSET:
        dots += tl.load(offset + rows)[:, None]
    if HAS_SCALE:
        dots *= tl.load(scale + columns)[None, :]
    if HAS_BIAS:
        dots += tl.load(bias + columns)[None, :]
    return dots


@triton.jit
def store_winners(
    scores,  # [BLOCK_M, BLOCK_N] float32
    rows,
    columns,
    tile_n,
    top_keys,  # [n, 2, G] int32: best and second of each group
    bottom_keys,  # [n, 2, G] int32
    n,
    V,
    n_groups,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the best and the second of each group of the tile, for both sides from the same pairs."""
    GROUP: tl.constexpr = BLOCK_N // 4
    local = tl.arange(0, BLOCK_N)
    place = ((local // 8) * 2 + local % 2)[None, :]
    keys = (ordered_key(scores) & -GROUP) | place
    # NaN and columns past the end: below every number here, above every number once shifted.
    scores = tl.where((columns < V)[None, :], scores, float("nan"))
    keys = tl.where(scores == scores, keys, _INT_MIN | place)
    left, right = tl.split(tl.reshape(keys, (BLOCK_M, BLOCK_N // 8, 4, 2)))
    # A pair never takes more than its two registers.
    high, low = tl.maximum(left, right), tl.minimum(left, right)
    groups = tile_n * 4 + tl.arange(0, 4)
    out = rows.to(tl.int64)[:, None] * (2 * n_groups) + groups[None, :]
    inside = (rows < n)[:, None] & (groups >= 0)[None, :]
    if TOP:
        best = tl.max(high, axis=1)
        # Keys within a group differ in their place, so masking the winner leaves exactly the others.
        second = tl.max(tl.where(high == best[:, None, :], low, high), axis=1)
        tl.store(top_keys + out, best, mask=inside)
        tl.store(top_keys + out + n_groups, second, mask=inside)
    if BOTTOM:
        high = high.to(tl.uint32, bitcast=True) + _SHIFT
        low = low.to(tl.uint32, bitcast=True) + _SHIFT
        high, low = tl.maximum(high, low), tl.minimum(high, low)
        best = tl.min(low, axis=1)
        second = tl.min(tl.where(low == best[:, None, :], high, low), axis=1)
        tl.store(bottom_keys + out, (best - _SHIFT).to(tl.int32, bitcast=True), mask=inside)
        tl.store(bottom_keys + out + n_groups, (second - _SHIFT).to(tl.int32, bitcast=True), mask=inside)


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
    """Write the tile's partial sums of each row. Columns past the end count for nothing."""
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


def sums_of(partial: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row's sums over all its columns, in float64, from those of its tiles [n, 7, tiles].

    Returns:
        Σ (x - shift)^p for p = 1 to 4 [4, n]; the highest x - shift [n]; and, about it,
        Σ exp(x - shift - peak) and Σ (x - shift - peak) exp(x - shift - peak), both [n].
    """
    partial = partial.double()
    powers, (peaks, weights, weighted) = partial[:, :4].sum(2).T, partial[:, 4:].unbind(1)
    peak = peaks.amax(1)
    drop = peaks - peak[:, None]
    weighted = (drop.exp() * (weighted + drop * weights)).sum(1)
    return powers, peak, (drop.exp() * weights).sum(1), weighted
