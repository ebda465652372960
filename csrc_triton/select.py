"""The second stage: the best group winners of each row, unpacked into columns and a bound on what was left out.

A row's winners are loaded once and stay in registers, while a threshold is bisected until as many of them reach it as
there is room for; what reaches it is written in no order. Nothing is sorted, and rows of equals cost no more.
"""

# The types of a kernel's values and launches are Triton's own business.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.epilogue import INF_KEY

MAX_KEYS = 1 << 13
"""Winners of a row and side that fit into one program's registers (V of 262,144 at 64 columns a group)."""

_INT_MIN = tl.constexpr(-(2**31))
_INF_KEY = tl.constexpr(INF_KEY)


class Candidates(NamedTuple):
    """The best group winners of one side of each row, and what is known of every other score of the row."""

    columns: Tensor
    """[r, m] int64, in no order; a column ≥ V stands for nothing (fewer winners than m)."""
    scores: Tensor
    """[r, m] float32: no score of the candidate's group behind it (and not its own either) is beyond this."""
    groups: Tensor
    """[r, m] int64 group of each candidate."""
    second: Tensor
    """[r, m] bool: the second-best of its group. Others of that group may be hidden behind it."""
    left_out: Tensor
    """[r] float32: no winner outside the candidates is beyond this."""


@triton.jit
def _select_kernel(
    keys,  # [r, n_keys] int32
    found,  # [r, SLOTS] int32: keys of this side turned so that the best are the largest
    places,  # [r, SLOTS] int32 into the row of keys
    left_out,  # [r] int32
    n_keys,
    m,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mine = tl.load(keys + row * n_keys + at, mask=at < n_keys, other=_INT_MIN)
    if not LARGEST:
        # What stands for nothing is lowest on both sides; it has to stay lowest when the order turns.
        mine = tl.where(mine < -_INF_KEY - GROUP, mine, ~mine)
    low = tl.min(mine, axis=0).to(tl.int64)
    high = tl.max(mine, axis=0).to(tl.int64) + 1
    count = tl.sum((mine >= low.to(tl.int32)).to(tl.int32), axis=0)
    while (count > SLOTS) & (high - low > 1):
        middle = (low + high) // 2
        reaching = tl.sum((mine >= middle.to(tl.int32)).to(tl.int32), axis=0)
        enough = reaching >= m
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        count = tl.where(enough, reaching, count)
    chosen = mine >= low.to(tl.int32)
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    # Equals beyond the room are left out, and say so.
    chosen = chosen & (slot < SLOTS)
    tl.store(found + row * SLOTS + slot, mine, mask=chosen)
    tl.store(places + row * SLOTS + slot, at, mask=chosen)
    tl.store(left_out + row, tl.max(tl.where(chosen, _INT_MIN, mine), axis=0))
    empty = tl.arange(0, SLOTS)
    tl.store(found + row * SLOTS + empty, _INT_MIN, mask=empty >= count)
    tl.store(places + row * SLOTS + empty, 0, mask=empty >= count)


def select(keys: Tensor, m: int, V: int, group: int, *, largest: bool) -> Candidates:
    """Take at least the m best of the packed winners (all, where there are fewer).

    Args:
        keys: [r, 2, G] int32, best and second of each group as the kernels pack them.
        m: how many.
        V: number of columns.
        group: columns in a group.
        largest: the side.

    Returns:
        Candidates, in room for a quarter more (m of each MAX_KEYS winners, where a row has more than that); the scores
        of the kernel, rounded away from the middle.
    """
    n_groups = keys.shape[2]
    step = MAX_KEYS // 2
    parts = [
        _select(keys[:, :, start : start + step].flatten(1), m, group, largest, start)
        for start in range(0, n_groups, step)
    ]
    found, groups, second, bounds = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    place = found & (group - 1)
    columns = column_of(groups, place if largest else group - 1 - place, group)
    # A winner that is NaN or lies past the end is marked by a column that does not exist.
    absent = found < -INF_KEY - group
    return Candidates(
        columns.masked_fill(absent | (columns >= V), V),
        _unpack(found | (group - 1), largest),
        groups,
        second,
        _unpack(bounds.amax(1) | (group - 1), largest),
    )


def _select(keys: Tensor, m: int, group: int, largest: bool, first_group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some groups' keys [r, 2·g]: turned keys, groups and whether second-best, all [r, slots]; bound [r, 1]."""
    r, n_keys = keys.shape
    block = triton.next_power_of_2(n_keys)
    slots = min(triton.next_power_of_2(m + m // 4), block)
    found, places = (torch.empty(r, slots, dtype=torch.int32, device=keys.device) for _ in range(2))
    bound = torch.empty(r, 1, dtype=torch.int32, device=keys.device)
    with torch.cuda.device_of(keys):
        _select_kernel[(r,)](
            keys,
            found,
            places,
            bound,
            n_keys,
            min(m, n_keys),
            LARGEST=largest,
            GROUP=group,
            SLOTS=slots,
            BLOCK=block,
            num_warps=warps_for(block, hip=torch.version.hip is not None),
        )
    half = n_keys // 2
    return found, places.long() % half + first_group, places >= half, bound


def warps_for(block: int, *, hip: bool) -> int:
    """Warps of a program that holds a row of keys: 16 keys a thread, on AMD's warps of twice the threads too."""
    return min(32, max(1, block // (1024 if hip else 512)))


def column_of(groups: Tensor, places: Tensor, group: int) -> Tensor:
    """Columns of places 0..group-1 in their groups (the two broadcast)."""
    return (groups // 4) * (4 * group) + (places // 2) * 8 + (groups % 4) * 2 + places % 2


def _unpack(keys: Tensor, largest: bool) -> Tensor:
    """float32 scores of ordered integers; those beyond the infinities become infinite."""
    if not largest:
        keys = keys.bitwise_not()
    keys = keys.clamp(-INF_KEY - 1, INF_KEY)
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)
