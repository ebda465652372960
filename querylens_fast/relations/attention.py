"""Attention: which features attend to which, and what attention makes of features, head by head.

Out-of-context circuits of features (Liu & Deng, arXiv 2601.22447; Elhage et al. 2021 for the circuits): with head h's
weights behind the layer's folded norm (`weights`), E its width and s its scale,

    QK    score(f, g) = s ⟨γ_Q ∘ W_Q^h v_f, γ_K ∘ W_K^h v_g⟩    f, written where the query stands, looks for g
    OV    score(f, g) = ⟨W_O^h W_V^h v_f, u_g⟩                  f, where the head attends, moves on to what reads g

v are values, u keys. Left out as everywhere in `relations`: the norms' division by sizes (of the stream, and of queries
and keys, whose scales γ are kept here), biases, and rotations, so QK is the score at the same position, before what
position does to it.

How strongly a feature can take part in a head is the length of what the circuit makes of it (`attention_profiles`),

    query ‖(W_K^h)ᵀ W_Q^h v‖,   key ‖(W_Q^h)ᵀ W_K^h v‖,   OV ‖W_O^h W_V^h v‖,   each s-scaled (QK) and over ‖v‖,

whose distribution over semantic features (those that predict tokens, `output_features`) and the others is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from querylens_fast.dictionaries import Dictionary
from querylens_fast.models import Model, as_model
from querylens_fast.norms import AnyNorm, Norm, at_least_float32
from querylens_fast.ops import TopK, streamed_topk
from querylens_fast.relations.latest import Latest
from querylens_fast.relations.output_features import output_features
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
from querylens_fast.sources import load_dictionary

if TYPE_CHECKING:
    import pyarrow as pa

Circuit = Literal["QK", "OV"]
ROLES = ("query", "key", "OV")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
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
    model, dictionary = as_model(model), load_dictionary(dictionary)
    dictionary.check_model(model)
    n_heads = _heads_of(model, layer)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    if circuit not in ("QK", "OV") or per not in ("head", "feature"):
        raise ValueError(f"circuit, per are {circuit!r}, {per!r}; expected 'QK' or 'OV', 'head' or 'feature'")
    if other is None and circuit == "OV":
        raise ValueError(
            "circuit 'OV' moves features on to what reads them: pass other=, a dictionary behind the layer"
        )
    target = dictionary if other is None else load_dictionary(other)
    target.check_model(model)
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


def attention_profiles(
    dictionaries: Any,
    model: Any,
    *,
    layers: Sequence[int] | None = None,
    semantic: Sequence[RelationTable] | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """How strongly semantic features and the others take part in every head, by layer.

    Args:
        dictionaries: One, or a list; their values are used.
        model: As in `signatures`.
        layers: Of the attention; None: every layer at or behind each dictionary's point.
        semantic: A table of `output_features` over all features of each dictionary; None: computed with its defaults.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable` with a row for each dictionary, attention layer, head, role ("query", "key", "OV") and group
        ("semantic", "other"): n features, mean, deviation, the quantiles q05, q25, q50, q75 and q95 of the strengths,
        and separation: the probability that a semantic feature's strength exceeds another's (ties half), 0.5 where the
        groups do not differ. Null where a group is empty. Features of length 0 have strength 0.

    Raises:
        ValueError: No attention behind a dictionary, or tables of other features.
    """
    model = as_model(model)
    several = dictionaries if isinstance(dictionaries, (list, tuple)) else [dictionaries]
    given = [load_dictionary(d) for d in several]
    for dictionary in given:
        dictionary.check_model(model)
    if semantic is None:
        show = out is not None if progress is None else progress
        semantic = [output_features(d, model, progress=show) for d in given]
    if len(semantic) != len(given):
        raise ValueError(f"semantic holds {len(semantic)} tables, but there are {len(given)} dictionaries")
    groups = [_predicting(d, table) for d, table in zip(given, semantic, strict=True)]
    places = [
        (d, group, layer)
        for d, group in zip(given, groups, strict=True)
        for layer in range(-(-d.point("value") // 2), model.n_layers)
        if layers is None or layer in layers
    ]
    if not places:
        raise ValueError("no attention layer asked for lies at or behind these dictionaries")
    metadata = identity_of(
        model,
        what="attention profiles",
        score="lengths of circuits' outputs over ‖v‖",
        dictionaries=[d.name for d in given],
        fingerprints=[d.fingerprint for d in given],
        layers=[layer for _, _, layer in places],
        semantic=[table.metadata for table in semantic],
    )
    blocks = [Block(d.n_features, partial(_profile, model, d, group, layer)) for d, group, layer in places]
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress, unit="feature×layer")


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
    W_Q = at_least_float32(fold_in(attention.norm, attention.W_Q[head * E : (head + 1) * E]))
    kv = head // groups
    W_K = at_least_float32(fold_in(attention.norm, attention.W_K[kv * E : (kv + 1) * E]))
    W_V, W_O = head_weights(attention, head)
    return HeadWeights(
        attention.scale * _scaled_rows(attention.q_norm, W_Q),
        _scaled_rows(attention.k_norm, W_K),
        at_least_float32(W_V),
        at_least_float32(W_O),
    )


def strengths(model: Model, layer: int, vectors: Tensor) -> Tensor:
    """How strongly vectors [n, D] take part in each head, [3, H, n]: query, key, OV; over their length."""
    vectors = at_least_float32(vectors)
    unit = torch.nn.functional.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)
    found = []
    for head in range(model.blocks[layer].attention.n_heads):
        w = circuit_weights(model, layer, head)
        # ‖Bᵀ A v‖² = (A v)ᵀ (B Bᵀ) (A v): nothing of width D beyond the projection.
        found.append(
            torch.stack(
                [_length(unit @ a.mT, b @ b.mT) for a, b in ((w.W_Q, w.W_K), (w.W_K, w.W_Q), (w.W_V, w.W_O.mT))]
            )
        )
    return torch.stack(found, 1)


def _length(projected: Tensor, gram: Tensor) -> Tensor:
    return ((projected @ gram) * projected).sum(1).clamp_min(0).sqrt()


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


@torch.no_grad()
def _profile(model: Model, dictionary: Dictionary, semantic: Tensor, layer: int) -> pa.Table:
    """A dictionary's rows of one attention layer."""
    parts = [
        strengths(model, layer, dictionary.values(ids).to(model.device, model.dtype)).cpu()
        for ids in dictionary.select().split(FEATURES_AT_ONCE)
    ]
    found = torch.cat(parts, 2).double()
    n_heads = found.shape[1]
    lines = []
    for role in range(len(ROLES)):
        for head in range(n_heads):
            groups = found[role, head, semantic], found[role, head, ~semantic]
            separation = _separation(*groups)
            lines += [_summary(values) | {"separation": separation} for values in groups]
    n = len(lines)
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    import pyarrow as pa

    table = rows(
        n,
        source=dictionary.name,
        source_layer=dictionary.layer,
        attention_layer=layer,
        head=torch.arange(n_heads).repeat_interleave(2).repeat(len(ROLES)),
        role=Categories(ROLES, torch.arange(len(ROLES)).repeat_interleave(2 * n_heads)),
        group=Categories(("semantic", "other"), torch.arange(2).repeat(n // 2)),
    )
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.int64() if name == "n" else pa.float64()))
    return table


def _summary(values: Tensor) -> dict[str, float | None]:
    names = [f"q{round(100 * q):02d}" for q in QUANTILES]
    if not len(values):
        return {"n": 0, "mean": None, "deviation": None, **dict.fromkeys(names)}
    quantiles = values.quantile(torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
    spread = {"mean": float(values.mean()), "deviation": float(values.std(correction=0))}
    return {"n": len(values), **spread, **dict(zip(names, quantiles, strict=True))}


def _separation(a: Tensor, b: Tensor) -> float | None:
    """P(a > b) + P(a = b) / 2 of random members."""
    if not len(a) or not len(b):
        return None
    ordered = b.sort().values
    below, up_to = (torch.searchsorted(ordered, a, right=right) for right in (False, True))
    return float((below + up_to).double().mean() / (2 * len(b)))


def _predicting(dictionary: Dictionary, table: RelationTable) -> Tensor:
    """[n] bool: the features that predict tokens."""
    if table.metadata.get("what") != "output features" or table.metadata["dictionary_fingerprint"] != (
        dictionary.fingerprint
    ):
        raise ValueError(f"semantic holds a table that is not output_features of {dictionary.name!r}")
    found = table.table(["source_id", "predicts"])
    ids = torch.tensor(found["source_id"].to_pylist(), dtype=torch.int64)
    if not torch.equal(ids, torch.arange(dictionary.n_features)):
        raise ValueError(f"the table of output_features of {dictionary.name!r} leaves features out; compute all")
    return torch.tensor(found["predicts"].to_pylist(), dtype=torch.bool)


def _heads_of(model: Model, layer: int) -> int:
    """The layer's number of query heads."""
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer is {layer}, but model {model.name!r} has layers 0 to {model.n_layers - 1}")
    return model.blocks[layer].attention.n_heads
