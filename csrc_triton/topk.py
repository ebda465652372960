"""Fused matrix product and group winners: what is left of F Wᵀ is two numbers a side for each group of columns.

A tile's columns are split into four groups, {c : (c // 2) % 4 = q}: the columns that one thread of a tensor-core
accumulator holds in a row, so that finding a group's winners moves nothing between threads. A score becomes an integer
that orders like it, its low bits are replaced by its place in the group, and the two largest and the two smallest
integers of each group are written. The winners of 64 columns take 16 bytes, an eighth of the columns' bf16 scores.

What that loses, `select` and the caller make good: scores are rounded to 17 bits, and a group's third-best is hidden.
"""

# The types of a kernel's values and launches are Triton's own business.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, topk_config  # noqa: TID251
from .select import Candidates, select  # noqa: TID251

_INT_MIN = tl.constexpr(-(2**31))
# Takes the keys of -inf..inf to 0..0xFF000000 + a group, as unsigned, and what stands for nothing beyond them.
_SHIFT = tl.constexpr(0x7F800000 + 4096)


@triton.jit
def _ordered_key(scores):
    """int32 that order like the float32 scores (NaN beyond the infinities)."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _topk_kernel(
    F,  # [n, d]
    W,  # [V, d]
    bias,  # [V] float32
    scale,  # [V] float32
    offset,  # [n] float32
    top_keys,  # [n, 2, G] int32: best and second of each group
    bottom_keys,  # [n, 2, G] int32
    n,
    V,
    d,
    stride_f,
    stride_w,
    n_groups,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    # Programs walk down BAND row tiles before the next column tile, so that W's tiles are reused from the L2 cache.
    tiles_m = tl.cdiv(n, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    program = tl.program_id(0)
    first_m = (program // (BAND * tiles_n)) * BAND
    band = min(tiles_m - first_m, BAND)
    tile_m = first_m + (program % (BAND * tiles_n)) % band
    tile_n = (program % (BAND * tiles_n)) // band

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end read the last one; their scores are dropped below.
    safe_rows = tl.minimum(rows, n - 1)
    safe_columns = tl.minimum(columns, V - 1)
    depth = tl.arange(0, BLOCK_K)
    f_at = F + safe_rows.to(tl.int64)[:, None] * stride_f + depth[None, :]
    w_at = W + safe_columns.to(tl.int64)[None, :] * stride_w + depth[:, None]
    scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        if EVEN_K:
            f = tl.load(f_at)
            w = tl.load(w_at)
        else:
            f = tl.load(f_at, mask=depth[None, :] < d - start, other=0.0)
            w = tl.load(w_at, mask=depth[:, None] < d - start, other=0.0)
        scores = tl.dot(f, w, scores, input_precision="ieee")
        f_at += BLOCK_K
        w_at += BLOCK_K

    if HAS_OFFSET:
        scores += tl.load(offset + safe_rows)[:, None]
    if HAS_SCALE:
        scores *= tl.load(scale + safe_columns)[None, :]
    if HAS_BIAS:
        scores += tl.load(bias + safe_columns)[None, :]

    GROUP: tl.constexpr = BLOCK_N // 4
    local = tl.arange(0, BLOCK_N)
    place = ((local // 8) * 2 + local % 2)[None, :]
    keys = (_ordered_key(scores) & -GROUP) | place
    # NaN and columns past the end: below every number here, above every number once shifted.
    scores = tl.where((columns < V)[None, :], scores, float("nan"))
    keys = tl.where(scores == scores, keys, _INT_MIN | place)
    left, right = tl.split(tl.reshape(keys, (BLOCK_M, BLOCK_N // 8, 4, 2)))
    # Both sides are read off the same pairs, so that a pair never takes more than its two registers.
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


def topk(
    F: Tensor,
    W: Tensor,
    m: int,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    top: bool = True,
    bottom: bool = True,
    config: Config | None = None,
) -> tuple[Candidates | None, Candidates | None]:
    """The m best group winners of each row on each side of (F Wᵀ + offset) * scale + bias.

    Args:
        F: [n, d] float32, float16 or bfloat16, last axis contiguous, n ≥ 1.
        W: [V, d], same dtype and device, last axis contiguous.
        m: candidates to return, at most the number of winners.
        bias: [V] float32 or None.
        scale: [V] float32 or None.
        offset: [n] float32 or None.
        top: look for the largest.
        bottom: look for the smallest.
        config: the tile shape; None takes the one for the dtype and device.

    Returns:
        Candidates of the top and of the bottom (None where not asked for). Extra memory: 4 bytes for each winner,
        n · V / 8 bytes a side at 64 columns a group, and the candidates.
    """
    config = config or topk_config(F.dtype)
    n, d = F.shape
    V = len(W)
    tiles_n = triton.cdiv(V, config.block_n)
    n_groups = 4 * tiles_n
    # A side that is off gets a pointer that the kernel never follows.
    keys = [torch.empty((n if on else 1, 2, n_groups), dtype=torch.int32, device=F.device) for on in (top, bottom)]
    with torch.cuda.device_of(F):
        _topk_kernel[(triton.cdiv(n, config.block_m) * tiles_n,)](
            F,
            W,
            F if bias is None else bias,
            F if scale is None else scale,
            F if offset is None else offset,
            *keys,
            n,
            V,
            d,
            F.stride(0),
            W.stride(0),
            n_groups,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_OFFSET=offset is not None,
            TOP=top,
            BOTTOM=bottom,
            EVEN_K=d % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BAND=8,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    sides = zip((top, bottom), keys, (True, False), strict=True)
    best, worst = (select(k, m, V, config.group, largest=largest) if on else None for on, k, largest in sides)
    return best, worst
