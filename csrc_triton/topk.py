"""Fused matrix product and group winners: what is left of F Wᵀ is two numbers a side for each group of columns.

The product's tiles are worked off by a persistent grid in an order that finds W's tiles in the L2 cache; operands come
through TMA descriptors where the target has them. `epilogue` says what happens to a tile.
"""

# The types of a kernel's values and launches are Triton's own business.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.configs import Config, persistent, programs_of, uses_tma
from csrc_triton.epilogue import N_SUMS, read_out, store_sums, store_winners


class Winners(NamedTuple):
    """What is left of a block of rows of scores."""

    top: Tensor | None
    """[n, 2, G] int32 keys: best and second of each group; None for a side that is off."""
    bottom: Tensor | None
    """[n, 2, G] int32."""
    sums: Tensor | None
    """[n, 7, tiles] float32 partial sums (`epilogue.N_SUMS`), or None."""


@triton.jit
def _tile(
    tile,
    F,
    W,
    bias,
    scale,
    offset,
    shift,
    top_keys,
    bottom_keys,
    sums,
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
    STATISTICS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile, from the operands to the winners."""
    tiles_m = tl.cdiv(n, BLOCK_M)
    tiles_n = tl.cdiv(V, BLOCK_N)
    # Tiles go down BAND row tiles before the next column tile, so that W's tiles are reused from the L2 cache.
    first_m = (tile // (BAND * tiles_n)) * BAND
    band = min(tiles_m - first_m, BAND)
    tile_m = first_m + (tile % (BAND * tiles_n)) % band
    tile_n = (tile % (BAND * tiles_n)) // band
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end read the last one (TMA: zeros); their scores are dropped.
    safe_rows = tl.minimum(rows, n - 1)
    safe_columns = tl.minimum(columns, V - 1)
    scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if USE_TMA:
        for start in range(0, d, BLOCK_K):
            f = F.load([tile_m * BLOCK_M, start])
            w = W.load([tile_n * BLOCK_N, start])
            scores = tl.dot(f, w.T, scores, input_precision=INPUT_PRECISION)
    else:
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
            scores = tl.dot(f, w, scores, input_precision=INPUT_PRECISION)
            f_at += BLOCK_K
            w_at += BLOCK_K
    scores = read_out(scores, safe_rows, safe_columns, bias, scale, offset, HAS_BIAS, HAS_SCALE, HAS_OFFSET)
    if STATISTICS:
        store_sums(scores, rows, columns, tile_n, shift, sums, n, V, tiles_n)
    store_winners(scores, rows, columns, tile_n, top_keys, bottom_keys, n, V, n_groups, TOP, BOTTOM, BLOCK_M, BLOCK_N)


@triton.jit
def _topk_kernel(
    F,  # [n, d], a pointer or a TMA descriptor
    W,  # [V, d], a pointer or a TMA descriptor
    bias,  # [V] float32
    scale,  # [V] float32
    offset,  # [n] float32
    shift,  # [n] float32
    top_keys,  # [n, 2, G] int32
    bottom_keys,  # [n, 2, G] int32
    sums,  # [n, 7, tiles_n] float32
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
    STATISTICS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    if PERSISTENT:
        n_tiles = tl.cdiv(n, BLOCK_M) * tl.cdiv(V, BLOCK_N)
        for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):  # pyright: ignore
            _tile(
                tile, F, W, bias, scale, offset, shift, top_keys, bottom_keys, sums, n, V, d, stride_f, stride_w,
                n_groups, HAS_BIAS, HAS_SCALE, HAS_OFFSET, TOP, BOTTOM, STATISTICS, EVEN_K, USE_TMA, INPUT_PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, BAND,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _tile(
            tile, F, W, bias, scale, offset, shift, top_keys, bottom_keys, sums, n, V, d, stride_f, stride_w,
            n_groups, HAS_BIAS, HAS_SCALE, HAS_OFFSET, TOP, BOTTOM, STATISTICS, EVEN_K, USE_TMA, INPUT_PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, BAND,
        )  # fmt: skip


def topk(
    F: Tensor,
    W: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    shift: Tensor | None = None,
    top: bool = True,
    bottom: bool = True,
    config: Config,
) -> Winners:
    """Group winners of each row on each side of (F Wᵀ + offset) * scale + bias.

    Args:
        F: [n, d] float32, float16 or bfloat16, last axis contiguous, n ≥ 1.
        W: [V, d], same dtype and device, last axis contiguous.
        bias: [V] float32 or None.
        scale: [V] float32 or None.
        offset: [n] float32 or None.
        shift: [n] float32 asks for partial sums about it.
        top: look for the largest.
        bottom: look for the smallest.
        config: the tile.

    Returns:
        Winners. Memory: 4 bytes for each winner, n · V / 8 bytes a side at 64 columns a group; 28 bytes a row and tile
        for the sums.
    """
    n, d = F.shape
    V = len(W)
    tiles_m, tiles_n = triton.cdiv(n, config.block_m), triton.cdiv(V, config.block_n)
    winners, arguments = room_for(F, n, tiles_n, bias, scale, offset, shift, top, bottom)
    tma = uses_tma(F, W, config)
    terms = any(x is not None for x in (bias, scale, offset))
    loops = persistent(tma=tma, terms=terms, statistics=shift is not None)
    programs = min(tiles_m * tiles_n, programs_of(F, config)) if loops else tiles_m * tiles_n
    operands: tuple[Any, Any] = (F, W)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        operands = (
            TensorDescriptor.from_tensor(F, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(W, [config.block_n, config.block_k]),
        )
    with torch.cuda.device_of(F):
        _topk_kernel[(programs,)](
            *operands,
            *arguments,
            n,
            V,
            d,
            F.stride(0),
            W.stride(0),
            4 * tiles_n,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_OFFSET=offset is not None,
            TOP=top,
            BOTTOM=bottom,
            STATISTICS=shift is not None,
            EVEN_K=d % config.block_k == 0,
            USE_TMA=tma,
            PERSISTENT=loops,
            INPUT_PRECISION=config.input_precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BAND=8,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return winners


def room_for(
    F: Tensor,
    n: int,
    tiles_n: int,
    bias: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    shift: Tensor | None,
    top: bool,
    bottom: bool,
) -> tuple[Winners, list[Tensor]]:
    """Room for the winners, and the kernels' pointer arguments; what is off gets a pointer that is never followed."""
    keys = [
        torch.empty((n, 2, 4 * tiles_n), dtype=torch.int32, device=F.device) if on else None for on in (top, bottom)
    ]
    sums = None if shift is None else torch.empty((n, N_SUMS, tiles_n), dtype=torch.float32, device=F.device)
    pointers = [F if x is None else x for x in (bias, scale, offset, shift, *keys, sums)]
    return Winners(keys[0], keys[1], sums), pointers
