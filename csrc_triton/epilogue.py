"""The epilogue of a tile of scores in registers: the readout's terms, then group winners.

A tile's columns are split into four groups, {c : (c // 2) % 4 = q}: the columns that one thread of a tensor-core
accumulator holds in a row, so that finding a group's winners moves nothing between threads. With SPLITS = 2 each half
of a tile has four groups. A score becomes a key: an integer that orders like it and holds its place in the group in its
low bits. The two largest and the two smallest keys of each group are written: 16 bytes for 64 columns and both sides.

Fixed-point keys: bits(fma(score, unit, 1.5 * 2**23)) * 64 + place. With |score * unit| < 2**22 the sum lies between
2**23 and 2**24, where float32 numbers are whole, so its bits count units of the row: two instructions a score, and an
error of half a unit. They need finite scores of a known range. Float keys serve other scores (a bias with infinities):
the bits of the score in an order of integers, the low ones replaced, so a relative error of 2**-17.
"""

# pyright does not know the types of a kernel's values.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from csrc_triton.sums import store_sums

INF_KEY = 0x7F800000
UNITS = 2.0**22
"""Fixed-point keys count from -UNITS to UNITS."""

_INT_MIN = tl.constexpr(-(2**31))
_INT_MAX = tl.constexpr(2**31 - 1)
_MIDDLE = tl.constexpr(12582912.0)


@triton.jit
def ordered_key(scores):
    """int32 that order like the float32 scores (NaN beyond the infinities); applied to a key it gives the bits back."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def read_out(dots, rows, columns, factor, offset, scale, bias):
    """(dots * factor + offset) * scale + bias, for rows and columns that exist."""
    dots = tl.fma(dots, tl.load(factor + rows)[:, None] + tl.zeros_like(dots), tl.load(offset + rows)[:, None])
    return dots * tl.load(scale + columns)[None, :] + tl.load(bias + columns)[None, :]


@triton.jit
def use_tile(
    dots,  # [BLOCK_M, BLOCK_N] float32
    rows, columns, tile_n, unit, factor, offset, scale, bias, shift, winners, sums, n, V, n_groups, side_stride,
    TERMS: tl.constexpr, FIXED: tl.constexpr, RAGGED: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
    STATISTICS: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turn a tile of dot products into scores, and write its partial sums and its winners."""
    # Rows and columns past the end take the terms of the last one; their scores are dropped.
    safe_rows = tl.minimum(rows, n - 1)
    if TERMS:
        safe_columns = tl.minimum(columns, V - 1) if RAGGED else columns
        dots = read_out(dots, safe_rows, safe_columns, factor, offset, scale, bias)
    if STATISTICS:
        store_sums(dots, rows, columns, tile_n, shift, sums, n, V, n_groups // (4 * SPLITS))
    units = tl.load(unit + safe_rows)
    store_winners(
        dots, units, rows, columns, tile_n, winners, side_stride, n, V, n_groups,
        TOP, BOTTOM, FIXED, RAGGED, SPLITS, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def store_winners(
    scores,  # [BLOCK_M, BLOCK_N] float32
    unit,  # [BLOCK_M] float32, units a score
    rows,
    columns,
    tile_n,
    winners,  # [sides, n, 2, G] int32: best and second of each group; the top first
    side_stride,
    n,
    V,
    n_groups,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    FIXED: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the best and the second of each group of the tile. Columns past the end are the worst on either side."""
    local = tl.arange(0, BLOCK_N)
    place = (local % (BLOCK_N // SPLITS) // 8 * 2 + local % 2)[None, :]
    groups = tile_n * 4 * SPLITS + tl.arange(0, 4 * SPLITS)
    out = winners + rows.to(tl.int64)[:, None] * (2 * n_groups) + groups[None, :]
    inside = (rows < n)[:, None] & (groups >= 0)[None, :]
    if FIXED:
        sums = tl.fma(scores, unit[:, None] + tl.zeros_like(scores), tl.full(scores.shape, _MIDDLE, tl.float32))
        keys = sums.to(tl.int32, bitcast=True) * 64 + place
        low_keys = keys
        if RAGGED:
            there = (columns < V)[None, :]
            low_keys = tl.where(there, keys, _INT_MAX - place)
            keys = tl.where(there, keys, _INT_MIN | place)
    else:
        keys = (ordered_key(scores) & -64) | place
        there = (columns < V)[None, :] & (scores == scores)
        low_keys = tl.where(there, keys, _INT_MAX - place)
        keys = tl.where(there, keys, _INT_MIN | place)
    left, right = tl.split(tl.reshape(keys, (BLOCK_M, PARTS, BLOCK_N // 8 // PARTS, 4, 2)))
    # Reduce pairs first: a pair never needs more than its two registers.
    high, low = tl.maximum(left, right), tl.minimum(left, right)
    if TOP:
        best = tl.max(high, axis=2)
        # Keys within a group differ in their place, so masking the winner leaves exactly the others.
        second = tl.max(tl.where(high == best[:, :, None, :], low, high), axis=2)
        if SPLITS < PARTS:
            second = tl.maximum(tl.max(second, axis=1), tl.min(best, axis=1))
            best = tl.max(best, axis=1)
        tl.store(out, tl.reshape(best, (BLOCK_M, 4 * SPLITS)), mask=inside)
        tl.store(out + n_groups, tl.reshape(second, (BLOCK_M, 4 * SPLITS)), mask=inside)
        out += side_stride
    if BOTTOM:
        if RAGGED or not FIXED:
            left, right = tl.split(tl.reshape(low_keys, (BLOCK_M, PARTS, BLOCK_N // 8 // PARTS, 4, 2)))
            high, low = tl.maximum(left, right), tl.minimum(left, right)
        best = tl.min(low, axis=2)
        second = tl.min(tl.where(low == best[:, :, None, :], high, low), axis=2)
        if SPLITS < PARTS:
            second = tl.minimum(tl.min(second, axis=1), tl.max(best, axis=1))
            best = tl.min(best, axis=1)
        tl.store(out, tl.reshape(best, (BLOCK_M, 4 * SPLITS)), mask=inside)
        tl.store(out + n_groups, tl.reshape(second, (BLOCK_M, 4 * SPLITS)), mask=inside)
