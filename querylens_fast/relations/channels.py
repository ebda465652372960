"""Subspace channels: do later layers read features through subspaces of their own?

Query Lens (arXiv 2606.07617, §5, App. J) asks how layer k responds to a feature v written at layer j. To first order
the response is linear, r = J_k v, with the layer's mean Jacobian J_k: the sum of a transport's first-order terms of its
two modules. For every pair j → k a map of rank r is fitted to all features of the dictionary at once,

    min over A [D, r], B [r, D] of  Σ_v ‖v A B − v J_kᵀ‖²,    r = D // L by default,

and two maps are compared by the overlap of the subspaces that they write to (space "write": the row space of B, which
the paper compares) or read from (space "read": the column space of A),

    OL(a, b) = ‖Q_aᵀ Q_b‖_F² / r,    Q orthonormal bases; 1 for equal subspaces, r / D expected for two random ones,

the mean squared cosine of the principal angles. A map of fewer than r dimensions (few features, or a response of few
dimensions) counts with those it has.

Estimator. Σ_v enters through C = VᵀV alone, and the best map is known in closed form (reduced-rank regression): with U
the r leading eigenvectors of J C Jᵀ, A B = P Jᵀ U Uᵀ, P the projector on the span of the features. The paper trains A
and B by gradient descent on nine tenths of the features instead; the columns train_error, held_out_error and
held_out_cosine are those of a second closed-form map, fitted to nine tenths and measured on either part (Tables 12,
13).

Limits. All features of a dictionary count (the paper samples them); vectors are not normalised. J_k is taken as the
transport was fitted: through the norms, unless that said ``through_norms=False``, the default of the paper's code. J_k
is the same matrix for every source, so maps with one destination differ by their features alone; this is why the
"write" overlap of a destination can be near 1, and why `channel_test` also groups by source.
"""

from __future__ import annotations

import itertools
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

Space = Literal["read", "write"]
SPACES: tuple[Space, ...] = ("write", "read")
FEATURES_AT_ONCE = 1 << 13
HELD_OUT = 0.1
"""Share of the features that the map of the error columns is not fitted to."""
TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding, not dimensions of a map."""


class FitErrors(NamedTuple):
    """How well a map that is fitted to nine tenths of the features predicts the responses."""

    train_error: float
    """Σ‖v A B − v Jᵀ‖² / Σ‖v Jᵀ‖² over the features it is fitted to."""
    held_out_error: float
    """The same over the others."""
    held_out_cosine: float
    """Mean cosine of v A B and v Jᵀ over the others; features without a response are left out."""


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
    """1 − Σ‖v A B − v Jᵀ‖² / Σ‖v Jᵀ‖² over all features."""
    errors: FitErrors

    def basis(self, space: Space) -> Tensor:
        return self.reads if space == "read" else self.writes


def subspace_channels(
    dictionaries: Sequence[Any],
    model: Any,
    transport: Transport | str | Path,
    *,
    rank: int | None = None,
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
        seed: Chooses the tenth of the features that the error columns hold out.
        out: A ``.parquet`` file to write to.
        resume: As in `downstream`.
        progress: Show a progress bar; by default with ``out``.

    Returns:
        `RelationTable` with a row for every two maps a ≤ b and each space: map, other_map (a and b, numbered by source,
        then destination), source, source_layer, target_layer (a's dictionary, its layer and its destination),
        other_source, other_source_layer, other_target_layer (b's), space ("read", "write"), shares ("destination",
        "source", "nothing"; "both": a map with itself), score (OL), explained (a's share of the squared responses
        that the map of rank r reproduces), train_error, held_out_error and held_out_cosine (a's, see `FitErrors`),
        dimensions and other_dimensions (at most r). See `channel_test`.

    Raises:
        ValueError: No dictionary with a layer after it, two at one point, a rank outside 1 … D, fewer than two
            features, a transport of another model or without the value side's first order.
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
    small = min(given, key=lambda d: d.n_features)
    if small.n_features < 2:
        raise ValueError(f"dictionary {small.name!r} has one feature; expected at least 2, to hold some out")
    terms = _layer_terms(transport, model)
    show = out is not None if progress is None else progress

    def compute() -> pa.Table:
        with tqdm(total=len(pairs), desc="channels", unit="map", disable=not show) as bar:
            maps = []
            for dictionary, several in itertools.groupby(pairs, key=lambda pair: pair[0]):
                features = _Split.of(dictionary, seed)
                for _, k in several:
                    maps.append(_channel(features, k, terms[k].cpu(), rank))
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
        seed=seed,
    )
    return tabulate([Block(len(pairs), compute)], metadata, out=out, resume=resume, progress=False)


def _layer_terms(transport: Transport, model: Model) -> Tensor:
    """J_k of every layer, [L, D, D] float64."""
    if ("value", "first_order") not in transport.matrices:
        raise ValueError(
            "this transport has no first-order terms of the value side: fit it with orders=('first_order',)"
        )
    terms = transport.matrices["value", "first_order"].double()
    return terms.unflatten(0, (model.n_layers, 2)).sum(1)


@dataclass(frozen=True)
class _Split:
    """A dictionary's features, and their second moments C = VᵀV / n [D, D] float64: of all, and of two parts."""

    dictionary: Dictionary
    held_out: Tensor
    """[m] ids of the features that are held out."""
    every: Tensor
    seen: Tensor
    unseen: Tensor

    @classmethod
    def of(cls, dictionary: Dictionary, seed: int) -> _Split:
        """Hold out a tenth of the features, at least one, chosen by the seed and the dictionary's point."""
        generator = torch.Generator().manual_seed(seed + dictionary.point("value"))
        order = torch.randperm(dictionary.n_features, generator=generator)
        n = max(1, round(HELD_OUT * len(order)))
        held_out, others = order[:n].sort().values, order[n:].sort().values
        unseen, seen = _second_moment(dictionary, held_out), _second_moment(dictionary, others)
        every = (unseen * n + seen * len(others)) / len(order)
        return cls(dictionary, held_out, every, seen, unseen)

    def errors(self, J: Tensor, rank: int) -> FitErrors:
        """Those of the map fitted to the features that are not held out."""
        A, B = reduced_rank_map(J, self.seen, rank)
        train, held_out = (_unexplained(A @ B, J, C) for C in (self.seen, self.unseen))
        cosines = []
        for ids in self.held_out.split(FEATURES_AT_ONCE):
            V = self.dictionary.values(ids).double().cpu()
            responses = V @ J.mT
            answered = responses.norm(dim=1) > 0
            cosines.append(torch.cosine_similarity(V @ A @ B, responses, dim=1)[answered])
        return FitErrors(train, held_out, float(torch.cat(cosines).mean()))


