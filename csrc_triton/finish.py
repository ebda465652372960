"""The third stage: candidates scored exactly, sorted, and proved, all on the device.

One program for each row and side. A row whose k-th exact score is beyond everything left out is finished. A group with
two candidates may hide a third column of the same rank behind them: such rows are marked, and a second launch scores
those groups in full; its other programs end at once. What remains unproved (ties across the k-th place, more candidates
than room, no bound) is marked for the caller, who looks once, after the last block.
"""

# The types of a kernel's values and launches are Triton's own business.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.epilogue import ordered_key
from csrc_triton.job import Keys, Terms
from csrc_triton.rows import Rows
from csrc_triton.select import Candidates, score_of

BLOCK_C = 32
"""Candidates scored at a time."""
OPEN_C = 16
"""Columns of a crowded group scored at a time: the known best are in registers beside them."""
BLOCK_K = 128
NUM_WARPS = 4
MAX_SLOTS = 1024
"""Candidates of a row and side, at most: a program sorts them in registers."""
MAX_APART = 32
"""Columns that are set apart, at most."""
PROVED, CROWDED, UNPROVED, OPENED, HOPELESS = range(5)
"""Flags of a row and side. OPENED: its crowded groups were scored in full, which settles it. UNPROVED: more candidates
than slots, four times as many would do; HOPELESS: they would not, or more than 8 + k // 4 groups are crowded."""

_NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _exact_scores(
    F, W, terms_offset, terms_scale, terms_bias, row, columns, there, d, stride_f, stride_w,
    TERMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C] scores of a row with columns in float32, by the same roundings everywhere."""
    depth = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    w_at = W + columns.to(tl.int64)[:, None] * stride_w + depth[None, :]
    for start in range(0, d, BLOCK_K):
        inside = depth < d - start
        f = tl.load(F + row * stride_f + start + depth, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_at + start, mask=inside[None, :] & there[:, None], other=0.0).to(tl.float32)
        sums = tl.fma(w, f[None, :] + tl.zeros_like(w), sums)
    scores = tl.sum(sums, axis=1)
    if TERMS:
        scores = scores + tl.load(terms_offset + row)
        scores = scores * tl.load(terms_scale + columns, mask=there, other=0.0)
        scores = scores + tl.load(terms_bias + columns, mask=there, other=0.0)
    return scores


@triton.jit
def _rank(scores, columns, there, flip):
    """int64 that sort from the best downwards, equal scores by the lower column; NaN and absent ones last."""
    # -0.0 equals 0.0.
    order = (ordered_key(scores + 0.0) ^ flip).to(tl.int64)
    rank = (order << 32) | (0x7FFFFFFF - columns).to(tl.int64)
    return tl.where(there & (scores == scores), rank, _NOTHING)


@triton.jit
def _score_of_rank(rank, flip):
    order = (rank >> 32).to(tl.int32) ^ flip
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _columns_of(groups, places, GROUP: tl.constexpr):
    return (groups // 4) * (4 * GROUP) + (places // 2) * 8 + (groups % 4) * 2 + places % 2


@triton.jit
def _store_best(ranks, scores, ids, places, k, flip):
    """Write ranks as scores and ids to their places, those below k."""
    tl.store(scores + places, _score_of_rank(ranks, flip), mask=places < k)
    tl.store(ids + places, 0x7FFFFFFF - (ranks & 0x7FFFFFFF), mask=places < k)


@triton.jit
def _slot_columns(
    keys, groups, apart, slot, count, A, V, flip, APART: tl.constexpr, GROUP: tl.constexpr, ROOM: tl.constexpr
):
    """Columns of some slots of a row, and which there are: its candidates, then the columns set apart."""
    key = tl.load(keys + slot, mask=slot < count, other=0)
    group = tl.load(groups + slot, mask=slot < count, other=0) // 2
    columns = _columns_of(group, (key ^ flip) & 63, GROUP)
    there = (slot < count) & (columns < V)
    if APART:
        # The pass saw zeros in place of these columns; they are all scored, whatever it made of them.
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
    ranks = tl.full((ROOM // BLOCK_C, BLOCK_C), _NOTHING, tl.int64)
    for part in range(0, tl.cdiv(count + A, BLOCK_C)):
        slot = part * BLOCK_C + lane
        columns, there = _slot_columns(keys, groups, apart, slot, count, A, V, flip, APART, GROUP, APART_ROOM)
        found = _exact_scores(
            F, W, offset, scale, bias, row, columns, there, d, stride_f, stride_w, TERMS, BLOCK_C, BLOCK_K
        )
        ranks = tl.where((chunk == part)[:, None], _rank(found, columns, there, flip)[None, :], ranks)
    ranks = tl.sort(tl.reshape(ranks, (ROOM,)), descending=True)
    places = tl.arange(0, ROOM)
    kth_rank = tl.max(tl.where(places == k - 1, ranks, _NOTHING), axis=0)
    out = side * side_stride + row * k
    _store_best(ranks, scores + out, ids + out, places, k, flip)
    units, reach = tl.load(per_score + row), tl.load(error + row)
    # As if both sides were the top.
    sign = 1.0 + 2.0 * flip.to(tl.float32)
    kth = _score_of_rank(kth_rank, flip) * sign
    rest = tl.load(left_out + here)
    bound = tl.where(rest < -2139095104, -float("inf"), score_of(rest, flip, units, 1, FIXED) * sign + reach)
    # Written so that a NaN leaves the row unproved.
    proved = (kth_rank != _NOTHING) & (kth > bound) & (reach < float("inf"))
    hides = _hiding(keys, groups, tl.arange(0, SLOTS), count, kth, flip, units, reach, FIXED)
    crowded = tl.sum(hides, axis=0)
    proved = proved & (crowded <= 8 + k // 4)
    # Four times the room is the caller's next try.
    more = (wanted > SLOTS) & (wanted <= 4 * SLOTS) & (kth_rank != _NOTHING)
    tl.store(flags + here, tl.where(proved, (crowded > 0).to(tl.int32), tl.where(more, 2, 4)))  # type: ignore


@triton.jit
def _hiding(keys, groups, slots, count, kth, flip, units, reach, FIXED: tl.constexpr):
    """[SLOTS] int32, 1 for a second-best of its group that looks so good that a third may be among the k best."""
    key = tl.load(keys + slots, mask=slots < count, other=0)
    second = (tl.load(groups + slots, mask=slots < count, other=0) % 2) == 1
    sign = 1.0 + 2.0 * flip.to(tl.float32)
    return (second & (score_of(key, flip, units, 1, FIXED) * sign + reach >= kth)).to(tl.int32)


@triton.jit
def _merge(best, rank, scores, ids, k, flip, SLOTS: tl.constexpr):
    """Write the k best of ``best`` [SLOTS], in order, and of ``rank`` [C], all different; the new k best [SLOTS]."""
    slots = tl.arange(0, SLOTS)
    better = (rank[:, None] > best[None, :]).to(tl.int32)
    below = tl.sum((best[None, :] > rank[:, None]).to(tl.int32), axis=1)
    below += tl.sum((rank[None, :] > rank[:, None]).to(tl.int32), axis=1)
    # Every place is written once, after all threads have read what was there.
    tl.debug_barrier()
    _store_best(best, scores, ids, slots + tl.sum(better, axis=0), tl.where(slots < k, k, 0), flip)
    _store_best(rank, scores, ids, below, tl.where(rank != _NOTHING, k, 0), flip)
    tl.debug_barrier()
    return _load_best(scores, ids, k, flip, SLOTS)


@triton.jit
def _load_best(scores, ids, k, flip, SLOTS: tl.constexpr):
    """Ranks of the k best that are written."""
    slots = tl.arange(0, SLOTS)
    found = tl.load(scores + slots, mask=slots < k, other=0.0)
    return _rank(found, tl.load(ids + slots, mask=slots < k, other=0).to(tl.int32), slots < k, flip)


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
        hides = _hiding(keys, groups, slots, count, kth, flip, tl.load(per_score + row), tl.load(error + row), FIXED)
        best = _load_best(scores, ids, k, flip, SLOTS)
        for _ in range(0, tl.sum(hides, axis=0)):
            at = tl.min(tl.where(hides > 0, slots, SLOTS), axis=0)
            hides = tl.where(slots == at, 0, hides)
            group = tl.load(groups + at) // 2
            for start in range(0, GROUP, BLOCK_C):
                columns = _columns_of(group, start + places, GROUP)
                there = (columns < V) & (start + places < GROUP)
                columns = tl.where(there, columns, 0)
                found = _exact_scores(
                    F, W, offset, scale, bias, row, columns, there, d, stride_f, stride_w, TERMS, BLOCK_C, BLOCK_K
                )
                rank = _rank(found, columns, there, flip)
                # What is known already must not come twice.
                twice = tl.sum((rank[:, None] == best[None, :]).to(tl.int32), axis=1) > 0  # type: ignore
                rank = tl.where(twice, _NOTHING, rank)
                if tl.max(rank, axis=0) > tl.min(tl.where(slots < k, best, 9223372036854775807), axis=0):  # type: ignore
                    best = _merge(best, rank, scores, ids, k, flip, SLOTS)
        tl.store(flags + here, 3)


class Results(NamedTuple):
    """Where the k best of a block of rows go."""

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
    """Write the k best of each row and side, and flags: two launches, nothing comes back to the host.

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
    shared |= {"BLOCK_K": BLOCK_K, "enable_fp_fusion": False}
    room = room_for(slots, 0 if apart is None else len(apart))
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
            BLOCK_C=BLOCK_C,
            num_warps=warps_of(room),
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
            BLOCK_C=OPEN_C,
            num_warps=warps_of(slots),
            **shared,
        )


def room_for(slots: int, n_apart: int) -> int:
    """Candidates that a program holds, a power of two."""
    return 2 * slots if n_apart else slots


def warps_of(room: int) -> int:
    """Warps of a program that holds so many ranks."""
    return max(NUM_WARPS, min(16, room // 64))
