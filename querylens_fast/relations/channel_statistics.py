"""Tests on the overlaps of `subspace_channels`: permutations, AUC and rank correlation with the distance of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from querylens_fast.models.load import as_model
from querylens_fast.relations.channels import SPACES, FitErrors, Space, subspace_channels
from querylens_fast.relations.tables import RelationTable

PERMUTATIONS_AT_ONCE = 64


class ChannelTest(NamedTuple):
    """Overlaps of pairs of maps that share something against those of all other pairs."""

    same: float
    """Mean OL of the pairs that share it."""
    different: float
    """Mean OL of the pairs that do not."""
    random: float
    """Expected of two random subspaces: r / D where all maps have r dimensions."""
    p_value: float
    """Share of the permutations with a difference of the means at least as large, the observed one counted."""
    auc: float
    """Probability that a pair that shares it has the larger OL than one that does not, ties half."""
    spearman: float | None
    """Rank correlation of OL with the distance of the destinations, over pairs of maps from one source; None with fewer
    than three such pairs or equal distances."""
    spearman_p: float | None
    """Share of the permutations of those pairs with at least as large an absolute correlation; None with it."""


def channel_test(
    found: RelationTable,
    *,
    shares: Literal["destination", "source"] = "destination",
    space: Space = "write",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> ChannelTest:
    """Whether maps that share their destination (or their source) overlap more than the others.

    The labels are permuted among the maps; the statistic is the difference of the mean overlaps.

    Raises:
        ValueError: The table is none of `subspace_channels`, no two of its maps share it or all do, or n_permutations
            is negative.
    """
    maps = channel_maps(found, space)
    if shares not in ("destination", "source"):
        raise ValueError(f"shares is {shares!r}; expected 'destination' or 'source'")
    if n_permutations < 0:
        raise ValueError(f"n_permutations is {n_permutations}; expected 0 or more")
    shared = maps.same_destination if shares == "destination" else maps.same_source
    # A map's label is the first map that it shares it with.
    labels = shared.int().argmax(1)
    a, b = torch.triu_indices(len(labels), len(labels), offset=1)
    scores, same = maps.overlaps[a, b], labels[a] == labels[b]
    n_same = int(same.sum())
    if not 0 < n_same < len(same):
        raise ValueError(f"{'no' if not n_same else 'all'} two of these {len(labels)} maps share their {shares}")
    observed = _difference(scores, same[None])
    reached = 0
    generator = torch.Generator().manual_seed(seed)
    for many in _chunks(n_permutations):
        shuffled = labels[torch.rand(many, len(labels), generator=generator).argsort(1)]
        # Permutations that lead to the same grouping may differ by rounding.
        reached += int((_difference(scores, shuffled[:, a] == shuffled[:, b]) >= observed - 1e-12).sum())
    return ChannelTest(
        float(scores[same].mean()),
        float(scores[~same].mean()),
        random_overlap(maps, found.metadata["d_model"]),
        (1 + reached) / (1 + n_permutations),
        separation(scores[same], scores[~same]),
        *_by_distance(maps, n_permutations, seed),
    )


def channel_sweep(
    cases: Sequence[tuple[Sequence[Any], Any, Any]],
    ranks: Sequence[int],
    *,
    n_permutations: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> RelationTable:
    """`channel_test` and the errors of the maps, over ranks and models, in one table.

    Args:
        cases: (dictionaries, model, transport) of each model, as `subspace_channels` takes them.
        ranks: Of the maps.
        n_permutations: Of each test.
        seed: As in `subspace_channels` and `channel_test`.
        progress: Show a progress bar per model and rank.

    Returns:
        `RelationTable` with a row for each model, rank, space and shared end: model, rank, space, shares, the fields of
        `ChannelTest` (null where no two maps share it, or all do), and the maps' mean explained, train_error,
        held_out_error and held_out_cosine.
    """
    import pyarrow as pa

    lines = []
    for dictionaries, model, transport in cases:
        model = as_model(model)
        for rank in ranks:
            found = subspace_channels(dictionaries, model, transport, rank=rank, seed=seed, progress=progress)
            lines += _sweep_rows(found, n_permutations, seed)
    metadata = {"what": "channel sweep", "ranks": list(ranks), "n_permutations": n_permutations, "seed": seed}
    return RelationTable(metadata, in_memory=pa.Table.from_pylist(lines))


def _sweep_rows(found: RelationTable, n_permutations: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one model and rank."""
    import pyarrow.compute as pc

    own = found.table().filter((pc.field("shares") == "both") & (pc.field("space") == SPACES[0]))
    means = {name: sum(own[name].to_pylist()) / len(own) for name in ("explained", *FitErrors._fields)}
    lines = []
    for space in SPACES:
        maps = channel_maps(found, space)
        for shares in ("destination", "source"):
            tested = dict.fromkeys(ChannelTest._fields)
            if _comparable(maps, shares):
                settings = {"space": space, "n_permutations": n_permutations, "seed": seed}
                tested = channel_test(found, shares=shares, **settings)._asdict()
            where = {"model": found.metadata["model"], "rank": found.metadata["rank"]}
            lines.append({**where, "space": space, "shares": shares, **tested, **means})
    return lines


