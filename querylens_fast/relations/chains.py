"""The rows of `feature_chains`: features that follow one another from dictionary to dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.relations.tables import Categories, rows

if TYPE_CHECKING:
    import pyarrow as pa


def chain_rows(dictionaries: Sequence[Dictionary], steps: Sequence[tuple[Tensor, Tensor]], min_length: int) -> pa.Table:
    """The chains of at least ``min_length`` features, as rows of `feature_chains`.

    Args:
        dictionaries: In the order of depth.
        steps: From each dictionary to the next, each feature's follower (−1: none) and its score, both [n].
        min_length: Features of the shortest chain kept.
    """
    found = []
    n_chains = 0
    for first, starts in enumerate(_beginnings(dictionaries, steps)):
        chain, current = torch.arange(n_chains, n_chains + len(starts)), starts
        score = torch.full((len(starts),), torch.nan, dtype=torch.float64)
        n_chains += len(starts)
        for at in range(first, len(dictionaries)):
            found.append((chain, torch.full_like(chain, at - first), torch.full_like(chain, at), current, score))
            if at == len(steps):
                break
            followers, scores = steps[at]
            on = followers[current] >= 0
            score = scores[current][on].double()
            chain, current = chain[on], followers[current][on]
    chain, step, at, feature, score = (torch.cat(column) for column in zip(*found, strict=True))
    length = torch.bincount(chain, minlength=n_chains)[chain]
    kept = length >= min_length
    # Chains are numbered by where they begin; stable sorts keep that order within a length.
    order = torch.argsort(step[kept], stable=True)
    order = order[torch.argsort(chain[kept][order], stable=True)]
    order = order[torch.argsort(length[kept][order], descending=True, stable=True)]
    chain, step, at, feature, score, length = (x[kept][order] for x in (chain, step, at, feature, score, length))
    return _table(dictionaries, chain, step, at, feature, score, length)


def _beginnings(dictionaries: Sequence[Dictionary], steps: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The features of each dictionary that no chain arrives at."""
    starts = [torch.arange(dictionaries[0].n_features)]
    for dictionary, (followers, _) in zip(dictionaries[1:], steps, strict=True):
        reached = torch.zeros(dictionary.n_features, dtype=torch.bool)
        reached[followers[followers >= 0]] = True
        starts.append((~reached).nonzero()[:, 0])
    return starts


def _table(
    dictionaries: Sequence[Dictionary],
    chain: Tensor,
    step: Tensor,
    at: Tensor,
    feature: Tensor,
    score: Tensor,
    length: Tensor,
) -> pa.Table:
    import pyarrow as pa

    numbered = torch.cat([torch.zeros(min(1, len(chain)), dtype=torch.int64), (chain.diff() != 0).long().cumsum(0)])
    layers = torch.tensor([d.layer for d in dictionaries], dtype=torch.int32)
    table = rows(
        len(chain),
        chain=numbered,
        step=step.int(),
        length=length.int(),
        source=Categories([d.name for d in dictionaries], at),
        source_layer=layers[at],
        source_id=feature,
    )
    return table.append_column("score", pa.array(score.numpy(), from_pandas=True))
