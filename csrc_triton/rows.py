"""Preparation of rows of F, once a block: rounded operands, units of the keys, error bounds.

One program reads a row twice, once for its largest element, once for everything else. float32 rows become float16
after a multiplication by a power of two that brings their largest element to 2^14 … 2^15: an eighth of bfloat16's
rounding error. Norms are taken of the scaled row, so that no square over- or underflows.
"""

# pyright does not know the types of a kernel's values and launches.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.epilogue import UNITS

BLOCK = 1024
NUM_WARPS = 4
UNIT = 2.0**-24
"""Relative rounding error of float32."""


class Columns(NamedTuple):
    """Norms and errors of W and the terms that the rows' bounds need, measured once a call."""

    norm: float
    """max |scale| ‖w‖, in units of the pass: 2^exponent times as long as W's rows."""
    error: float
    """max |scale| ‖w - w'‖, w' as the pass sees it, in the same units."""
    exponent: int
    """W is multiplied by 2^exponent before it is rounded."""
    scale: float
    """max |scale|, 1 without."""
    bias: float
    """max |bias| of finite ones, 0 without."""


class Rows(NamedTuple):
    """Operand, units and bounds of each row; [n] float32 but the operand."""

    narrow: Tensor
    """[n, D] operand of the pass, D ≥ d a multiple of 16."""
    unit: Tensor
    """Units of the keys, per number that the epilogue makes a key of (a dot product, or a score with terms)."""
    factor: Tensor
    """Scores per dot product: 2^-(exponents)."""
    per_score: Tensor
    """Units of the keys per score."""
    error: Tensor
    """No score of the pass is farther than this from the one that is rescored; inf or NaN where nothing is known."""
    shift: Tensor | None
    """About the mean score of the row."""


@triton.jit
def _power(exponent):
    """2^exponent for -126 ≤ exponent ≤ 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rows_kernel(
    F,  # [n, d]
    narrow,  # [n, D]
    mean,  # [d] float32, mean row of W
    offset,  # [n] float32
    unit,  # [n] float32
    factor,  # [n] float32
    per_score,  # [n] float32
    error,  # [n] float32
    shift,  # [n] float32
    d,
    D,
    stride,
    w_norm,
    w_error,
    w_power,  # 2^-exponent of W
    scale_max,
    bias_max,
    scale_mean,
    bias_mean,
    summing,  # relative error of the pass's sums
    rescoring,  # relative error of the exact scores' sums
    lost,  # absolute error by underflow
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    TERMS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    peaks = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, d, BLOCK):
        f = tl.load(F + row * stride + start + at, mask=at < d - start, other=0.0).to(tl.float32)
        peaks = tl.maximum(peaks, tl.abs(f))
    peak = tl.max(peaks, axis=0)
    exponent = tl.minimum(tl.maximum(141 - (peak.to(tl.int32, bitcast=True) >> 23), -113), 126)
    exponent = tl.where(peak == 0.0, 0, exponent)
    up, down = _power(exponent), _power(-exponent)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    errors = tl.zeros((BLOCK,), dtype=tl.float32)
    means = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        f = tl.load(F + row * stride + start + at, mask=at < d - start, other=0.0)
        x = f.to(tl.float32) * up
        squares += x * x
        if SCALED:
            f = x.to(tl.float16)
            difference = x - f.to(tl.float32)
            errors += difference * difference
        if COPY:
            tl.store(narrow + row * D + start + at, f, mask=at < D - start)
        if SHIFT:
            means += x * tl.load(mean + start + at, mask=at < d - start, other=0.0)
    to_score = tl.full((), 1.0, tl.float32)
    norm, rounded = tl.sqrt(tl.sum(squares, axis=0)) * 1.001, tl.sqrt(tl.sum(errors, axis=0)) * 1.001
    if SCALED:
        to_score = down * w_power
    else:
        norm, rounded = norm * down, rounded * down
    seen, w_seen = norm + rounded, w_norm + w_error
    reach = 1.01 * seen * w_seen
    dots = rounded * w_norm + seen * w_error + summing * seen * w_seen + rescoring * norm * w_norm
    size = norm * w_norm * to_score
    if TERMS:
        added = tl.abs(tl.load(offset + row)) * scale_max + bias_max
        size += added
        reach = reach * to_score + added
    units = UNITS / tl.maximum(reach, 1e-30)
    tl.store(unit + row, units)
    tl.store(factor + row, to_score)
    tl.store(per_score + row, units if TERMS else units / to_score)
    # A few roundings of the terms on either side.
    tl.store(error + row, 1.001 * (dots * to_score + 6e-7 * size) + lost)
    if SHIFT:
        about = tl.sum(means, axis=0) * down
        if TERMS:
            about += tl.load(offset + row)
        tl.store(shift + row, about * scale_mean + bias_mean)


def rows_of(
    F: Tensor,
    columns: Columns,
    *,
    scaled: bool = False,
    offset: Tensor | None = None,
    mean: tuple[Tensor, float, float] | None = None,
) -> Rows:
    """Prepare a block of rows for its other launches, in one launch.

    Args:
        F: [n, d] float32, float16 or bfloat16, last axis contiguous, n ≥ 1.
        columns: of W and the terms.
        scaled: round to float16 after a power of two; else the pass takes F's own dtype.
        offset: [n] float32 with terms (zeros where there is none), None without any.
        mean: asks for shift: mean row of W [d] float32, mean scale, mean bias.
    """
    n, d = F.shape
    padded = d + -d % 16
    # TMA wants rows that do not overlap (those of an expanded tensor do), in multiples of 16 bytes.
    copy = scaled or padded > d or F.stride(0) < d or F.stride(0) % 16 > 0 or F.data_ptr() % 16 > 0
    dtype = torch.float16 if scaled else F.dtype
    narrow = torch.empty(n, padded, dtype=dtype, device=F.device) if copy else F
    unit, factor, per_score, error, shift = torch.empty(5, n, dtype=torch.float32, device=F.device).unbind()
    # Exact scores: 128 lanes by fma, then their sum in any order (`csrc_triton.finish`).
    depth = triton.cdiv(d, 128) + 128
    with torch.cuda.device_of(F):
        _rows_kernel[(n,)](
            F,
            narrow,
            F if mean is None else mean[0],
            F if offset is None else offset,
            unit,
            factor,
            per_score,
            error,
            shift,
            d,
            padded,
            F.stride(0),
            columns.norm,
            columns.error,
            2.0**-columns.exponent,
            columns.scale,
            columns.bias,
            *((0.0, 0.0) if mean is None else mean[1:]),
            # Twice the textbook bound for any order of summation: tensor cores truncate where float32 rounds.
            2 * (d + 8) * UNIT,
            depth * UNIT,
            2 * max(1e-35, (d + 32) * 2.0**-125) * max(1.0, columns.scale),
            COPY=copy,
            SCALED=scaled,
            TERMS=offset is not None,
            SHIFT=mean is not None,
            UNITS=0.98 * UNITS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return Rows(narrow, unit, factor, per_score, error, None if mean is None else shift)
