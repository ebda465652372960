"""The third stage: candidates scored exactly, sorted, and proved, all on the device.

One program for each row and side. A row whose k-th exact score is beyond everything left out is finished. A group with
two candidates may hide a third column of the same rank behind them: such rows are marked, and a second launch scores
those groups in full; its other programs end at once. Rows that remain unproved (ties across the k-th place, more
candidates than slots, no bound) are marked for the caller, who reads the marks once, after the last block.
"""

# pyright does not know the types of a kernel's values and launches.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.exact import (
    NOTHING,
    columns_of,
    exact_scores,
    hiding,
    load_best,
    merge,
    rank_of,
    score_of_rank,
    store_best,
)
from csrc_triton.job import Keys, Terms
from csrc_triton.rows import Rows
from csrc_triton.select import Candidates, score_of

BLOCK_K = 128
"""Elements of d read at a time."""
MAX_SLOTS = 1024
"""Candidates of a row and side, at most: a program sorts them in registers."""
MAX_APART = 32
"""Columns that are set apart, at most."""
PROVED, CROWDED, UNPROVED, OPENED, HOPELESS = range(5)
"""Flags of a row and side. OPENED: its crowded groups were scored in full, which settles it. UNPROVED: more candidates
than slots, four times as many would do; HOPELESS: they would not, or more than 8 + k // 4 groups are crowded."""


@triton.jit
def _slot_columns(
    keys, groups, apart, slot, count, A, V, flip, APART: tl.constexpr, GROUP: tl.constexpr, ROOM: tl.constexpr
):
    """Columns of some slots of a row, and which there are: its candidates, then the columns set apart."""
    key = tl.load(keys + slot, mask=slot < count, other=0)
    group = tl.load(groups + slot, mask=slot < count, other=0) // 2
    columns = columns_of(group, (key ^ flip) & 63, GROUP)
    there = (slot < count) & (columns < V)
    if APART:
        # The pass saw zeros in place of these columns; all of them are scored.
        others = tl.arange(0, ROOM)
        other = tl.load(apart + others, mask=others < A, other=-1)
        there = there & (tl.sum((columns[:, None] == other[None, :]).to(tl.int32), axis=1) == 0)
        own = (slot >= count) & (slot < count + A)
        columns = tl.where(own, tl.load(apart + slot - count, mask=own, other=0), columns)
        there = there | own
    return tl.where(there, columns, 0), there


