"""The pairs of features that a head's QK and OV circuits connect.

Out-of-context circuits of features (Liu & Deng, arXiv 2601.22447; Elhage et al. 2021 for the circuits): with head h's
weights behind the layer's folded norm (`weights`), E its width and s its scale,

    QK    score(f, g) = s ⟨γ_Q ∘ W_Q^h v_f, γ_K ∘ W_K^h v_g⟩    f, written where the query stands, looks for g
    OV    score(f, g) = ⟨W_O^h W_V^h v_f, u_g⟩                  f, where the head attends, moves on to what reads g

v are values, u keys. Left out as everywhere in `relations`: the norms' division by sizes (of the stream, and of queries
and keys, whose scales γ are kept here), biases, and rotations, so QK is the score at the same position, before what
position does to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.moe import NoSingleWeights
from querylens_fast.models.norms import AnyNorm, Norm, at_least_float32
from querylens_fast.relations.latest import Latest
from querylens_fast.relations.readers import features_per_block, identity_of_features
from querylens_fast.relations.tables import (
    Block,
    Categories,
    RelationTable,
    identity_of,
    rows,
    tabulate,
    topk_rows,
)
from querylens_fast.relations.weights import fold_in, head_weights
from querylens_fast.topk.api import TopK, streamed_topk

if TYPE_CHECKING:
    import pyarrow as pa

Circuit = Literal["QK", "OV"]
FEATURES_AT_ONCE = 1 << 13


def attention_pairs(
    dictionary: Any,
    model: Any,
    *,
    layer: int,
    circuit: Circuit = "QK",
    heads: Sequence[int] | None = None,
    other: Any = None,
    k: int = 32,
    per: Literal["head", "feature"] = "head",
    features: Any = None,
    backend: str = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """The pairs of features with the largest and smallest scores in each head of a layer.

    Args:
        dictionary: Whose values write to what the layer's attention reads: f of the module's table.
        model: As in `signatures`.
        layer: Of the attention.
        circuit: "QK" (f queries g) or "OV" (f moved on to g).
        heads: Query heads; None: all.
        other: g's dictionary. QK: its values, at or before the layer; None: the same. OV: its keys, behind the
            attention; needed.
        k: Pairs on each side: of every head, or of every feature f in every head.
        per: "head" or "feature".
        features: f's ids, as in `signatures`.
        backend: Of the streamed top-k.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable`: source f, target g; further columns head, circuit and attention_layer. With per="head" rows are
        ranked within the head, equal scores by the lower f, then g.

    Raises:
        ValueError: A layer, head or circuit that does not exist, or dictionaries on the wrong side of the attention.
        UnsupportedModelError: Attention without such weights.

    Memory: projections of both dictionaries for one head (OV: vectors), and k pairs a feature of a block; never
    features × features.
    """
    model = as_model(model)
    dictionary = load_dictionary(dictionary).on(model)
    n_heads = heads_of(model, layer)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    if circuit not in ("QK", "OV") or per not in ("head", "feature"):
        raise ValueError(f"circuit, per are {circuit!r}, {per!r}; expected 'QK' or 'OV', 'head' or 'feature'")
    if other is None and circuit == "OV":
        raise ValueError(
            "circuit 'OV' moves features on to what reads them: pass other=, a dictionary behind the layer"
        )
    target = dictionary if other is None else load_dictionary(other).on(model)
    point = dictionary.point("value")
    if point > 2 * layer:
        raise ValueError(f"dictionary {dictionary.name!r} writes after the attention of layer {layer} has read")
    if circuit == "QK" and target.point("value") > 2 * layer:
        raise ValueError(f"dictionary {target.name!r} writes after the attention of layer {layer} has read")
    if circuit == "OV" and target.point("key") <= 2 * layer:
        raise ValueError(f"dictionary {target.name!r} reads before the attention of layer {layer} has written")
    asked = list(range(n_heads)) if heads is None else list(heads)
    bad = [h for h in asked if not 0 <= h < n_heads]
    if bad or not asked:
        raise ValueError(f"heads are {asked}; layer {layer} has heads 0 to {n_heads - 1}")
    chosen = dictionary.select(features)
    pairs = _Pairs(model, dictionary, target, layer, circuit, min(k, target.n_features), backend)
    metadata = identity_of(
        model,
        what="attention pairs",
        score="s ⟨γ_Q W_Q v_f, γ_K W_K v_g⟩" if circuit == "QK" else "⟨W_O W_V v_f, u_g⟩",
        circuit=circuit,
        attention_layer=layer,
        heads=asked,
        k=k,
        per=per,
        other=target.name,
        other_fingerprint=target.fingerprint,
        **identity_of_features(dictionary, chosen),
    )
    if per == "head":
        blocks = [Block(len(chosen), partial(pairs.of_head, head, chosen, k)) for head in asked]
    else:
        split = chosen.split(features_per_block(k))
        blocks = [Block(len(ids), partial(pairs.of_features, head, ids)) for head in asked for ids in split]
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress, unit="feature×head")


class HeadWeights(NamedTuple):
    """One query head's projections of the stream, norms and the scales of query and key norms folded."""

    W_Q: Tensor
    """[E, D], the attention's scale included."""
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    """[D, E]."""


def circuit_weights(model: Model, layer: int, head: int) -> HeadWeights:
    """The weights that a head's QK and OV circuits are made of, in float32 or wider."""
    attention = model.blocks[layer].attention
    E, groups = attention.width // attention.n_heads, attention.n_heads // attention.n_kv_heads
    W_Q = fold_in(attention.norm, at_least_float32(attention.W_Q[head * E : (head + 1) * E]))
    kv = head // groups
    W_K = fold_in(attention.norm, at_least_float32(attention.W_K[kv * E : (kv + 1) * E]))
    return HeadWeights(
        attention.scale * _scaled_rows(attention.q_norm, W_Q),
        _scaled_rows(attention.k_norm, W_K),
        *head_weights(attention, head),
    )


def _scaled_rows(norm: AnyNorm, weight: Tensor) -> Tensor:
    """A head's rows [E, D] with the scale of the norm over its queries or keys."""
    if not isinstance(norm, Norm) or norm.weight is None:
        return weight
    return weight * norm.weight.to(weight)[:, None]


class _Pairs:
    """The products of one layer's heads, the target's side made once for the blocks of a head."""

    def __init__(
        self, model: Model, source: Dictionary, target: Dictionary, layer: int, circuit: Circuit, k: int, backend: str
    ) -> None:
        self.model, self.source, self.target, self.layer = model, source, target, layer
        self.circuit, self.k, self.backend = circuit, k, backend
        self.heads = [partial(circuit_weights, model, layer, h) for h in range(model.blocks[layer].attention.n_heads)]
        self.opened: Latest[tuple[HeadWeights, Tensor]] = Latest()

    @torch.no_grad()
    def topk(self, head: int, ids: Tensor) -> TopK:
        """The k best g of each f in ids."""
        w, targets = self.opened.get(self.heads[head], lambda: self._open(head))
        values = self._vectors(self.source, "value", ids)
        if self.circuit == "QK":
            return streamed_topk(values @ w.W_Q.mT, targets, self.k, backend=self.backend)
        return streamed_topk(values @ w.W_V.mT, targets, self.k, backend=self.backend)

    def _open(self, head: int) -> tuple[HeadWeights, Tensor]:
        """The head's weights and what targets look like to it, [V, E]."""
        w = self.heads[head]()
        side, seen_by = ("value", w.W_K.mT) if self.circuit == "QK" else ("key", w.W_O)
        split = self.target.select().split(FEATURES_AT_ONCE)
        return w, torch.cat([self._vectors(self.target, side, ids) @ seen_by for ids in split])

    def _vectors(self, dictionary: Dictionary, side: str, ids: Tensor) -> Tensor:
        return at_least_float32(dictionary.vectors(side, ids).to(self.model.device, self.model.dtype))

    def of_features(self, head: int, ids: Tensor) -> pa.Table:
        """k pairs a side of each feature."""
        return topk_rows(
            self.topk(head, ids),
            ids,
            source=self.source.name,
            source_layer=self.source.layer,
            target=self.target.name,
            target_layer=self.target.layer,
            circuit=self.circuit,
            attention_layer=self.layer,
            head=head,
        )

    def of_head(self, head: int, chosen: Tensor, k: int) -> pa.Table:
        """k pairs a side of all features together."""
        best: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for ids in chosen.split(features_per_block(k)):
            found = self.topk(head, ids).to("cpu")
            for side in ("top", "bottom"):
                targets, scores = getattr(found, f"{side}_ids"), getattr(found, f"{side}_scores")
                new = (ids[:, None].expand_as(targets).flatten(), targets.flatten(), scores.flatten())
                if side in best:
                    new = tuple(torch.cat(pair) for pair in zip(best[side], new, strict=True))
                order = new[2].argsort(descending=side == "top", stable=True)[:k]
                best[side] = (new[0][order], new[1][order], new[2][order])
        n = {side: len(scores) for side, (_, _, scores) in best.items()}
        sources, targets, scores = (torch.cat(column) for column in zip(*best.values(), strict=True))
        return rows(
            len(scores),
            source=self.source.name,
            source_layer=self.source.layer,
            source_id=sources,
            target=self.target.name,
            target_layer=self.target.layer,
            target_id=targets,
            side=Categories(list(n), torch.arange(len(n)).repeat_interleave(torch.tensor(list(n.values())))),
            rank=torch.cat([torch.arange(size, dtype=torch.int32) for size in n.values()]),
            score=scores,
            circuit=self.circuit,
            attention_layer=self.layer,
            head=head,
        )


def heads_of(model: Model, layer: int) -> int:
    """The layer's number of query heads."""
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer is {layer}, but model {model.name!r} has layers 0 to {model.n_layers - 1}")
    attention = model.blocks[layer].attention
    if isinstance(attention, NoSingleWeights):
        attention.refuse("W_Q")
    return attention.n_heads
