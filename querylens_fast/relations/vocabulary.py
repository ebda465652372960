"""Token → features: the features that score highest and lowest for every token of the vocabulary.

A signature scores every token for a feature, score(f, t) = (⟨x_f, W_t⟩ + offset_f) · scale_t + bias_t (`readouts`).
Here the roles are swapped: for each token the features with the largest and smallest score(f, t), over one dictionary
or over several at once, "across all layers". The scores are the signatures' own, preset for preset: a pair found here
has the score that `scores_at` gives it. Scores of different layers are compared as they are, without normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.pipeline import Pipeline
from querylens_fast.lens.planning import plan
from querylens_fast.lens.presets import Preset, find_preset
from querylens_fast.lens.readouts import Scorer
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.relations.readers import features_per_block
from querylens_fast.relations.tables import (
    Block,
    Categories,
    RelationTable,
    digest_of,
    identity_of,
    tabulate,
    topk_rows,
)
from querylens_fast.topk.api import TopK, streamed_topk
from querylens_fast.transport.transport import Transport, load_transport

if TYPE_CHECKING:
    import pyarrow as pa

FEATURES_AT_ONCE = 1 << 13
"""Features whose vectors are read and transported at a time."""


def token_features(
    dictionaries: Any,
    model: Any,
    *,
    preset: str | Preset | Sequence[str | None] = "logit_lens_value",
    transport: Transport | str | Path | None = None,
    tuned_lens: str | Path | None = None,
    k: int = 32,
    token_ids: Any = None,
    final_norm: bool = True,
    token_strings: bool = True,
    backend: str = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """The k features that score highest and lowest for each token.

    Args:
        dictionaries: One dictionary, or a list: each token's top-k is then over all of them together.
        model: As in `signatures`.
        preset: As in `signatures`, but for the ablations: value presets say which features promote the token, key
            presets which it activates.
        transport: As in `signatures`; needed by presets with a transport.
        tuned_lens: As in `signatures`.
        k: Features on each side; all of them where there are fewer.
        token_ids: Tokens to ask about: None for the whole vocabulary, or a list of ids.
        final_norm: As in `signatures`.
        token_strings: Add a column ``token`` with each source token as text (needs a tokenizer).
        backend: Of the streamed top-k.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable`: the source is "vocabulary", the target a dictionary and its feature. Equal scores by the
        dictionary given first, then the lower feature.

    Raises:
        ValueError: As in `signatures`; an ablation preset; a token id out of range.

    Memory: the transported vectors of one dictionary; never features × vocabulary. Cost: they are computed again for
    every 8,192 tokens (2¹⁹ / k of them beyond k = 64), d_model / 8,192 of the product itself.
    """
    model, lens = as_model(model), find_preset(preset)
    if lens.is_ablation:
        raise ValueError(
            f"preset {lens.name!r} runs the model for each feature: it has no product to swap; use another"
        )
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    given = load_transport(transport) if isinstance(transport, (str, Path)) else transport
    several = dictionaries if isinstance(dictionaries, (list, tuple)) else [dictionaries]
    if not several:
        raise ValueError("dictionaries is an empty list; expected at least one")
    settings = {"preset": lens, "transport": given, "tuned_lens": tuned_lens, "final_norm": final_norm}
    pipelines = [plan(load_dictionary(d), model, k=1, stats="none", backend=backend, **settings) for d in several]
    chosen = _checked_tokens(model, token_ids)
    if token_strings:
        model.str_tokens([0])
    metadata = identity_of(
        model,
        what="token features",
        score="as in signatures, (⟨x_f, W_t⟩ + offset_f) · scale_t + bias_t",
        **lens.as_dict(),
        k=k,
        dictionaries=[p.dictionary.name for p in pipelines],
        fingerprints=[p.dictionary.fingerprint for p in pipelines],
        transport=None if given is None else given.metadata,
        tuned_lens=None if (opened := pipelines[0].tuned_lens) is None else opened.identity,
        final_norm=final_norm,
        n_tokens=len(chosen),
        tokens=digest_of(chosen),
        token_strings=token_strings,
    )
    blocks = [
        Block(len(ids), partial(_rows, pipelines, ids, k, backend, token_strings))
        for ids in chosen.split(features_per_block(k))
    ]
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress, unit="token")


def swapped_topk(scorer: Scorer, vectors: Tensor, token_ids: Tensor, k: int, backend: str = "auto") -> TopK:
    """The k vectors of [n, D] that score highest and lowest for each token [m]: ids and scores [m, k].

    scale_t is never negative, so a token's order is that of ⟨W_t, x_f⟩ + offset_f; scale and bias come after. A token
    of scale 0 scores 0 with every vector, and gets the first k.
    """
    x, offset = scorer.prepare(vectors)
    token_ids = token_ids.to(x.device)
    found = streamed_topk(scorer.W[token_ids], x, k, bias=offset, backend=backend)
    scale = None if scorer.scale is None else scorer.scale[token_ids, None]
    bias = None if scorer.bias is None else scorer.bias[token_ids, None]
    sides = found.sides()
    for side in ("top", "bottom"):
        ids, scores = sides[f"{side}_ids"], sides[f"{side}_scores"]
        if scale is not None:
            scores = scores * scale.to(scores)
            sides[f"{side}_ids"] = torch.where(scale > 0, ids, torch.arange(k, device=ids.device))
        sides[f"{side}_scores"] = scores if bias is None else scores + bias.to(scores)
    return found._replace(**sides)


@torch.no_grad()
def _rows(pipelines: Sequence[Pipeline], tokens: Tensor, k: int, backend: str, token_strings: bool) -> pa.Table:
    sizes = [p.dictionary.n_features for p in pipelines]
    found: TopK | None = None
    first = 0
    for pipeline, size in zip(pipelines, sizes, strict=True):
        vectors = torch.cat(list(_vectors(pipeline)))
        own = swapped_topk(pipeline.scorer, vectors, tokens, min(k, size), backend).to("cpu")
        found = _merged(found, own, first, k)
        first += size
    assert found is not None
    which = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    layers = torch.tensor([p.dictionary.layer for p in pipelines], dtype=torch.int32)
    strings = {}
    if token_strings:
        texts = pipelines[0].model.str_tokens(tokens.tolist())
        strings["token"] = Categories(texts, torch.arange(len(texts)))
    return topk_rows(
        found,
        tokens,
        source="vocabulary",
        source_layer=None,
        target=Categories([p.dictionary.name for p in pipelines], which),
        target_layer=layers[which],
        target_ids=torch.cat([torch.arange(size) for size in sizes]),
        **strings,
    )


def _vectors(pipeline: Pipeline) -> Iterator[Tensor]:
    """What is read out for every feature of a dictionary, some at a time."""
    return (pipeline.vectors(ids) for ids in pipeline.dictionary.select().split(FEATURES_AT_ONCE))


def _merged(found: TopK | None, other: TopK, first: int, k: int) -> TopK:
    """The k most extreme of both, the ids of ``other`` counted on from ``first``."""
    sides = {}
    for side, descending in (("top", True), ("bottom", False)):
        ids, scores = getattr(other, f"{side}_ids") + first, getattr(other, f"{side}_scores")
        if found is not None:
            ids = torch.cat([getattr(found, f"{side}_ids"), ids], 1)
            scores = torch.cat([getattr(found, f"{side}_scores"), scores], 1)
        order = scores.argsort(dim=1, descending=descending, stable=True)[:, :k]
        sides |= {f"{side}_ids": ids.gather(1, order), f"{side}_scores": scores.gather(1, order)}
    return other._replace(**sides)


def _checked_tokens(model: Model, token_ids: Any) -> Tensor:
    ids = torch.arange(model.vocab_size) if token_ids is None else torch.as_tensor(token_ids).reshape(-1).long().cpu()
    bad = ids[(ids < 0) | (ids >= model.vocab_size)]
    if len(bad):
        raise ValueError(f"token id {int(bad[0])} is outside the vocabulary of {model.vocab_size}")
    return ids
