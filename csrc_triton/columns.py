"""Preparation of W and the terms, once a call: the operand of the pass, bounds, columns set apart.

Columns that are not finite, or twice as long as all but 32, would spoil the bounds of all others: the pass sees zeros
in their place, and every row scores them exactly. One launch reads W for norms and largest elements; where the operand
is not W itself, a second one reads W again and writes it.
"""

# pyright does not know the types of a kernel's values and launches.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.configs import INTERPRETED
from csrc_triton.finish import MAX_APART
from csrc_triton.rows import Columns

ROWS = 256 if INTERPRETED else 16
"""Rows of W in a program; the interpreter's time goes by programs."""
BLOCK = 128
"""Elements of d read at a time."""
NUM_WARPS = 4


@triton.jit
def _measure_kernel(
    W,  # [V, d]
    norms,  # [V] float32
    peaks,  # [V] float32
    V,
    d,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm and largest element of each row; NaN where it holds one."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w_at = W + tl.minimum(rows, V - 1).to(tl.int64)[:, None] * stride
    at = tl.arange(0, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, d, BLOCK):
        w = tl.load(w_at + (start + at)[None, :], mask=(at < d - start)[None, :], other=0.0).to(tl.float32)
        squares += w * w
        largest = tl.maximum(largest, tl.abs(w))
    tl.store(norms + rows, tl.sqrt(tl.sum(squares, axis=1)), mask=rows < V)
    tl.store(peaks + rows, tl.max(largest, axis=1), mask=rows < V)


@triton.jit
def _narrow_kernel(
    W,  # [V, d]
    kept,  # [V] bool
    narrow,  # [V, D]
    errors,  # [V] float32
    V,
    d,
    D,
    stride,
    up,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the rows that are kept, times up and rounded to float16 if SCALED, and how far rounding moves them."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(rows, V - 1).to(tl.int64)
    keep = tl.load(kept + safe).to(tl.int1)[:, None]
    at = tl.arange(0, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        inside = (at < d - start)[None, :] & keep
        w = tl.load(W + safe[:, None] * stride + (start + at)[None, :], mask=inside, other=0.0)
        if SCALED:
            wide = w.to(tl.float32) * up
            w = wide.to(tl.float16)
            difference = wide - w.to(tl.float32)
            squares += difference * difference
        there = (rows < V)[:, None] & (at < D - start)[None, :]
        tl.store(narrow + safe[:, None] * D + (start + at)[None, :], w, mask=there)
    tl.store(errors + rows, tl.sqrt(tl.sum(squares, axis=1)), mask=rows < V)


class Prepared(NamedTuple):
    """W and the terms, prepared for a call."""

    W: Tensor
    """[V, D] operand of the pass, D a multiple of 16; columns set apart are zeros."""
    bounds: Columns
    scale: Tensor | None
    """[V] float32 with terms."""
    bias: Tensor | None
    apart: Tensor | None
    """[A] int32."""
    fixed: bool
    mean: tuple[Tensor, float, float] | None
    """With statistics: mean row of W, mean scale, mean bias."""

    @property
    def n_apart(self) -> int:
        """Columns set apart."""
        return 0 if self.apart is None else len(self.apart)


def prepare(
    W: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    scaled: bool,
    terms: bool = False,
    statistics: bool = False,
) -> Prepared | None:
    """Read W once or twice and write the operand, once a call.

    Args:
        W: [V, d], last axis contiguous.
        dtype: of the operand.
        bias: [V] or None.
        scale: [V] or None.
        scaled: whether W is rounded to float16 after a power of two.
        terms: whether the epilogue applies terms: ones and zeros stand for a scale and a bias that is None.
        statistics: whether sums over each row are asked for, which no column may be missing from.

    Returns:
        None where too much of W or the terms is not finite, or with statistics anything.
    """
    device, V = W.device, len(W)
    scale = None if scale is None else scale.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    norms, peaks = torch.empty(2, V, dtype=torch.float32, device=device)
    with torch.cuda.device_of(W):
        _measure_kernel[(triton.cdiv(V, ROWS),)](
            W, norms, peaks, V, W.shape[1], W.stride(0), ROWS=ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    norms = norms if scale is None else norms * scale.abs()
    found = _set_apart(norms, bias)
    if found is None or statistics and found.ids is not None:
        return None
    ids, fixed = found
    narrow, error, exponent = _narrow(W, dtype, scale, ids, peaks if scaled else None)
    if ids is not None:
        norms = norms.index_fill(0, ids, 0.0)
        bias = None if bias is None else bias.index_fill(0, ids, 0.0)
        scale = None if scale is None else scale.index_fill(0, ids, 0.0)
    usual_bias = 0.0
    if bias is not None:
        sizes = bias[bias.isfinite()].abs()
        usual_bias = float(sizes.max())
        # With a few huge biases the units of the keys would be too coarse for the other scores.
        fixed = fixed and usual_bias <= 4096 * max(float(sizes.median()), float(norms.max()))
    largest_scale = 1.0 if scale is None else float(scale.abs().max())
    # Squares of numbers below 2^-75 vanish in float32, so a norm may be short by so much.
    vanished = math.sqrt(W.shape[1]) * 2.0**-63 * largest_scale
    longest = (float(norms.max()) * 1.001 + vanished) * 2.0**exponent
    bounds = Columns(longest, error, exponent, largest_scale, usual_bias)
    mean = None
    if statistics:
        means = [1.0 if scale is None else float(scale.mean()), 0.0 if bias is None else float(bias.mean())]
        mean = (W.mean(0, dtype=torch.float32), means[0], means[1])
    if terms:
        scale = torch.ones(V, device=device) if scale is None else scale
        bias = torch.zeros(V, device=device) if bias is None else bias
    return Prepared(narrow, bounds, scale, bias, None if ids is None else ids.int(), fixed, mean)


class _Apart(NamedTuple):
    ids: Tensor | None
    """[A] int64, 0 < A ≤ MAX_APART."""
    fixed: bool
    """Whether what remains can have fixed-point keys."""


def _set_apart(norms: Tensor, bias: Tensor | None) -> _Apart | None:
    """Columns that are set apart; None where there are too many. One host synchronisation, or two."""
    V = len(norms)
    usual = norms.nan_to_num(math.inf, math.inf).topk(min(MAX_APART + 1, V)).values[-1]
    apart = ~(norms <= 2 * usual) if V > MAX_APART else ~norms.isfinite()
    broken = torch.zeros_like(apart) if bias is None else ~bias.isfinite()
    sizes = torch.stack([apart.sum(), broken.sum(), (apart | broken).sum(), usual.isfinite().long()])
    n_apart, n_broken, n_both, finite = (int(x) for x in sizes.tolist())
    if V > MAX_APART and not finite or n_apart > MAX_APART:
        return None
    fixed = n_both <= MAX_APART
    if not fixed and n_broken == V:
        return None
    chosen = apart | broken if fixed else apart
    return _Apart(chosen.nonzero().squeeze(1) if (n_both if fixed else n_apart) else None, fixed)


def _narrow(
    W: Tensor, dtype: torch.dtype, scale: Tensor | None, apart: Tensor | None, peaks: Tensor | None
) -> tuple[Tensor, float, int]:
    """The operand of the pass, the largest |scale| ‖w - w'‖ of its rows, and the exponent that it was multiplied by.

    With ``peaks``, the largest element of each row [V], W is rounded to float16 after a power of two.
    """
    V, d = W.shape
    if peaks is None and apart is None and d % 16 == 0:
        W = W.to(dtype).contiguous()
        return (W if W.data_ptr() % 16 == 0 else W.clone()), 0.0, 0
    kept = torch.ones(V, dtype=torch.bool, device=W.device)
    if apart is not None:
        kept[apart] = False
    peak = 0.0 if peaks is None else float(peaks.where(kept, 0).max())
    exponent = max(-100, min(100, 15 - math.frexp(peak)[1])) if peak else 0
    narrow = torch.empty(V, d + -d % 16, dtype=dtype, device=W.device)
    errors = torch.empty(V, dtype=torch.float32, device=W.device)
    with torch.cuda.device_of(W):
        _narrow_kernel[(triton.cdiv(V, ROWS),)](
            W,
            kept,
            narrow,
            errors,
            V,
            d,
            narrow.shape[1],
            W.stride(0),
            2.0**exponent,
            SCALED=peaks is not None,
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    sizes = torch.ones((), device=W.device) if scale is None else scale.abs().nan_to_num(0, 0)
    error, largest = torch.stack([(errors * sizes).max(), sizes.max()]).tolist()
    return narrow, error * 1.001 + largest * math.sqrt(d) * 2.0**-63, exponent
