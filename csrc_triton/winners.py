"""Group winners of scores that lie in memory: the second half of the alternative to the fused kernel.

A library product writes a bounded chunk of dot products; one pass over them does for both sides what the fused kernel
does in registers, by the same `epilogue`.
"""

# The types of a kernel's values and launches are Triton's own business.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.epilogue import read_out, store_sums, store_winners
from csrc_triton.topk import Winners, room_for

CHUNK_ELEMENTS = 1 << 28
"""Dot products that a library writes at a time (1 GiB)."""
BLOCK_M = 16
BLOCK_N = 256
NUM_WARPS = 4


@triton.jit
def _winners_kernel(
    dots,  # [n, V]
    bias,  # [V] float32
    scale,  # [V] float32
    offset,  # [n] float32
    shift,  # [n] float32
    top_keys,  # [n, 2, G] int32
    bottom_keys,  # [n, 2, G] int32
    sums,  # [n, 7, tiles_n] float32
    n,
    V,
    stride,
    n_groups,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile_n = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows, safe_columns = tl.minimum(rows, n - 1), tl.minimum(columns, V - 1)
    scores = tl.load(dots + safe_rows.to(tl.int64)[:, None] * stride + safe_columns[None, :]).to(tl.float32)
    scores = read_out(scores, safe_rows, safe_columns, bias, scale, offset, HAS_BIAS, HAS_SCALE, HAS_OFFSET)
    if STATISTICS:
        store_sums(scores, rows, columns, tile_n, shift, sums, n, V, tl.cdiv(V, BLOCK_N))
    store_winners(scores, rows, columns, tile_n, top_keys, bottom_keys, n, V, n_groups, TOP, BOTTOM, BLOCK_M, BLOCK_N)


def product(F: Tensor, W: Tensor) -> Tensor:
    """F Wᵀ in float32 by the device's library, [n, V]."""
    if F.dtype == torch.float32:
        return F @ W.T
    if F.device.type == "cuda":
        return torch.mm(F, W.T, out_dtype=torch.float32)
    return F.float() @ W.float().T


def winners(
    dots: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    shift: Tensor | None = None,
    top: bool = True,
    bottom: bool = True,
) -> Winners:
    """Group winners of (dots + offset) * scale + bias; groups are those of a tile of BLOCK_N columns.

    Args:
        dots: [n, V] float32, float16 or bfloat16, last axis contiguous, n ≥ 1.
        bias: [V] float32 or None.
        scale: [V] float32 or None.
        offset: [n] float32 or None.
        shift: [n] float32 asks for partial sums about it.
        top: look for the largest.
        bottom: look for the smallest.
    """
    n, V = dots.shape
    tiles_n = triton.cdiv(V, BLOCK_N)
    found, arguments = room_for(dots, n, tiles_n, bias, scale, offset, shift, top, bottom)
    with torch.cuda.device_of(dots):
        _winners_kernel[(tiles_n, triton.cdiv(n, BLOCK_M))](
            dots,
            *arguments,
            n,
            V,
            dots.stride(0),
            4 * tiles_n,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_OFFSET=offset is not None,
            TOP=top,
            BOTTOM=bottom,
            STATISTICS=shift is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return found