def _comparable(maps: ChannelMaps, shares: str) -> bool:
    """Whether some pairs of maps share it and others do not."""
    shared = (maps.same_destination if shares == "destination" else maps.same_source).triu(1)
    n = len(maps.layers)
    return 0 < int(shared.sum()) < n * (n - 1) // 2


def separation(a: Tensor, b: Tensor) -> float:
    """P(a > b) + P(a = b) / 2 of random members of a [n] and b [m]: the area under the ROC curve."""
    ordered = b.sort().values
    below, up_to = (torch.searchsorted(ordered, a.contiguous(), right=right) for right in (False, True))
    return float((below + up_to).double().mean() / (2 * len(b)))


def overlaps_by_distance(maps: ChannelMaps) -> dict[int, Tensor]:
    """The overlaps of pairs of maps from one source, by the distance of their destinations, ascending."""
    overlaps, distance = _pairs_of_one_source(maps)
    return {d: overlaps[distance == d] for d in distance.unique().tolist()}


def _pairs_of_one_source(maps: ChannelMaps) -> tuple[Tensor, Tensor]:
    """(overlap, distance of the destinations) of every two maps from one source."""
    to = torch.tensor([destination for _, destination in maps.layers])
    pairs = maps.same_source.triu(1)
    return maps.overlaps[pairs], (to[:, None] - to).abs()[pairs]


def _by_distance(maps: ChannelMaps, n_permutations: int, seed: int) -> tuple[float | None, float | None]:
    """Spearman's correlation of overlap and distance, and its permutation p-value."""
    overlaps, distance = _pairs_of_one_source(maps)
    if len(overlaps) < 3 or len(distance.unique()) < 2:
        return None, None
    x, y = (_ranks(values.double()) for values in (overlaps, distance))
    x, y = x - x.mean(), y - y.mean()
    size = (x.norm() * y.norm()).clamp_min(1e-300)
    observed = float(x @ y / size)
    generator, reached = torch.Generator().manual_seed(seed), 0
    for many in _chunks(n_permutations):
        order = torch.rand(many, len(x), generator=generator).argsort(1)
        reached += int(((x[order] @ y / size).abs() >= abs(observed) - 1e-12).sum())
    return observed, (1 + reached) / (1 + n_permutations)


def _ranks(values: Tensor) -> Tensor:
    """Ranks [n] from 0, equal values sharing their mean rank."""
    ordered = values.sort().values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to - 1).double() / 2


def _difference(scores: Tensor, same: Tensor) -> Tensor:
    """Mean of the scores [p] that are in ``same`` [m, p] less the mean of the others, [m]."""
    n_same = same.sum(1)
    sums = same.to(scores) @ scores
    return sums / n_same - (scores.sum() - sums) / (scores.shape[0] - n_same)


def _chunks(n: int) -> list[int]:
    """n permutations in chunks that bound the memory."""
    return [min(PERMUTATIONS_AT_ONCE, n - start) for start in range(0, n, PERMUTATIONS_AT_ONCE)]


class ChannelMaps(NamedTuple):
    """The M maps of a table, as it numbers them: by source, then destination."""

    layers: list[tuple[int, int]]
    """(source layer, destination) of each."""
    overlaps: Tensor
    """[M, M] float64."""
    same_destination: Tensor
    """[M, M] bool."""
    same_source: Tensor
    dimensions: Tensor
    """[M] int64: of each map's subspaces."""


def channel_maps(found: RelationTable, space: Space) -> ChannelMaps:
    """The overlaps of a table of `subspace_channels` as matrices; ValueError for another table or space."""
    import pyarrow.compute as pc

    if found.metadata.get("what") != "subspace channels":
        raise ValueError(f"found is a table of {found.metadata.get('what')!r}; expected one of subspace_channels")
    if space not in SPACES:
        raise ValueError(f"space is {space!r}; expected 'write' or 'read'")
    table = found.table().filter(pc.field("space") == space).to_pydict()
    first, second = torch.tensor(table["map"]), torch.tensor(table["other_map"])
    own = [i for i, shares in enumerate(table["shares"]) if shares == "both"]
    layers = [(table["source_layer"][i], table["target_layer"][i]) for i in own]

    def matrix(values: Tensor) -> Tensor:
        full = torch.zeros(len(layers), len(layers), dtype=values.dtype)
        full[first, second] = full[second, first] = values
        return full

    shares = table["shares"]
    return ChannelMaps(
        layers,
        matrix(torch.tensor(table["score"], dtype=torch.float64)),
        matrix(torch.tensor([s in ("destination", "both") for s in shares])),
        matrix(torch.tensor([s in ("source", "both") for s in shares])),
        torch.tensor([table["dimensions"][i] for i in own]),
    )


def random_overlap(maps: ChannelMaps, d_model: int) -> float:
    """The mean OL to expect of two maps with random subspaces of the same dimensions: the larger over d_model."""
    a, b = torch.triu_indices(len(maps.layers), len(maps.layers), offset=int(len(maps.layers) > 1))
    return float(torch.maximum(maps.dimensions[a], maps.dimensions[b]).double().mean()) / d_model
