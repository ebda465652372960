"""How strongly features can take part in attention, by layer: semantic features against the others.

After Liu & Deng (arXiv 2601.22447). A feature's strength in a head is the length of what a circuit makes of its value v
(`attention.circuit_weights`: norms, scale and γ folded),

    query ‖(W_K^h)ᵀ W_Q^h v‖,   key ‖(W_Q^h)ᵀ W_K^h v‖,   OV ‖W_O^h W_V^h v‖,   each over ‖v‖,

whose distribution over semantic features (those that predict tokens, `output_features`) and the others is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32, of_moderate_length
from querylens_fast.relations.attention import FEATURES_AT_ONCE, circuit_weights, heads_of
from querylens_fast.relations.channel_statistics import separation
from querylens_fast.relations.output_features import output_features
from querylens_fast.relations.readers import layers_behind
from querylens_fast.relations.tables import Block, Categories, RelationTable, identity_of, rows, tabulate
from querylens_fast.runs.run_record import agree

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = ("query", "key", "OV")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
        ValueError: No such layer, no attention behind a dictionary, or tables of other features.
        UnsupportedModelError: Attention without such weights.
    """
    model = as_model(model)
    several = dictionaries if isinstance(dictionaries, (list, tuple)) else [dictionaries]
    given = [load_dictionary(d).on(model) for d in several]
    asked = set(range(model.n_layers) if layers is None else layers)
    for layer in asked:
        heads_of(model, layer)
    if not any(layer in asked for d in given for layer in layers_behind(d, model)):
        raise ValueError("no attention layer asked for lies at or behind these dictionaries")
    if semantic is None:
        show = out is not None if progress is None else progress
        semantic = [output_features(d, model, progress=show) for d in given]
    if len(semantic) != len(given):
        raise ValueError(f"semantic holds {len(semantic)} tables, but there are {len(given)} dictionaries")
    groups = [_predicting(d, table) for d, table in zip(given, semantic, strict=True)]
    places = [
        (d, group, layer)
        for d, group in zip(given, groups, strict=True)
        for layer in layers_behind(d, model)
        if layer in asked
    ]
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


def strengths(model: Model, layer: int, vectors: Tensor) -> Tensor:
    """How strongly vectors [n, D] take part in each head, [3, H, n]: query, key, OV; over their length."""
    vectors = of_moderate_length(at_least_float32(vectors))
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
            above = separation(*groups) if all(map(len, groups)) else None
            lines += [_summary(values) | {"separation": above} for values in groups]
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


def _predicting(dictionary: Dictionary, table: RelationTable) -> Tensor:
    """[n] bool: the features that predict tokens."""
    said = table.metadata
    if said.get("what") != "output features" or not agree(said["dictionary_fingerprint"], dictionary.fingerprint):
        raise ValueError(f"semantic holds a table that is not output_features of {dictionary.name!r}")
    found = table.table(["source_id", "predicts"])
    ids = torch.tensor(found["source_id"].to_pylist(), dtype=torch.int64)
    if not torch.equal(ids, torch.arange(dictionary.n_features)):
        raise ValueError(f"the table of output_features of {dictionary.name!r} leaves features out; compute all")
    return torch.tensor(found["predicts"].to_pylist(), dtype=torch.bool)
