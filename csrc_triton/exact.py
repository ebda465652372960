"""Exact scores of chosen columns, and the k best of them in order: what the kernels of `finish` share.

A score and its column become one int64, a rank: the score in an order of integers, turned so that the best is the
largest on either side, above the column turned so that the lower one wins a tie.
"""

# pyright does not know the types of a kernel's values.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from csrc_triton.epilogue import ordered_key
from csrc_triton.select import score_of

NOTHING = tl.constexpr(-(2**63))
"""The rank of an absent candidate."""


@triton.jit
def exact_scores(
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
def rank_of(scores, columns, there, flip):
    """int64 that sort from the best downwards, equal scores by the lower column; NaN and absent ones last."""
    # -0.0 equals 0.0.
    order = (ordered_key(scores + 0.0) ^ flip).to(tl.int64)
    rank = (order << 32) | (0x7FFFFFFF - columns).to(tl.int64)
    return tl.where(there & (scores == scores), rank, NOTHING)


@triton.jit
def score_of_rank(rank, flip):
    order = (rank >> 32).to(tl.int32) ^ flip
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def columns_of(groups, places, GROUP: tl.constexpr):
    return (groups // 4) * (4 * GROUP) + (places // 2) * 8 + (groups % 4) * 2 + places % 2


@triton.jit
def store_best(ranks, scores, ids, places, k, flip):
    """Write ranks as scores and ids to their places, those below k."""
    tl.store(scores + places, score_of_rank(ranks, flip), mask=places < k)
    tl.store(ids + places, 0x7FFFFFFF - (ranks & 0x7FFFFFFF), mask=places < k)


@triton.jit
def hiding(keys, groups, slots, count, kth, flip, units, reach, FIXED: tl.constexpr):
    """[SLOTS] int32, 1 for a second-best of its group behind which a third column may be among the k best."""
    key = tl.load(keys + slots, mask=slots < count, other=0)
    second = (tl.load(groups + slots, mask=slots < count, other=0) % 2) == 1
    sign = 1.0 + 2.0 * flip.to(tl.float32)
    return (second & (score_of(key, flip, units, 1, FIXED) * sign + reach >= kth)).to(tl.int32)


@triton.jit
def merge(best, rank, scores, ids, k, flip, SLOTS: tl.constexpr):
    """Write the k best of ``best`` [SLOTS], in order, and of ``rank`` [C], all different; the new k best [SLOTS]."""
    slots = tl.arange(0, SLOTS)
    better = (rank[:, None] > best[None, :]).to(tl.int32)
    below = tl.sum((best[None, :] > rank[:, None]).to(tl.int32), axis=1)
    below += tl.sum((rank[None, :] > rank[:, None]).to(tl.int32), axis=1)
    # Every place is written once, after all threads have read its old content.
    tl.debug_barrier()
    store_best(best, scores, ids, slots + tl.sum(better, axis=0), tl.where(slots < k, k, 0), flip)
    store_best(rank, scores, ids, below, tl.where(rank != NOTHING, k, 0), flip)
    tl.debug_barrier()
    return load_best(scores, ids, k, flip, SLOTS)


@triton.jit
def load_best(scores, ids, k, flip, SLOTS: tl.constexpr):
    """Ranks of the k best that are written."""
    slots = tl.arange(0, SLOTS)
    found = tl.load(scores + slots, mask=slots < k, other=0.0)
    return rank_of(found, tl.load(ids + slots, mask=slots < k, other=0).to(tl.int32), slots < k, flip)
