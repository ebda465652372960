"""Selection: the k best of each row of a tile of scores, without sorting whole rows.

The extreme of each group of columns is taken, the best groups are found among the extremes (by the same step again,
where they are many), and the best elements among those of the best groups. The k-th best *value* found that way is
always right; a row is ambiguous only when other elements equal it, and for those rows alone the lowest ids among the
equals are looked up in the whole tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import buffers

GROUP = 16
"""Columns in a group: fewer leave more extremes to look through, more leave more elements."""
PREFIX = 2048
"""Columns in which equals are looked for first."""


class Side(NamedTuple):
    """The k best of one side of each row: scores [n, k] from the extreme inwards, ids [n, k] int64."""

    scores: Tensor
    ids: Tensor


def merge(first: Side, second: Side, k: int, *, largest: bool) -> Side:
    """The k best of two sides, where every id of ``first`` is lower than every id of ``second``."""
    scores = torch.cat([first.scores, second.scores], 1)
    ids = torch.cat([first.ids, second.ids], 1)
    return best_by_sort(scores, k, largest=largest, ids=ids)


def best_by_sort(scores: Tensor, k: int, *, largest: bool, ids: Tensor | None = None) -> Side:
    """The k best by a stable sort of whole rows (NaN last); ids default to positions and must ascend among equals."""
    # torch sorts NaN above every number, so both sides sort upwards to have it last.
    order = torch.sort(-scores if largest else scores, dim=1, stable=True).indices[:, :k]
    return Side(scores.gather(1, order), order if ids is None else ids.gather(1, order))


def best_of_candidates(scores: Tensor, ids: Tensor, k: int, *, largest: bool) -> Side:
    """The k best of candidates whose ids are in no order: sorted, ties by the lower id, NaN last.

    Args:
        scores: [r, m].
        ids: [r, m], distinct within a row.
        k: at most m.
        largest: the largest or the smallest.
    """
    values, places = scores.topk(min(k + 1, scores.shape[1]), dim=1, largest=largest)
    # Rows with equals or NaN among the first k + 1 are sorted again, by id first.
    plain = (values[:, 1:] < values[:, :-1]) if largest else (values[:, 1:] > values[:, :-1])
    rows = (~(plain.all(1) & (values[:, -1] == values[:, -1]))).nonzero().squeeze(1)
    found = Side(values[:, :k].contiguous(), ids.gather(1, places[:, :k]))
    if rows.numel():
        ordered, order = ids[rows].sort(dim=1)
        found.scores[rows], found.ids[rows] = best_by_sort(
            scores[rows].gather(1, order), k, largest=largest, ids=ordered
        )
    return found


def best_of_tile(scores: Tensor, k: int, *, largest: bool) -> Side:
    """The k best of each row of a tile, exactly: sorted, ties by the lower column, NaN after every number.

    Args:
        scores: [r, c] of any float dtype.
        k: 1 ≤ k ≤ c.
        largest: the largest or the smallest.

    Returns:
        A Side whose ids are columns of the tile. Cost: one pass over the tile and what `best_places` does with 1/16 of
        it; two more passes over the rows that have a tie across the k-th place.
    """
    worst = -math.inf if largest else math.inf
    numbers, extremes = without_nan(scores, largest)
    best = best_places(numbers, extremes, k + 1, largest)
    found = best_of_candidates(best.scores, best.ids, k + 1, largest=largest)
    result, kth = Side(*(x[:, :k].contiguous() for x in found)), found.scores[:, k - 1 : k]
    _settle_ties(numbers, result, found.scores, k, largest)
    if numbers is not scores:
        short = (kth == worst).squeeze(1).nonzero().squeeze(1)
        if short.numel():
            whole = best_by_sort(scores[short], k, largest=largest)
            result.scores[short], result.ids[short] = whole.scores, whole.ids
    return result


def without_nan(scores: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The scores with NaN made the worst there is (the same tensor where there is none), and `extremes_of` them.

    The extremes are valid until the next call for the same side.
    """
    extremes = extremes_of(scores, largest)
    tail = scores[:, extremes.shape[1] * GROUP :]
    # The extreme of what holds a NaN is NaN.
    if not any(part.numel() and math.isnan(part.amax()) for part in (extremes, tail)):
        return scores, extremes
    scores = scores.masked_fill(scores.isnan(), -math.inf if largest else math.inf)
    return scores, extremes_of(scores, largest)


def extremes_of(scores: Tensor, largest: bool) -> Tensor:
    """Extremes [r, G] of groups {j, j + G, j + 2G, ...}, G = c // GROUP: whole vector registers are compared.

    Valid until the next call for the same side and number of columns.
    """
    r, n_groups = len(scores), scores.shape[1] // GROUP
    name = f"extremes {largest} {scores.shape[1]}"
    room = buffers.take(name, r * n_groups, scores.dtype, scores.device).view(r, n_groups)
    grouped = scores[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))
    return (torch.amax if largest else torch.amin)(grouped, 1, out=room)


def best_places(scores: Tensor, extremes: Tensor | None, m: int, largest: bool) -> Side:
    """The min(m, c) best of each row, in no order; equals across the m-th place are cut anyhow.

    Args:
        scores: [r, c], without NaN, of any dtype that has an order.
        extremes: `extremes_of` these scores, or None.
        m: how many.
        largest: the largest or the smallest.
    """
    c = scores.shape[1]
    if c < 2 * GROUP * m:
        return Side(*scores.topk(min(m, c), dim=1, largest=largest, sorted=False))
    if extremes is None:
        extremes = extremes_of(scores, largest)
    n_groups = extremes.shape[1]
    groups = best_places(extremes, None, m, largest).ids
    # The columns of the best groups' elements, and of those left over behind the last whole group.
    r, n_elements = len(scores), GROUP * m
    n_columns = n_elements + c - GROUP * n_groups
    columns = buffers.take("columns", r * n_columns, torch.int64, scores.device).view(r, n_columns)
    steps = torch.arange(0, GROUP * n_groups, n_groups, device=scores.device)
    torch.add(groups[:, None, :], steps[:, None], out=columns[:, :n_elements].unflatten(1, (GROUP, m)))
    columns[:, n_elements:] = torch.arange(GROUP * n_groups, c, device=scores.device)
    room = buffers.take("elements", r * n_columns, scores.dtype, scores.device).view(r, n_columns)
    values, best = torch.gather(scores, 1, columns, out=room).topk(m, dim=1, largest=largest, sorted=False)
    return Side(values, columns.gather(1, best))


def _settle_ties(scores: Tensor, result: Side, values: Tensor, k: int, largest: bool) -> None:
    """Redo in place the rows whose next value [r, k + 1] equals the k-th: the lowest ids among the equals win."""
    if values.shape[1] <= k:
        return
    rows = (values[:, k] == values[:, k - 1]).nonzero().squeeze(1)
    wanted = (result.scores == values[:, k - 1 : k]).sum(1)
    # Rows of equal scores are settled by their first columns.
    for end in (min(PREFIX, scores.shape[1]), scores.shape[1]):
        if not rows.numel():
            return
        equal = scores[rows, :end] == values[rows, k - 1 : k]
        enough = equal.sum(1) >= wanted[rows]
        done = rows[enough]
        place, columns = equal[enough].nonzero().unbind(1)
        starts = torch.searchsorted(place, torch.arange(len(done), device=rows.device))
        rank = torch.arange(len(place), device=rows.device) - starts[place]
        kept = rank < wanted[done][place]
        # The equals stand last among the k best.
        result.ids[done[place[kept]], (k - wanted[done])[place[kept]] + rank[kept]] = columns[kept]
        rows = rows[~enough]
