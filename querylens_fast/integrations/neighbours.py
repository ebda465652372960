"""Cosine neighbours of features, each list beginning with the feature itself, as Neuronpedia's page expects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.integrations.columns import rounded
from querylens_fast.models.norms import at_least_float32
from querylens_fast.relations.flow import cosine_topk
from querylens_fast.relations.tables import RelationTable, read_table
from querylens_fast.runs.run_record import agree

Lists = tuple[list[list[int]], list[list[float]]]


class ComputedNeighbours:
    """The k closest other features by the cosine of values (or keys), computed block by block.

    Memory: the dictionary's vectors in float32, [n, D].
    """

    def __init__(self, dictionary: Dictionary, k: int, side: str = "value") -> None:
        self.k = min(k, dictionary.n_features - 1)
        self.vectors = at_least_float32(dictionary.vectors(side, slice(None)))

    def others(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, cosines) of the k closest other features of each of ids, [n, k]."""
        found = cosine_topk(self.vectors[ids], self.vectors, self.k + 1)
        assert found.top_ids is not None and found.top_scores is not None
        kept = found.top_ids != ids[:, None]
        # Where copies of lower id push the feature itself off the list, the last match goes instead.
        kept[:, -1] &= ~kept.all(1)
        shape = len(ids), self.k
        return found.top_ids[kept].view(shape), found.top_scores[kept].view(shape)

    def lists(self, ids: Tensor) -> Lists:
        """(ids, cosines) of each feature and its neighbours, itself first with 1."""
        others, cosines = self.others(ids)
        return torch.cat([ids[:, None], others], 1).tolist(), rounded(torch.cat([torch.ones(len(ids), 1), cosines], 1))


class TabulatedNeighbours:
    """Neighbours out of a table of `ql.neighbours` (top side, one dictionary)."""

    def __init__(self, table: RelationTable | str | Path, dictionary: Dictionary | None, k: int = 50) -> None:
        found = table if isinstance(table, RelationTable) else read_table(table)
        said = found.metadata
        if said.get("what") != "neighbours" or said.get("other"):
            raise ValueError(
                f"neighbours is a table of {said.get('what')!r}; expected ql.neighbours(dictionary) of this dictionary"
            )
        if dictionary is not None and not agree(said.get("fingerprints", [None])[0], dictionary.fingerprint):
            raise ValueError(f"neighbours is of {said.get('dictionaries')}, not of {dictionary.name!r}")
        columns = found.table(["source_id", "target_id", "score"])
        source, target, score = (columns[name].to_numpy() for name in ("source_id", "target_id", "score"))
        order = np.argsort(source, kind="stable")
        self.source, self.target, self.score, self.k = source[order], target[order], score[order], k

    def lists(self, ids: Tensor) -> Lists:
        """(ids, cosines) of each feature and its neighbours, itself first with 1."""
        wanted = ids.numpy()
        starts = np.searchsorted(self.source, wanted)
        stops = np.minimum(np.searchsorted(self.source, wanted, side="right"), starts + self.k)
        spans = list(zip(wanted.tolist(), starts, stops, strict=True))
        return (
            [[i, *self.target[a:b].tolist()] for i, a, b in spans],
            [[1.0, *np.round(self.score[a:b].astype(np.float64), 5).tolist()] for _, a, b in spans],
        )


def open_neighbours(
    neighbours: int | RelationTable | str | Path | None, dictionary: Dictionary | None
) -> ComputedNeighbours | TabulatedNeighbours | None:
    """What gives neighbour lists: a number to compute, a table of `ql.neighbours`, or None.

    Raises:
        ValueError: A negative number, or a table of something else.
    """
    if neighbours is None or (isinstance(neighbours, int) and neighbours == 0):
        return None
    if not isinstance(neighbours, int):
        return TabulatedNeighbours(neighbours, dictionary)
    if neighbours < 0:
        raise ValueError(f"neighbours is {neighbours}; expected a number from 0, or a table of ql.neighbours")
    if dictionary is None or dictionary.n_features < 2:
        return None
    return ComputedNeighbours(dictionary, neighbours)


def identity_of(neighbours: Any) -> Any:
    """What tells one choice of neighbours from another, for an export's record."""
    if isinstance(neighbours, (int, type(None))):
        return neighbours
    found = neighbours if isinstance(neighbours, RelationTable) else read_table(neighbours)
    return found.metadata


def empty_lists(ids: Sequence[int] | Tensor) -> Lists:
    """Lists without neighbours."""
    return [[] for _ in range(len(ids))], [[] for _ in range(len(ids))]
