"""The second stage: of each row's group winners, those that can belong to the k best, and the best of the others.

If t is the k-th best key and e the error bound of the pass, k columns score at least t - e exactly, so a column whose
key is below t - 2e cannot be among the k best: the candidates are the winners from t - 2e on, as many as the row needs.
Groups are joined to sets {s, s + BLOCK, s + 2 BLOCK, …} by their best keys, and t is bisected over the sets: k sets
hold k columns. The groups of sets that reach t - 2e are read again, with their second-best keys.
"""

# pyright does not know the types of a kernel's values and launches.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.epilogue import INF_KEY, ordered_key
from csrc_triton.job import Keys
from csrc_triton.rows import Rows

MAX_BLOCK = 1 << 12
"""Sets of groups, at most: their best keys are kept in registers."""
CHUNK = 64
"""Chosen sets whose groups are read at a time, at most."""

_INT_MIN = tl.constexpr(-(2**31))
_LOWEST = tl.constexpr(-INF_KEY - 64)


class Candidates(NamedTuple):
    """Winners that can be among the k best [n, sides, slots], in no order, and the rest of each row; int32."""

    keys: Tensor
    """Keys turned so that the best are the largest."""
    groups: Tensor
    """2 * group + whether it is the second-best of its group."""
    counts: Tensor
    """[n, sides] how many there are; more than slots: those beyond are left out."""
    left_out: Tensor
    """[n, sides] the best turned key of a winner that is no candidate."""


