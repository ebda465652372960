"""Fused matrix product and group winners: of F Wᵀ, two numbers a side are kept for each group of columns.

A persistent grid computes the tiles in an order that finds W's tiles in the L2 cache; operands come through TMA
descriptors where the target has them. `epilogue` reduces each tile.
"""

# pyright does not know the types of a kernel's values and launches.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.configs import Config, light, persistent, programs_of, uses_tma
from csrc_triton.epilogue import use_tile
from csrc_triton.job import Job


@triton.jit
def _tile(
    tile,
    F,
    W,
    unit,
    factor,
    offset,
    scale,
    bias,
    shift,
    winners,
    sums,
    n,
    V,
    d,
    stride_f,
    stride_w,
    n_groups,
    side_stride,
    first_n,
    tiles_n,
    TERMS: tl.constexpr,
    FIXED: tl.constexpr,
    RAGGED: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    STATISTICS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile, from the operands to the winners."""
    tiles_m = tl.cdiv(n, BLOCK_M)
    # Tiles go down BAND row tiles before the next column tile, so that W's tiles are reused from the L2 cache.
    first_m = (tile // (BAND * tiles_n)) * BAND
    band = min(tiles_m - first_m, BAND)
    tile_m = first_m + (tile % (BAND * tiles_n)) % band
    tile_n = first_n + (tile % (BAND * tiles_n)) // band
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if USE_TMA:
        for start in range(0, d, BLOCK_K):
            f = F.load([tile_m * BLOCK_M, start])
            w = W.load([tile_n * BLOCK_N, start])
            scores = tl.dot(f, w.T, scores)
    else:
        # Rows and columns past the end read the last one (TMA: zeros).
        safe_rows = tl.minimum(rows, n - 1)
        safe_columns = tl.minimum(columns, V - 1) if RAGGED else columns
        depth = tl.arange(0, BLOCK_K)
        f_at = F + safe_rows.to(tl.int64)[:, None] * stride_f + depth[None, :]
        w_at = W + safe_columns.to(tl.int64)[None, :] * stride_w + depth[:, None]
        for start in range(0, d, BLOCK_K):
            if EVEN_K:
                f = tl.load(f_at)
                w = tl.load(w_at)
            else:
                f = tl.load(f_at, mask=depth[None, :] < d - start, other=0.0)
                w = tl.load(w_at, mask=depth[:, None] < d - start, other=0.0)
            scores = tl.dot(f, w, scores)
            f_at += BLOCK_K
            w_at += BLOCK_K
    use_tile(
        scores, rows, columns, tile_n, unit, factor, offset, scale, bias, shift, winners, sums, n, V, n_groups,
        side_stride, TERMS, FIXED, RAGGED, TOP, BOTTOM, STATISTICS, SPLITS, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _topk_kernel(
    F,  # [n, d], a pointer or a TMA descriptor
    W,  # [V, d], a pointer or a TMA descriptor
    unit,  # [n] float32
    factor,  # [n] float32
    offset,  # [n] float32
    scale,  # [V] float32
    bias,  # [V] float32
    shift,  # [n] float32
    winners,  # [sides, n, 2, G] int32
    sums,  # [n, 7, G / 4] float32
    n,
    V,
    d,
    stride_f,
    stride_w,
    n_groups,
    side_stride,
    first_n,  # the first column tile
    tiles_n,  # how many column tiles
    TERMS: tl.constexpr,
    FIXED: tl.constexpr,
    RAGGED: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    STATISTICS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    if PERSISTENT:
        n_tiles = tl.cdiv(n, BLOCK_M) * tiles_n
        for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):  # pyright: ignore
            _tile(
                tile, F, W, unit, factor, offset, scale, bias, shift, winners, sums, n, V, d, stride_f, stride_w,
                n_groups, side_stride, first_n, tiles_n, TERMS, FIXED, RAGGED, TOP, BOTTOM, STATISTICS, SPLITS, PARTS,
                EVEN_K, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K, BAND,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _tile(
            tile, F, W, unit, factor, offset, scale, bias, shift, winners, sums, n, V, d, stride_f, stride_w,
            n_groups, side_stride, first_n, tiles_n, TERMS, FIXED, RAGGED, TOP, BOTTOM, STATISTICS, SPLITS, PARTS,
            EVEN_K, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K, BAND,
        )  # fmt: skip


def topk(F: Tensor, W: Tensor, job: Job, config: Config) -> None:
    """Write the group winners of each row of scores F Wᵀ: two launches, one where V is a multiple of a tile.

    Args:
        F: [n, d] float16 or bfloat16, last axis contiguous, n ≥ 1.
        W: [V, d], same dtype and device, last axis contiguous.
        job: how the dot products are scored; its groups are ``config.groups(V)``.
        config: the tile.
    """
    whole, rest = divmod(len(W), config.block_n)
    if whole:
        _launch(F, W, job, config if job.keys.fixed else light(config), range(whole), ragged=False)
    if rest:
        _launch(F, W, job, light(config), range(whole, whole + 1), ragged=True)


def _launch(F: Tensor, W: Tensor, job: Job, config: Config, tiles: range, *, ragged: bool) -> None:
    """One launch over some column tiles."""
    n, d = F.shape
    total = triton.cdiv(n, config.block_m) * len(tiles)
    tma = uses_tma(F, W)
    loops = persistent(tma=tma, terms=job.terms is not None, plain=job.keys.fixed and not ragged)
    operands: tuple[Any, Any] = (F, W)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        operands = (
            TensorDescriptor.from_tensor(F, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(W, [config.block_n, config.block_k]),
        )
    with torch.cuda.device_of(F):
        _topk_kernel[(min(total, programs_of(F, config)) if loops else total,)](
            *operands,
            *job.pointers(),
            n,
            len(W),
            d,
            F.stride(0),
            W.stride(0),
            job.winners.shape[3],
            job.winners.stride(0),
            tiles.start,
            len(tiles),
            **job.flags(),
            RAGGED=ragged,
            SPLITS=config.splits,
            PARTS=max(config.splits, config.parts),
            EVEN_K=d % config.block_k == 0,
            USE_TMA=tma,
            PERSISTENT=loops,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BAND=8,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
