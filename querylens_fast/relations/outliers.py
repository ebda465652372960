"""Outliers among the largest scores of each vector: z-scores taken within those scores alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk.api import TopK


class Found(NamedTuple):
    """Relations of a block of features with one target, sorted by feature, then rank."""

    row: Tensor
    """[m] place of the feature in the block."""
    id: Tensor
    score: Tensor
    z: Tensor


class Outliers(NamedTuple):
    """What stands out for n vectors, and the mean and standard deviation [n] of their largest scores."""

    found: Found
    mean: Tensor
    deviation: Tensor


def outliers(
    search: Callable[[Tensor, int], TopK], vectors: Tensor, n_scores: int, limit: int, threshold: float
) -> Outliers:
    """Of the ``limit`` largest of each vector's n_scores scores those with z > threshold, z taken over these largest.

    ``search`` gives the k largest scores of vectors [n, D]. Scores that are all equal have none.
    """
    looked = search(vectors, min(limit, n_scores)).to("cpu")
    scores, ids = looked.top_scores, looked.top_ids
    assert scores is not None and ids is not None
    wide = scores.double()
    mean = wide.mean(1)
    above = wide - mean[:, None]
    deviation = above.norm(dim=1) / max(1, wide.shape[1] - 1) ** 0.5
    z = above / deviation[:, None]
    row, rank = (z > threshold).nonzero(as_tuple=True)
    return Outliers(Found(row, ids[row, rank], scores[row, rank], z[row, rank]), mean, deviation)


def ranks_within(row: Tensor) -> Tensor:
    """The place of each entry among those of its row; equal rows follow one another."""
    _, counts = row.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(row)) - starts.repeat_interleave(counts)
