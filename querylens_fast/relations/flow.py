"""Feature flow: features of neighbouring dictionaries matched by the cosine of their decoder rows.

Laptev et al., "Analyze Feature Flow" (arXiv 2502.03032): a feature of the residual stream is compared, by the cosine of
decoder columns, with every feature of the residual stream before the layer and of the layer's attention and MLP; the
best matches say where it comes from, and matches between consecutive layers make a flow graph,

    cos(f, g) = ⟨f_dec, g_dec⟩ / (‖f_dec‖ ‖g_dec‖),    T(f) = argmax_g cos(f, g).

Choices where the paper leaves room. *Previous* and *next* are the nearest dictionaries given, by the point of the
residual stream they write to, so layers may be left out; a module's dictionary belongs to the residual dictionary that
follows it. Cosines keep their sign and only the largest are kept (an opposite feature is no match). A vector of length
zero has cosine 0 with everything. The decoder's own bias plays no part. `feature_chains` goes forward in depth, and by
default follows a match only when it is mutual, each the other's best, and at least ``threshold``: chains are then
disjoint. The paper reads its groups (translated, processed, newborn) off activations on data; here are cosines only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.models.folders import parse_device
from querylens_fast.models.norms import at_least_float32, of_moderate_length
from querylens_fast.relations.chains import chain_rows
from querylens_fast.relations.latest import Latest
from querylens_fast.relations.readers import features_per_block, identity_of_features
from querylens_fast.relations.tables import Block, RelationTable, tabulate, topk_rows
from querylens_fast.topk.api import TopK, streamed_topk
from querylens_fast.transport.jacobians import Side

if TYPE_CHECKING:
    import pyarrow as pa


def feature_flow(
    dictionaries: Sequence[Any],
    *,
    k: int = 8,
    backend: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """The k closest features of every feature in each neighbouring dictionary, by cosine.

    Args:
        dictionaries: Two or more of one model (or what `load_dictionary` takes), in any order: of the residual stream,
            of MLP and attention outputs, transcoders.
        k: Matches kept in each neighbouring dictionary; all of them where it has fewer.
        backend: Of the streamed top-k.
        device: Where the products are computed.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable` with the further column ``relation``: what the target is to the source, "previous residual",
        "attention", "mlp" or "next residual". Scores are cosines; there is only a top side.

    Raises:
        ValueError: Fewer than two dictionaries, or widths that do not agree, or none that follow one another.

    Memory: one dictionary's vectors and a block of another's; never features × features.
    """
    given = _checked(dictionaries, "value")
    pairs = related(given)
    if not pairs:
        raise ValueError("none of these dictionaries follows another in the residual stream: nothing to compare")
    cosines = _Cosines("value", backend, device)
    blocks = [
        Block(len(ids), partial(cosines.matches, source, target, k, ids, relation))
        for source, relation, target in pairs
        for ids in source.select().split(features_per_block(k))
    ]
    metadata = _identity("feature flow", given, "value", k=k, pairs=[(a.name, r, b.name) for a, r, b in pairs])
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress, unit="feature×dictionary")


def neighbours(
    dictionary: Any,
    other: Any = None,
    *,
    k: int = 8,
    threshold: float | None = None,
    side: Side = "value",
    features: Any = None,
    backend: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """The k closest other features of every feature, by cosine: duplicates and split features.

    Args:
        dictionary: Whose features are asked about.
        other: Another dictionary to search, e.g. a wider one of the same place; None: the dictionary itself, without
            the feature.
        k: Neighbours kept; all of them where there are fewer.
        threshold: Keep only cosines of at least this: 0.9 or so lists near-duplicates.
        side: "value" (decoder rows) or "key" (encoder columns).
        features: As in `signatures`.
        backend: Of the streamed top-k.
        device: Where the products are computed.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable`; scores are cosines, top side only; equal ones by the lower id.

    Raises:
        ValueError: Widths that do not agree, or nobody to compare with.
    """
    given = [load_dictionary(dictionary), load_dictionary(dictionary if other is None else other)]
    source, target = _checked(given, side)
    chosen = source.select(features)
    relation = "itself" if other is None else "other"
    if other is None and source.n_features < 2:
        raise ValueError(f"{source.name!r} has one feature: it has no neighbours")
    cosines = _Cosines(side, backend, device)
    blocks = [
        Block(len(ids), partial(cosines.matches, source, target, k, ids, relation, threshold))
        for ids in chosen.split(features_per_block(k))
    ]
    settings = {"k": k, "threshold": threshold, "other": other is not None}
    metadata = _identity("neighbours", given, side, **settings, **identity_of_features(source, chosen))
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress)


def feature_chains(
    dictionaries: Sequence[Any],
    *,
    threshold: float = 0.5,
    mutual: bool = True,
    min_length: int = 2,
    backend: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """Features followed from layer to layer by their best match.

    A chain begins at every feature that no chain arrives at, and goes on while the best match in the next dictionary is
    accepted. Without ``mutual`` several chains may run into one feature; they then share the rest.

    Args:
        dictionaries: Two or more of one model, one at each point of the residual stream, in any order.
        threshold: Smallest cosine that is followed.
        mutual: Follow f → g only when f is g's best match, too.
        min_length: Features of the shortest chain that is kept; 1 keeps features that match nothing.
        backend: Of the streamed top-k.
        device: Where the products are computed.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable` of one row a feature of a chain: chain, step (0 first), length of the chain, source,
        source_layer, source_id, and score, the cosine with the step before (null at step 0). Longest chains first,
        then by the layer and id they begin with.

    Raises:
        ValueError: As `feature_flow`, or two dictionaries at the same point.
    """
    given = sorted(_checked(dictionaries, "value"), key=lambda d: d.point("value"))
    points = [d.point("value") for d in given]
    if len(set(points)) < len(points):
        raise ValueError("two of these dictionaries are at the same point of the residual stream; pass one for each")

    def compute() -> pa.Table:
        total = sum(d.n_features for d in given[:-1]) + mutual * sum(d.n_features for d in given[1:])
        show = out is not None if progress is None else progress
        with tqdm(total=total, desc="feature chains", unit="feature", disable=not show) as bar:
            cosines = _Cosines("value", backend, device)
            pairs = zip(given, given[1:], strict=False)
            steps = [cosines.accepted(a, b, threshold, mutual, bar) for a, b in pairs]
        return chain_rows(given, steps, min_length)

    settings = {"threshold": threshold, "mutual": mutual, "min_length": min_length}
    metadata = _identity("feature chains", given, "value", **settings)
    return tabulate([Block(1, compute)], metadata, out=out, resume=resume, progress=False)


def cosine_topk(source: Tensor, target: Tensor, k: int, *, bottom: bool = False, backend: str = "auto") -> TopK:
    """The k largest (and smallest) cosines of each row of source [n, D] with the rows of target [V, D].

    Computed in float32 or wider, at any length of the rows. A row of zeros has cosine 0 with everything.
    """
    target = of_moderate_length(at_least_float32(target))
    source = of_moderate_length(at_least_float32(source).to(target))
    lengths = torch.linalg.vector_norm(target, dim=1)
    scale = torch.where(lengths > 0, 1 / lengths, lengths)
    unit = torch.nn.functional.normalize(source, dim=1, eps=torch.finfo(source.dtype).tiny)
    return streamed_topk(unit, target, k, scale=scale, bottom=bottom, backend=backend)


def related(dictionaries: Sequence[Dictionary]) -> list[tuple[Dictionary, str, Dictionary]]:
    """(source, relation, target) for every dictionary and each of its neighbours in depth."""
    residual = [d.point("value") for d in dictionaries if site(d) == "residual"]
    pairs = []
    for source in sorted(dictionaries, key=lambda d: d.point("value")):
        here, own = source.point("value"), site(source) == "residual"
        before = max((p for p in residual if p < here), default=-1)
        after = min((p for p in residual if (p > here if own else p >= here)), default=-1)
        for target in dictionaries:
            at, where = target.point("value"), site(target)
            if where == "residual" and at == before:
                pairs.append((source, "previous residual", target))
            elif own and where != "residual" and before < at <= here:
                pairs.append((source, where, target))
            elif where == "residual" and at == after:
                pairs.append((source, "next residual", target))
    return pairs


def site(dictionary: Dictionary) -> str:
    """What a dictionary's values are written by: "residual", "attention" or "mlp" (transcoders and neurons)."""
    return "mlp" if dictionary.kind in ("transcoder", "neurons") else dictionary.writes.site.written_by


def _checked(dictionaries: Sequence[Any], side: Side) -> list[Dictionary]:
    given = [load_dictionary(d) for d in dictionaries]
    for dictionary in given:
        dictionary.check_direction(side)
    if len(given) < 2:
        raise ValueError(f"dictionaries holds {len(given)}; expected two or more, to compare one with the next")
    widths = sorted({d.d_model for d in given})
    if len(widths) > 1:
        raise ValueError(f"these dictionaries have d_model {', '.join(map(str, widths))}: are they of one model?")
    return given


def _identity(what: str, dictionaries: Sequence[Dictionary], side: Side, **settings: Any) -> dict[str, Any]:
    prints = [d.fingerprint for d in dictionaries]
    names = [d.name for d in dictionaries]
    return {"what": what, "score": "cosine", "side": side, "dictionaries": names, "fingerprints": prints, **settings}


class _Cosines:
    """Blocks of cosines of one side, the target read once for the blocks that follow one another on it."""

    def __init__(self, side: Side, backend: str, device: str) -> None:
        self.side: Side = side
        self.backend, self.device = backend, parse_device(device)
        self.target: Latest[Tensor] = Latest()

    def topk(self, source: Dictionary, target: Dictionary, k: int, ids: Tensor) -> TopK:
        """The k features of target closest to the features ids of source."""
        others = self.target.get(target, lambda: self._vectors(target, slice(None)))
        return cosine_topk(self._vectors(source, ids), others, k, backend=self.backend)

    def matches(
        self,
        source: Dictionary,
        target: Dictionary,
        k: int,
        ids: Tensor,
        relation: str,
        threshold: float | None = None,
    ) -> pa.Table:
        """The rows of a block; "itself" leaves each feature out of its own matches."""
        itself = relation == "itself"
        found = self.topk(source, target, min(k + itself, target.n_features), ids)
        if itself:
            found = _without_self(found, ids)
        table = topk_rows(
            found,
            ids,
            source=source.name,
            source_layer=source.layer,
            target=target.name,
            target_layer=target.layer,
            relation=relation,
        )
        if threshold is None:
            return table
        import pyarrow.compute as pc

        return table.filter(pc.field("score") >= threshold)

    def accepted(
        self, source: Dictionary, target: Dictionary, threshold: float, mutual: bool, bar: tqdm[Any]
    ) -> tuple[Tensor, Tensor]:
        """Each feature's match in the next dictionary, −1 where none is accepted, and its cosine; both [n]."""
        best, scores = self._best(source, target, bar)
        accepted = scores >= threshold
        if mutual:
            back, _ = self._best(target, source, bar)
            accepted &= back[best] == torch.arange(len(best))
        return torch.where(accepted, best, -1), scores

    def _best(self, source: Dictionary, target: Dictionary, bar: tqdm[Any]) -> tuple[Tensor, Tensor]:
        parts = []
        for ids in source.select().split(features_per_block(1)):
            parts.append(self.topk(source, target, 1, ids))
            bar.update(len(ids))
        found = TopK.concatenate(parts).to("cpu")
        assert found.top_ids is not None and found.top_scores is not None
        return found.top_ids[:, 0], found.top_scores[:, 0]

    def _vectors(self, dictionary: Dictionary, ids: Tensor | slice) -> Tensor:
        return at_least_float32(dictionary.vectors(self.side, ids).to(self.device))


def _without_self(found: TopK, ids: Tensor) -> TopK:
    """The first k of k + 1 matches that are not the feature itself."""
    top_ids, top_scores = found.top_ids, found.top_scores
    assert top_ids is not None and top_scores is not None
    others = top_ids != ids.to(top_ids.device)[:, None]
    # Where copies of lower id push the feature itself off the list, the last match goes instead.
    others[:, -1] &= ~others.all(1)
    n, k = len(ids), top_ids.shape[1] - 1
    return found._replace(top_ids=top_ids[others].view(n, k), top_scores=top_scores[others].view(n, k))