@triton.jit
def _finish_kernel(
    F,  # [n, d]
    W,  # [V, d]
    offset,  # [n] float32
    scale,  # [V] float32
    bias,  # [V] float32
    keys,  # [n, sides, SLOTS] int32
    groups,  # [n, sides, SLOTS] int32
    counts,  # [n, sides] int32
    left_out,  # [n, sides] int32
    per_score,  # [n] float32
    error,  # [n] float32
    apart,  # [A] int32 columns that the pass does not see
    scores,  # [sides, n, k] float32
    ids,  # [sides, n, k] int64
    flags,  # [n, sides] int32
    side_stride,
    d,
    k,
    A,
    V,
    stride_f,
    stride_w,
    TERMS: tl.constexpr,
    TOP: tl.constexpr,
    FIXED: tl.constexpr,
    APART: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    ROOM: tl.constexpr,
    APART_ROOM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    flip = -side if TOP else side * 0 - 1
    here = row * tl.num_programs(1) + side
    keys += here * SLOTS
    groups += here * SLOTS
    wanted = tl.load(counts + here)
    count = tl.minimum(wanted, SLOTS)
    chunk, lane = tl.arange(0, ROOM // BLOCK_C), tl.arange(0, BLOCK_C)
    ranks = tl.full((ROOM // BLOCK_C, BLOCK_C), NOTHING, tl.int64)
    for part in range(0, tl.cdiv(count + A, BLOCK_C)):
        slot = part * BLOCK_C + lane
        columns, there = _slot_columns(keys, groups, apart, slot, count, A, V, flip, APART, GROUP, APART_ROOM)
        found = exact_scores(
            F, W, offset, scale, bias, row, columns, there, d, stride_f, stride_w, TERMS, BLOCK_C, BLOCK_K
        )
        ranks = tl.where((chunk == part)[:, None], rank_of(found, columns, there, flip)[None, :], ranks)
    ranks = tl.sort(tl.reshape(ranks, (ROOM,)), descending=True)
    places = tl.arange(0, ROOM)
    kth_rank = tl.max(tl.where(places == k - 1, ranks, NOTHING), axis=0)
    out = side * side_stride + row * k
    store_best(ranks, scores + out, ids + out, places, k, flip)
    units, reach = tl.load(per_score + row), tl.load(error + row)
    # Signs as if both sides were the top.
    sign = 1.0 + 2.0 * flip.to(tl.float32)
    kth = score_of_rank(kth_rank, flip) * sign
    rest = tl.load(left_out + here)
    bound = tl.where(rest < -2139095104, -float("inf"), score_of(rest, flip, units, 1, FIXED) * sign + reach)
    # Written so that a NaN leaves the row unproved.
    proved = (kth_rank != NOTHING) & (kth > bound) & (reach < float("inf"))
    hides = hiding(keys, groups, tl.arange(0, SLOTS), count, kth, flip, units, reach, FIXED)
    crowded = tl.sum(hides, axis=0)
    proved = proved & (crowded <= 8 + k // 4)
    # The caller's next try has four times as many slots.
    more = (wanted > SLOTS) & (wanted <= 4 * SLOTS) & (kth_rank != NOTHING)
    tl.store(flags + here, tl.where(proved, (crowded > 0).to(tl.int32), tl.where(more, 2, 4)))  # type: ignore


@triton.jit
def _open_kernel(
    F,  # [n, d]
    W,  # [V, d]
    offset,  # [n] float32
    scale,  # [V] float32
    bias,  # [V] float32
    keys,  # [n, sides, SLOTS] int32
    groups,  # [n, sides, SLOTS] int32
    counts,  # [n, sides] int32
    per_score,  # [n] float32
    error,  # [n] float32
    scores,  # [sides, n, k] float32
    ids,  # [sides, n, k] int64
    flags,  # [n, sides] int32
    side_stride,
    d,
    k,
    V,
    stride_f,
    stride_w,
    TERMS: tl.constexpr,
    TOP: tl.constexpr,
    FIXED: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here = row * tl.num_programs(1) + side
    if tl.load(flags + here) == 1:
        flip = -side if TOP else side * 0 - 1
        keys += here * SLOTS
        groups += here * SLOTS
        scores += side * side_stride + row * k
        ids += side * side_stride + row * k
        kth = tl.load(scores + k - 1) * (1.0 + 2.0 * flip.to(tl.float32))
        slots, places = tl.arange(0, SLOTS), tl.arange(0, BLOCK_C)
        count = tl.minimum(tl.load(counts + here), SLOTS)
        hides = hiding(keys, groups, slots, count, kth, flip, tl.load(per_score + row), tl.load(error + row), FIXED)
        best = load_best(scores, ids, k, flip, SLOTS)
        for _ in range(0, tl.sum(hides, axis=0)):
            at = tl.min(tl.where(hides > 0, slots, SLOTS), axis=0)
            hides = tl.where(slots == at, 0, hides)
            group = tl.load(groups + at) // 2
            for start in range(0, GROUP, BLOCK_C):
                columns = columns_of(group, start + places, GROUP)
                there = (columns < V) & (start + places < GROUP)
                columns = tl.where(there, columns, 0)
                found = exact_scores(
                    F, W, offset, scale, bias, row, columns, there, d, stride_f, stride_w, TERMS, BLOCK_C, BLOCK_K
                )
                rank = rank_of(found, columns, there, flip)
                # Columns that are known already must not come twice.
                known = (rank & 0x7FFFFFFF)[:, None] == (best & 0x7FFFFFFF)[None, :]
                twice = tl.sum(known.to(tl.int32), axis=1) > 0  # type: ignore
                rank = tl.where(twice, NOTHING, rank)
                if tl.max(rank, axis=0) > tl.min(tl.where(slots < k, best, 9223372036854775807), axis=0):  # type: ignore
                    best = merge(best, rank, scores, ids, k, flip, SLOTS)
        tl.store(flags + here, 3)


class Results(NamedTuple):
    """Output of a block of rows: the k best, and flags."""

    scores: Tensor
    """[sides, n, k] float32, from the best inwards."""
    ids: Tensor
    """[sides, n, k] int64."""
    flags: Tensor
    """[n, sides] int32: PROVED, OPENED, UNPROVED or HOPELESS."""

    def of_rows(self, rows: slice) -> Results:
        """Those of some rows."""
        return Results(self.scores[:, rows], self.ids[:, rows], self.flags[rows])


class Exact(NamedTuple):
    """How candidates are scored exactly."""

    terms: Terms | None
    """Applied to the exact products; their factor is not used."""
    apart: Tensor | None
    """[A] int32 columns that the pass saw as zeros, A ≤ MAX_APART; or None."""
    group: int
    """Columns in a group."""


def finish(F: Tensor, W: Tensor, candidates: Candidates, rows: Rows, results: Results, how: Exact, keys: Keys) -> None:
    """Write the k best of each row and side, and flags: two launches, no host synchronisation.

    Args:
        F: [n, d] rows as given, float32, float16 or bfloat16, last axis contiguous.
        W: [V, d], V < 2^31, last axis contiguous; its dtype may differ from F's.
        candidates: of `select`.
        rows: what the pass knew of the rows.
        results: written.
        how: terms and groups.
        keys: as the winners were written.
    """
    n, sides, slots = candidates.keys.shape
    shape = (results.scores.stride(0), F.shape[1], results.scores.shape[2])
    strides = (len(W), F.stride(0), W.stride(0))
    operands = (F, W, *((F, F, F) if how.terms is None else how.terms[1:]))
    apart = how.apart
    shared = {"TERMS": how.terms is not None, "TOP": keys.top, "FIXED": keys.fixed, "GROUP": how.group, "SLOTS": slots}
    # Roundings of the terms as on every other path: no multiplication is fused with an addition.
    room = room_for(slots, 0 if apart is None else len(apart))
    shared |= {"BLOCK_K": BLOCK_K, "enable_fp_fusion": False} | shape_for(room, hip=torch.version.hip is not None)
    with torch.cuda.device_of(F):
        _finish_kernel[(n, sides)](
            *operands,
            *candidates,
            rows.per_score,
            rows.error,
            F if apart is None else apart,
            *results,
            *shape,
            0 if apart is None else len(apart),
            *strides,
            APART=apart is not None,
            ROOM=room,
            APART_ROOM=MAX_APART,
            **shared,
        )
        _open_kernel[(n, sides)](
            *operands,
            *candidates[:3],
            rows.per_score,
            rows.error,
            *results,
            *shape,
            *strides,
            **shared,
        )


def room_for(slots: int, n_apart: int) -> int:
    """Candidates that a program holds, a power of two."""
    return 2 * slots if n_apart else slots


def shape_for(room: int, *, hip: bool) -> dict[str, int]:
    """Columns scored at a time and warps (of twice the threads on AMD), the same for both launches.

    A sum over d adds up in an order that depends on both, and equal columns must score the same bits in either launch.
    """
    if room < 512:
        return {"BLOCK_C": 32, "num_warps": 4}
    few, many = (8, 16) if hip else (16, 8)
    return {"BLOCK_C": 32, "num_warps": few} if room == 512 else {"BLOCK_C": 16, "num_warps": many}
