"""Exact scores of finalists: inner products at given columns, in float32 without tensor cores."""

# The types of a kernel's values and launches are Triton's own business.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.epilogue import read_out

BLOCK_C = 16
BLOCK_K = 128
NUM_WARPS = 4


@triton.jit
def _rescore_kernel(
    F,  # [r, d]
    W,  # [V, d]
    ids,  # [r, m] int64
    bias,  # [V] float32
    scale,  # [V] float32
    offset,  # [r] float32
    scores,  # [r, m] float32
    m,
    V,
    d,
    stride_f,
    stride_w,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.load(ids + row * m + at, mask=at < m, other=0)
    there = columns < V
    columns = tl.where(there, columns, 0)
    depth = tl.arange(0, BLOCK_K)
    dots = tl.zeros((1, BLOCK_C), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        inside = depth < d - start
        f = tl.load(F + row * stride_f + start + depth, mask=inside, other=0.0).to(tl.float32)
        w_at = W + columns[:, None] * stride_w + start + depth[None, :]
        w = tl.load(w_at, mask=inside[None, :] & there[:, None], other=0.0).to(tl.float32)
        dots += tl.sum(w * f[None, :], axis=1)[None, :]
    rows = row + tl.zeros((1,), dtype=tl.int64)
    found = read_out(dots, rows, columns, bias, scale, offset, HAS_BIAS, HAS_SCALE, HAS_OFFSET)
    found = tl.where(there[None, :], found, float("nan"))
    out = scores + rows[:, None] * m + at[None, :]
    tl.store(out, found, mask=(at < m)[None, :])


def rescore(
    F: Tensor,
    W: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Scores (⟨f, w⟩ + offset) * scale + bias of given columns.

    Args:
        F: [r, d] float32, float16 or bfloat16, last axis contiguous.
        W: [V, d], same dtype and device, last axis contiguous.
        ids: [r, m] int64 rows of W; NaN comes back for those ≥ V.
        bias: [V] float32 or None.
        scale: [V] float32 or None.
        offset: [r] float32 or None.

    Returns:
        [r, m] float32; products exact, sums in float32.
    """
    r, m = ids.shape
    scores = torch.empty(r, m, dtype=torch.float32, device=F.device)
    if not scores.numel():
        return scores
    with torch.cuda.device_of(F):
        _rescore_kernel[(r, triton.cdiv(m, BLOCK_C))](
            F,
            W,
            ids.contiguous(),
            *(F if x is None else x for x in (bias, scale, offset)),
            scores,
            m,
            len(W),
            F.shape[1],
            F.stride(0),
            W.stride(0),
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            HAS_OFFSET=offset is not None,
            BLOCK_C=BLOCK_C,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
        )
    return scores
