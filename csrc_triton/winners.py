"""Group winners of scores that lie in memory: the second half of the alternative to the fused kernel.

A library product writes a bounded chunk of dot products; one pass over them does for both sides what the fused kernel
does in registers, by the same `epilogue`.
"""

# pyright does not know the types of a kernel's values and launches.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.configs import Config
from csrc_triton.epilogue import use_tile
from csrc_triton.job import Job

CHUNK_ELEMENTS = 1 << 28
"""Dot products that a library writes at a time (1 GiB)."""
TILE = Config(16, 256, 0, 4, 1)
"""Reads no operands: no block_k."""


@triton.jit
def _winners_kernel(
    dots,  # [n, V]
    unit,  # [n] float32
    factor,  # [n] float32
    offset,  # [n] float32
    scale,  # [V] float32
    bias,  # [V] float32
    shift,  # [n] float32
    winners,  # [sides, N, 2, G] int32
    sums,  # [n, 7, tiles_n] float32
    n,
    V,
    stride,
    n_groups,
    side_stride,
    TERMS: tl.constexpr,
    FIXED: tl.constexpr,
    RAGGED: tl.constexpr,
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
    use_tile(
        scores, rows, columns, tile_n, unit, factor, offset, scale, bias, shift, winners, sums, n, V, n_groups,
        side_stride, TERMS, FIXED, RAGGED, TOP, BOTTOM, STATISTICS, 1, 1, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def product(F: Tensor, W: Tensor) -> Tensor:
    """F Wᵀ in float32 by the device's library, [n, V]."""
    if F.dtype == torch.float32:
        return F @ W.T
    if F.device.type == "cuda" and not torch.version.hip:
        return torch.mm(F, W.T, out_dtype=torch.float32)
    # ROCm's product has no other output dtype than its operands'.
    return F.float() @ W.float().T


def winners_of(dots: Tensor, job: Job) -> None:
    """Write the group winners of scores that lie in memory; groups are those of TILE.

    Args:
        dots: [n, V] float32, float16 or bfloat16, last axis contiguous, n ≥ 1.
        job: how they are scored, and where their winners go.
    """
    n, V = dots.shape
    with torch.cuda.device_of(dots):
        _winners_kernel[(triton.cdiv(V, TILE.block_n), triton.cdiv(n, TILE.block_m))](
            dots,
            *job.pointers(),
            n,
            V,
            dots.stride(0),
            job.winners.shape[3],
            job.winners.stride(0),
            **job.flags(),
            RAGGED=V % TILE.block_n > 0,
            BLOCK_M=TILE.block_m,
            BLOCK_N=TILE.block_n,
            num_warps=TILE.num_warps,
        )
