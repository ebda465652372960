"""The second stage: the best group winners of each row, unpacked into columns and a bound on what was left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_INF_KEY = 0x7F800000


class Candidates(NamedTuple):
    """The best group winners of one side of each row, and what is known of every other score of the row."""

    columns: Tensor
    """[r, m] int64, best first; a column ≥ V stands for nothing (fewer winners than m)."""
    scores: Tensor
    """[r, m] float32: no score of the candidate's group behind it (and not its own either) is beyond this."""
    groups: Tensor
    """[r, m] int64 group of each candidate."""
    second: Tensor
    """[r, m] bool: the second-best of its group. Others of that group may be hidden behind it."""
    left_out: Tensor
    """[r] float32: no winner outside the candidates is beyond this."""


def select(keys: Tensor, m: int, V: int, group: int, *, largest: bool) -> Candidates:
    """Take the m best of the packed winners.

    Args:
        keys: [r, 2, G] int32, best and second of each group as `topk` packs them.
        m: how many, at most 2·G.
        V: number of columns.
        group: columns in a group.
        largest: the side.

    Returns:
        Candidates; the scores of the kernel, rounded away from the middle.
    """
    n_groups = keys.shape[2]
    flat = keys.flatten(1)
    if not largest:
        # What stands for nothing is lowest on both sides; it has to stay lowest when the order turns.
        flat = torch.where(flat < -_INF_KEY - group, flat, flat.bitwise_not())
    m = min(m, flat.shape[1])
    found, places = flat.topk(min(m + 1, flat.shape[1]), dim=1)
    bounds = _unpack(found | (group - 1), largest)
    if found.shape[1] > m:
        left_out = bounds[:, m]
    else:
        left_out = torch.full_like(bounds[:, 0], -torch.inf if largest else torch.inf)
    found, places = found[:, :m], places[:, :m]
    groups = places % n_groups
    place = found & (group - 1)
    columns = column_of(groups, place if largest else group - 1 - place, group)
    # A winner that is NaN or lies past the end is marked by a column that does not exist.
    absent = found < -_INF_KEY - group
    return Candidates(
        columns.masked_fill(absent | (columns >= V), V), bounds[:, :m], groups, places >= n_groups, left_out
    )


def column_of(groups: Tensor, places: Tensor, group: int) -> Tensor:
    """Columns of places 0..group-1 in their groups (the two broadcast)."""
    return (groups // 4) * (4 * group) + (places // 2) * 8 + (groups % 4) * 2 + places % 2


def _unpack(keys: Tensor, largest: bool) -> Tensor:
    """float32 scores of ordered integers; those beyond the infinities become infinite."""
    if not largest:
        keys = keys.bitwise_not()
    keys = keys.clamp(-_INF_KEY - 1, _INF_KEY)
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)