@triton.jit
def score_of(key, flip, per_score, AWAY: tl.constexpr, FIXED: tl.constexpr):
    """The score of a turned key, moved by the key's rounding: outwards (AWAY = 1) or inwards (-1).

    flip is 0 for the top and -1 for the bottom, where outwards is down.
    """
    sign = 1.0 + 2.0 * flip.to(tl.float32)
    if FIXED:
        units = (((key ^ flip) >> 6) & 0x7FFFFF) - 0x400000
        return (units.to(tl.float32) + 2.0 * AWAY * sign) / per_score
    else:
        away = (key | 63) if AWAY == 1 else (key & -64)
        away = tl.minimum(tl.maximum(away ^ flip, -2139095041), 2139095040)
        return (away ^ ((away >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _select_kernel(
    winners,  # [sides, n, 2, G] int32
    per_score,  # [n] float32
    error,  # [n] float32
    keys,  # [n, sides, SLOTS] int32
    groups,  # [n, sides, SLOTS] int32
    chosen,  # [n, sides, SLOTS] int32, sets with candidates
    counts,  # [n, sides] int32
    left_out,  # [n, sides] int32
    side_stride,
    G,
    k,
    TOP: tl.constexpr,
    FIXED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    flip = -side if TOP else side * 0 - 1
    # Multiples of four, so that loads of 16 bytes are aligned.
    G, side_stride = G // 4 * 4, side_stride // 4 * 4
    base = winners + side.to(tl.int64) * side_stride + row * 2 * G
    sets = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), _INT_MIN, tl.int32)
    for start in range(0, G, PARTS * BLOCK):
        for part in tl.static_range(PARTS):  # pyright: ignore
            group = start + part * BLOCK + sets
            more = tl.load(base + group, mask=group < G, other=0) ^ flip
            best = tl.maximum(best, tl.where(group < G, more, _INT_MIN))
    high = tl.max(best, axis=0).to(tl.int64) + 1
    low = tl.min(tl.where(sets < G, best, 2147483647), axis=0).to(tl.int64)
    reaching = tl.full((), BLOCK, tl.int32)
    while (reaching > k + k // 32) & (high - low > 1):
        middle = (low + high) >> 1
        count = tl.sum((best >= middle.to(tl.int32)).to(tl.int32), axis=0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reaching = tl.where(enough, count, reaching)
    scale, margin = tl.load(per_score + row), 2 * tl.load(error + row)
    if FIXED:
        units = margin * scale
        # NaN and what is out of range: everything is a candidate.
        units = tl.where(units < 4194304.0, units, 8388608.0)
        threshold = low - (units.to(tl.int64) + 4) * 64
    else:
        lowest = score_of(low.to(tl.int32), flip, scale, -1, FIXED) - margin * (1.0 + 2.0 * flip.to(tl.float32))
        threshold = tl.where(lowest == lowest, (ordered_key(lowest) ^ flip) & -64, _INT_MIN).to(tl.int64)
    threshold = tl.maximum(threshold, _LOWEST).to(tl.int32)
    out = (row * tl.num_programs(1) + side) * SLOTS
    # Sets with candidates. One without a slot holds a candidate at least.
    reaches = (best >= threshold).to(tl.int32)
    slot = tl.cumsum(reaches, axis=0) - reaches
    kept = (reaches > 0) & (slot < SLOTS)
    tl.store(chosen + out + slot, sets, mask=kept)
    rest = tl.max(tl.where(kept, _INT_MIN, best), axis=0)
    n_chosen = tl.sum(reaches, axis=0)
    written = tl.maximum(n_chosen - SLOTS, 0)
    n_chosen = tl.minimum(n_chosen, SLOTS)
    place = tl.full((), 0, tl.int32)
    # The barrier makes stores of this program's other threads visible.
    tl.debug_barrier()
    line, member = tl.arange(0, CHUNK), tl.arange(0, 2 * PARTS)
    second = member % 2
    for first in range(0, n_chosen, CHUNK):
        own = tl.load(chosen + out + first + line, mask=line < n_chosen - first, other=0)
        for start in range(0, G, PARTS * BLOCK):
            group = start + own[:, None] + BLOCK * (member // 2)[None, :]
            there = (line < n_chosen - first)[:, None] & (group < G)
            found = tl.load(base + (second * G)[None, :] + group, mask=there, other=0) ^ flip
            found = tl.reshape(tl.where(there, found, _INT_MIN), (CHUNK * 2 * PARTS,))
            group = tl.reshape(2 * group + second[None, :], (CHUNK * 2 * PARTS,))
            good = (found >= threshold).to(tl.int32)
            at = place + tl.cumsum(good, axis=0) - good
            taken = (good > 0) & (at < SLOTS)
            tl.store(keys + out + at, found, mask=taken)
            tl.store(groups + out + at, group, mask=taken)
            rest = tl.maximum(rest, tl.max(tl.where(taken, _INT_MIN, found), axis=0))
            place += tl.sum(good, axis=0)
    tl.store(counts + row * tl.num_programs(1) + side, place + written)
    tl.store(left_out + row * tl.num_programs(1) + side, rest)


def select(winners: Tensor, rows: Rows, k: int, slots: int, keys: Keys) -> Candidates:
    """Candidates of each row and side, in one launch.

    Args:
        winners: [sides, n, 2, G] int32 as the kernels write them.
        rows: of the block; where the error is inf or NaN everything is a candidate.
        k: how many are wanted in the end.
        slots: candidates of a row and side, at most; a power of two ≥ k.
        keys: as they were written.
    """
    sides, n, _, G = winners.shape
    found, groups, chosen = torch.empty(3, n, sides, slots, dtype=torch.int32, device=winners.device).unbind()
    counts, left_out = torch.empty(2, n, sides, dtype=torch.int32, device=winners.device).unbind()
    block, parts = sets_of(G, k)
    with torch.cuda.device_of(winners):
        _select_kernel[(n, sides)](
            winners,
            rows.per_score,
            rows.error,
            found,
            groups,
            chosen,
            counts,
            left_out,
            winners.stride(0),
            G,
            k,
            TOP=keys.top,
            FIXED=keys.fixed,
            SLOTS=slots,
            BLOCK=block,
            PARTS=parts,
            CHUNK=min(slots, CHUNK),
            num_warps=warps_for(block, hip=torch.version.hip is not None),
        )
    return Candidates(found, groups, counts, left_out)


def sets_of(G: int, k: int) -> tuple[int, int]:
    """How many sets G groups are joined to, a power of two, and groups of a set that are read at a time: 1, 2 or 4.

    Four groups make a set, but there are at least 6 k sets: of fewer, many would hold two of the k best, which lowers
    the threshold.
    """
    whole = triton.next_power_of_2(G)
    block = min(max(whole // 4, triton.next_power_of_2(6 * k)), whole, MAX_BLOCK)
    return block, min(4, triton.next_power_of_2(triton.cdiv(G, block)))


def warps_for(block: int, *, hip: bool) -> int:
    """Warps of a program: 16 sets a thread, on AMD's warps of twice the threads too."""
    return max(1, block // (1024 if hip else 512))
