"""Subspace channels: do later layers read features through subspaces of their own?

Query Lens (arXiv 2606.07617, §5, App. J) asks what layer k answers to a feature v written at layer j. To first order
the answer is linear, r = J_k v, where J_k is the layer's mean Jacobian: the sum of a transport's first-order terms of
its modules. For every pair j → k a map of low rank is fitted to all the features of the dictionary at once,

    min over A [D, r], B [r, D] of  Σ_v ‖v A B − v J_kᵀ‖²,    r = D // L by default,

and two maps are compared by the overlap of the subspaces they write to (space "write": the rows of B, which are the
column space that the paper compares, of W in r = W v) or read from ("read": the columns of A),

    OL(a, b) = ‖Q_aᵀ Q_b‖_F² / r,    Q orthonormal bases; 1: the same subspace, r / D: two random ones,

the mean squared cosine of the principal angles. A map of fewer than r dimensions (few features, or a layer that answers
in few) counts with those it has, a smaller one beside a larger with its own. Channels that belong to the destination
overlap more when the destination is the same. Σ_v enters as C = VᵀV alone, so nothing loops over features, and the best
map is known in closed form (reduced-rank regression): with the r leading eigenvectors U of J C Jᵀ, A B = P Jᵀ U Uᵀ, P
the projector on the span of the features. ``fit="gradient"`` trains the maps as the paper's code does, for comparison:
AdamW on the mean square over nine tenths of the features, of all steps the one best on the other tenth.

Choices. All features of a dictionary count (the paper samples them); vectors are not normalised. J_k is taken as the
transport was fitted: through the norms unless that said ``through_norms=False``, which is the default of the paper's
code. J_k of a layer is the sum of its attention's and its MLP's term, so it is the same for every source; maps with one
destination then differ by their features alone, which is why the "write" overlap of a destination can be near 1 and why
`channel_test` also groups by source.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.relations.readers import layers_behind
from querylens_fast.relations.tables import Block, Categories, RelationTable, identity_of, rows, tabulate
from querylens_fast.transport.transport import Transport, load_transport

if TYPE_CHECKING:
    import pyarrow as pa

Fit = Literal["closed_form", "gradient"]
Space = Literal["read", "write"]
SPACES: tuple[Space, ...] = ("write", "read")
FEATURES_AT_ONCE = 1 << 13
PERMUTATIONS_AT_ONCE = 64
STEPS = 1000
LEARNING_RATE = 1e-3
FIRST_SCALE = 0.01
"""Standard deviation of A's entries before training; B begins at 0."""
HELD_OUT = 0.1
"""Share of the features that training does not see."""
TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding, not dimensions of a map."""


@dataclass(frozen=True)
class Channel:
    """The low-rank map of one pair of layers: v → v A B."""

    dictionary: Dictionary
    destination: int
    reads: Tensor
    """[D, e] orthonormal basis of what it reads, float64; e ≤ r."""
    writes: Tensor
    """[D, e] orthonormal basis of what it writes."""
    explained: float
    """1 − Σ‖v A B − v Jᵀ‖² / Σ‖v Jᵀ‖²."""

    def basis(self, space: Space) -> Tensor:
        return self.reads if space == "read" else self.writes


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


def subspace_channels(
    dictionaries: Sequence[Any],
    model: Any,
    transport: Transport | str | Path,
    *,
    rank: int | None = None,
    fit: Fit = "closed_form",
    steps: int = STEPS,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """The overlaps of the subspaces through which later layers read features, for every two pairs of layers.

    Args:
        dictionaries: One for each source layer (or what `load_dictionary` takes); their values [n, D] are used.
        model: As in `signatures`.
        transport: With the value side's first-order terms, or its file.
        rank: r of the maps; None: D // n_layers.
        fit: "closed_form", or "gradient": the paper's training, from a seeded random start.
        steps: Of "gradient"; each takes all the features.
        seed: Of "gradient".
        out: A ``.parquet`` file to write to.
        resume: As in `downstream`.
        progress: Show a progress bar; by default with ``out``.

    Returns:
        `RelationTable` with a row for every two maps a ≤ b and each space: map, other_map (a and b, numbered by source,
        then destination), source, source_layer, target_layer (a's dictionary, its layer and its destination),
        other_source, other_source_layer, other_target_layer (b's), space ("read", "write"), shares ("destination",
        "source", "nothing"; "both": a map with itself), score (OL), explained (a's share of the squared responses
        that the map of rank r reproduces), dimensions and other_dimensions (at most r). See `channel_test`.

    Raises:
        ValueError: No dictionary with a layer after it, two at one point, a rank outside 1 … D, an unknown fit, fewer
            than two features or one step to train on, a transport of another model or without the value side's first
            order.
    """
    model = as_model(model)
    transport = load_transport(transport) if isinstance(transport, (str, Path)) else transport
    transport.check_model(model)
    given = sorted((load_dictionary(d).on(model) for d in dictionaries), key=lambda d: d.point("value"))
    points = [d.point("value") for d in given]
    if len(set(points)) < len(points):
        raise ValueError("two of these dictionaries write at the same point of the residual stream; pass one for each")
    pairs = [(d, k) for d in given for k in layers_behind(d, model)]
    if not pairs:
        raise ValueError("no layer lies after these dictionaries: nothing answers to their features")
    if rank is None:
        rank = max(1, model.d_model // model.n_layers)
    if not 1 <= rank <= model.d_model:
        raise ValueError(f"rank is {rank}; expected 1 to d_model = {model.d_model}")
    if fit not in ("closed_form", "gradient"):
        raise ValueError(f"fit is {fit!r}; expected 'closed_form' or 'gradient'")
    if fit == "gradient" and (steps < 1 or min(d.n_features for d in given) < 2):
        raise ValueError(
            f"steps is {steps}, the smallest dictionary has {min(d.n_features for d in given)} features; training "
            "takes at least 1 step and 2 features"
        )
    terms = _layer_terms(transport, model)
    show = out is not None if progress is None else progress

    def compute() -> pa.Table:
        with tqdm(total=len(pairs), desc="channels", unit="map", disable=not show) as bar:
            maps = []
            for dictionary, several in itertools.groupby(pairs, key=lambda pair: pair[0]):
                every = dictionary.select()
                C = _second_moment(dictionary, every)
                for _, k in several:
                    J = terms[k].cpu()
                    if fit == "closed_form":
                        factors = reduced_rank_map(J, C, rank)
                    else:
                        start = torch.Generator().manual_seed(seed + len(maps))
                        seen, unseen = _split(every, start)
                        moments = _second_moment(dictionary, seen), _second_moment(dictionary, unseen)
                        factors = trained_map(J, *moments, rank, steps, start)
                    maps.append(_channel(dictionary, k, J, C, *factors))
                    bar.update()
        return _overlaps(maps)

    metadata = identity_of(
        model,
        what="subspace channels",
        score="OL = ‖Q_aᵀ Q_b‖² / rank",
        dictionaries=[d.name for d in given],
        fingerprints=[d.fingerprint for d in given],
        transport=transport.metadata,
        rank=rank,
        d_model=model.d_model,
        fit=fit,
        **({"steps": steps, "seed": seed} if fit == "gradient" else {}),
    )
    return tabulate([Block(len(pairs), compute)], metadata, out=out, resume=resume, progress=False)


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
    total = scores.sum()

    def difference(same: Tensor) -> Tensor:
        sums = same.to(scores) @ scores
        return sums / n_same - (total - sums) / (len(scores) - n_same)

    observed = difference(same)
    generator = torch.Generator().manual_seed(seed)
    reached = 0
    for start in range(0, n_permutations, PERMUTATIONS_AT_ONCE):
        many = min(PERMUTATIONS_AT_ONCE, n_permutations - start)
        shuffled = labels[torch.rand(many, len(labels), generator=generator).argsort(1)]
        permuted = difference(shuffled[:, a] == shuffled[:, b])
        # Permutations that lead to the same grouping may differ by rounding.
        reached += int((permuted >= observed - 1e-12).sum())
    return ChannelTest(
        float(scores[same].mean()),
        float(scores[~same].mean()),
        random_overlap(maps, found.metadata["d_model"]),
        (1 + reached) / (1 + n_permutations),
    )


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


def _layer_terms(transport: Transport, model: Model) -> Tensor:
    """J_k of every layer, [L, D, D] float64."""
    if ("value", "first_order") not in transport.matrices:
        raise ValueError(
            "this transport has no first-order terms of the value side: fit it with orders=('first_order',)"
        )
    terms = transport.matrices["value", "first_order"].double()
    return terms.unflatten(0, (model.n_layers, 2)).sum(1)


def _second_moment(dictionary: Dictionary, features: Tensor) -> Tensor:
    """C = VᵀV / n over features [n], [D, D] float64."""
    C = torch.zeros(dictionary.d_model, dictionary.d_model, dtype=torch.float64)
    for ids in features.split(FEATURES_AT_ONCE):
        V = dictionary.values(ids).double().cpu()
        C += V.mT @ V
    return C / len(features)


def _split(features: Tensor, start: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features to train on and those held out, at least one, both ascending."""
    order = torch.randperm(len(features), generator=start)
    n = max(1, round(HELD_OUT * len(features)))
    return features[order[n:].sort().values], features[order[:n].sort().values]


def _channel(dictionary: Dictionary, k: int, J: Tensor, C: Tensor, A: Tensor, B: Tensor) -> Channel:
    size = float((J @ C @ J.mT).trace())
    if size <= 0:
        raise ValueError(f"layer {k} does not answer to {dictionary.name!r} at all: its responses are 0")
    error = A @ B - J.mT
    unexplained = float((error.mT @ C @ error).trace()) / size
    left, right = torch.linalg.qr(A), torch.linalg.qr(B.mT)
    U, values, Vh = torch.linalg.svd(left.R @ right.R.mT)
    kept = values > TOLERANCE * values[0]
    return Channel(dictionary, k, left.Q @ U[:, kept], right.Q @ Vh.mT[:, kept], 1 - unexplained)


def reduced_rank_map(J: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [D, r], B [r, D]) of least Σ‖v A B − v Jᵀ‖² for second moments C; of these the one of least norm."""
    U = torch.linalg.eigh(J @ C @ J.mT).eigenvectors[:, -rank:]
    values, vectors = torch.linalg.eigh(C)
    spanned = vectors[:, values > values[-1] * len(C) * torch.finfo(C.dtype).eps]
    return spanned @ (spanned.mT @ (J.mT @ U)), U.mT


def trained_map(
    J: Tensor, seen: Tensor, unseen: Tensor, rank: int, steps: int, start: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(A, B) as the paper's code trains them, on the second moments of the features seen and of those held out."""
    D = len(J)
    A = FIRST_SCALE * torch.randn(D, rank, generator=start, dtype=J.dtype)
    A, B = A.requires_grad_(), torch.zeros(rank, D, dtype=J.dtype, requires_grad=True)
    optimiser = torch.optim.AdamW([A, B], lr=LEARNING_RATE, weight_decay=0.0)

    def mean_square(C: Tensor) -> Tensor:
        error = A @ B - J.mT
        return ((C @ error) * error).sum() / D

    best, kept = math.inf, (A.detach().clone(), B.detach().clone())
    for _ in range(steps):
        with torch.enable_grad():
            optimiser.zero_grad()
            mean_square(seen).backward()
            optimiser.step()
        with torch.no_grad():
            reached = float(mean_square(unseen))
        if reached < best:
            best, kept = reached, (A.detach().clone(), B.detach().clone())
    return kept


def _overlaps(maps: Sequence[Channel]) -> pa.Table:
    """The table: every two maps once, each with itself too, in both spaces."""
    a, b = torch.triu_indices(len(maps), len(maps))
    names = [m.dictionary.name for m in maps]
    sources = torch.tensor([m.dictionary.layer for m in maps])
    where = torch.tensor([m.destination for m in maps])
    points = torch.tensor([m.dictionary.point("value") for m in maps])
    kinds = ("nothing", "destination", "source", "both")
    shares = (where[a] == where[b]).long() + 2 * (points[a] == points[b]).long()
    dimensions = torch.tensor([m.reads.shape[1] for m in maps])
    scores = []
    for space in SPACES:
        # Absent dimensions are zeros, which overlap with nothing.
        bases = torch.nn.utils.rnn.pad_sequence([m.basis(space).mT for m in maps], batch_first=True)
        shared = torch.cat([(bases[i] @ bases[i:].mT).square().sum((1, 2)) for i in range(len(maps))])
        scores.append(shared / torch.minimum(dimensions[a], dimensions[b]))
    n = len(a)
    both = torch.arange(n).repeat(2)
    explained = torch.tensor([m.explained for m in maps], dtype=torch.float64)
    return rows(
        2 * n,
        map=a[both],
        other_map=b[both],
        source=Categories(names, a[both]),
        source_layer=sources[a][both],
        target_layer=where[a][both],
        other_source=Categories(names, b[both]),
        other_source_layer=sources[b][both],
        other_target_layer=where[b][both],
        space=Categories(SPACES, torch.arange(2).repeat_interleave(n)),
        shares=Categories(kinds, shares[both]),
        score=torch.cat(scores),
        explained=explained[a][both],
        dimensions=dimensions[a][both],
        other_dimensions=dimensions[b][both],
    )
