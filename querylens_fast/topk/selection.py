"""The k best of candidates: sorted from the extreme inwards, equals by the lower id, NaN after every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk.keys import keys_of
from querylens_fast.topk.request import Side


class Candidates(NamedTuple):
    """Columns that may be among the k best of their rows, in no order."""

    rows: Tensor
    """[m] int64 row of the block."""
    columns: Tensor
    """[m] int64."""
    reach: Tensor
    """[m]: no gain beyond this is possible there; with no error to account for, the gain itself."""

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        """Several as one."""
        return cls(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


class Best(NamedTuple):
    """The k best of the candidates of each line."""

    scores: Tensor
    """[lines, k]."""
    columns: Tensor
    """[lines, k] int64."""
    enough: Tensor
    """[lines] bool: there were k candidates; else the line holds anything."""


def best_of_pairs(lines: Tensor, columns: Tensor, scores: Tensor, n_lines: int, k: int, largest: Tensor | bool) -> Best:
    """The k best of each line of (line, column, score) triples.

    Args:
        lines: [m] int64, in no order.
        columns: [m] int64, ascending (over all lines).
        scores: [m] float32 or float64.
        n_lines: lines of the result.
        k: how many of each.
        largest: the largest or the smallest, for all or for each triple.

    Cost: a radix sort of m integers (two in float64).
    """
    # Adding zero makes -0.0 equal 0.0.
    signs = torch.as_tensor(largest, device=scores.device)
    gains = torch.where(signs, scores, -scores) + 0.0
    keys = keys_of(gains, True, total=True)
    last = torch.iinfo(keys.dtype)
    keys = keys.masked_fill(gains.isnan(), last.min)
    if keys.dtype == torch.int32:
        order = torch.sort((lines << 32) | (last.max - keys.long()), stable=True).indices
    else:
        order = torch.sort(-1 - keys, stable=True).indices
        order = order.index_select(0, torch.sort(lines.index_select(0, order), stable=True).indices)
    counts = torch.bincount(lines, minlength=n_lines)
    enough = counts >= k
    if not len(order):
        empty = scores.new_zeros(n_lines, k)
        return Best(empty, empty.long(), enough)
    places = (counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=lines.device)
    # index_select is several times as fast as indexing.
    found = order.index_select(0, places.clamp_max(len(order) - 1).flatten())
    best = (x.index_select(0, found).view(n_lines, k) for x in (scores, columns))
    return Best(*best, enough)  # type: ignore


def best_by_sort(scores: Tensor, k: int, *, largest: bool, ids: Tensor | None = None) -> Side:
    """The k best by a stable sort of whole rows (NaN last); ids default to positions and must ascend among equals."""
    # torch sorts NaN above every number, so both sides sort upwards to have it last.
    order = torch.sort(-scores if largest else scores, dim=1, stable=True).indices[:, :k]
    return Side(scores.gather(1, order), order if ids is None else ids.gather(1, order))