def _second_moment(dictionary: Dictionary, features: Tensor) -> Tensor:
    """C = VᵀV / n over features [n], [D, D] float64."""
    C = torch.zeros(dictionary.d_model, dictionary.d_model, dtype=torch.float64)
    for ids in features.split(FEATURES_AT_ONCE):
        V = dictionary.values(ids).double().cpu()
        C += V.mT @ V
    return C / len(features)


def _unexplained(AB: Tensor, J: Tensor, C: Tensor) -> float:
    """Σ‖v A B − v Jᵀ‖² / Σ‖v Jᵀ‖² for the second moments C; 0 where there is no response."""
    error, size = AB - J.mT, float((J @ C @ J.mT).trace())
    return float((error.mT @ C @ error).trace()) / size if size > 0 else 0.0


def _channel(features: _Split, k: int, J: Tensor, rank: int) -> Channel:
    """The map from a dictionary to layer k. Raises ValueError where the layer does not respond at all."""
    if float((J @ features.every @ J.mT).trace()) <= 0:
        raise ValueError(f"layer {k} does not respond to {features.dictionary.name!r} at all: its responses are 0")
    A, B = reduced_rank_map(J, features.every, rank)
    left, right = torch.linalg.qr(A), torch.linalg.qr(B.mT)
    U, values, Vh = torch.linalg.svd(left.R @ right.R.mT)
    kept = values > TOLERANCE * values[0]
    bases = left.Q @ U[:, kept], right.Q @ Vh.mT[:, kept]
    explained = 1 - _unexplained(A @ B, J, features.every)
    return Channel(features.dictionary, k, *bases, explained, features.errors(J, rank))


def reduced_rank_map(J: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [D, r], B [r, D]) of least Σ‖v A B − v Jᵀ‖² for second moments C; of these the one of least norm."""
    U = torch.linalg.eigh(J @ C @ J.mT).eigenvectors[:, -rank:]
    values, vectors = torch.linalg.eigh(C)
    spanned = vectors[:, values > values[-1] * len(C) * torch.finfo(C.dtype).eps]
    return spanned @ (spanned.mT @ (J.mT @ U)), U.mT


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
    of_map = [{"explained": m.explained, **m.errors._asdict()} for m in maps]
    measured = {name: torch.tensor([m[name] for m in of_map], dtype=torch.float64) for name in of_map[0]}
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
        **{name: values[a][both] for name, values in measured.items()},
        dimensions=dimensions[a][both],
        other_dimensions=dimensions[b][both],
    )
