"""Scores of signatures: the paper's input and output scores of any method, feature by feature, and their means.

    input score     I(T) = share of a feature's maximally activating tokens (repetitions counted) that are in T, §5.1
    output score    O(T) = |S ∩ T| / |S|, S the tokens that rise most under steering, §5.2 (`output_score`)
    coherence       how alike the tokens of T are (`similarity`): exact and offline, and no judgement of meaning
    coherent        embedding coherence above that of 95 % of random directions' top tokens, read out on the same side

T is the k top tokens of a method. Means and comparisons of these rows: `means`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.evaluation.feature_sample import FeatureSample
from querylens_fast.evaluation.methods import Context, Method
from querylens_fast.evaluation.output_score import Promoted, output_scores
from querylens_fast.lens.similarity import embedding_similarity, string_similarity, vocabulary_centre
from querylens_fast.lens.storage import read_identity
from querylens_fast.models.model import Model
from querylens_fast.relations.tables import (
    Block,
    Categories,
    RelationTable,
    digest_of,
    identity_of,
    rows,
    tabulate,
)
from querylens_fast.runs.arguments import whole_number
from querylens_fast.runs.input_file import digest_of_file
from querylens_fast.runs.run_record import digest_of as run_digest
from querylens_fast.transport.growth import top_tokens
from querylens_fast.transport.jacobians import Side
from querylens_fast.transport.transport import SIDES

if TYPE_CHECKING:
    import pyarrow as pa

SCORES = ("input_score", "output_score", "string_coherence", "embedding_coherence")
FEATURES_AT_ONCE = {True: 64, False: 4096}
"""Features of a block, by whether the method runs the model for each."""
DIRECTIONS, CHANCE = 1000, 0.05
"""Random directions that "coherent" compares with, and the share of them that may pass for it."""


@dataclass(frozen=True)
class Case:
    """A dictionary with what its features are scored against.

    Attributes:
        dictionary: The dictionary.
        label: A short name that tells it from the others.
        features: Ids of the features that are scored, [n], ascending.
        sample: Where they are active, for the input score.
        promoted: Tokens that steering promotes, of the same features, for the output score; None: without.
        few: Those of the features that methods which run the model for each feature are scored on; None: all.
    """

    dictionary: Dictionary
    label: str
    features: Tensor
    sample: FeatureSample
    promoted: Promoted | None = None
    few: Tensor | None = None


def input_scores(signature_ids: Tensor, activating: Tensor) -> Tensor:
    """I(T) of each feature, [n], for token ids [n, k] and activating tokens [n, m] (−1 where there are fewer than m).

    NaN for features without an activating token.
    """
    member = (activating[:, :, None] == signature_ids.cpu()[:, None, :]).any(-1) & (activating >= 0)
    counts = (activating >= 0).sum(1)
    return torch.where(counts > 0, member.sum(1) / counts.clamp_min(1), torch.nan)


def score_methods(
    cases: Sequence[Case],
    context: Context,
    methods: Sequence[Method],
    *,
    ks: Sequence[int] = (25,),
    coherence: bool = True,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """One row per dictionary, method, feature and k: its scores.

    Args:
        cases: The dictionaries and what their features are scored against.
        context: The model and what the presets need.
        methods: From `find_methods`. A result file is used for its own dictionary only.
        ks: Signature sizes; all come from one pass with the largest. A result file gives those up to its own.
        coherence: Also the similarity of the tokens; needs a tokenizer.
        out: A ``.parquet`` file to stream to; a killed run resumes, with as many processes as one likes.
        resume: As in `signatures`.
        progress: As in `signatures`.

    Returns:
        `RelationTable`: source (the label), source_layer, source_id, method, k, n_examples, top_ids (the k tokens),
        input_score (null without an example), output_score (null without ``promoted``), string_coherence,
        embedding_coherence and coherent (null without ``coherence``).

    Raises:
        ValueError: k below 1, no method that serves a dictionary, or what `signatures` raises.
    """
    ks = sorted({whole_number("k", k) for k in ks})
    if not ks:
        raise ValueError("k is empty; expected sizes of at least 1")
    pairs = [(case, method) for case in cases for method in methods if method.serves(case.dictionary)]
    if not pairs:
        raise ValueError("none of the result files is of one of these dictionaries")
    limits: dict[Side, dict[int, float]] = {
        side: coherent_from(context.model, side, ks) if coherence else {} for side in SIDES
    }
    blocks = [
        Block(len(ids), partial(_rows, case, context, method, ids, method.sizes(ks), limits))
        for case, method in pairs
        for ids in _places(case, context, method)
    ]
    metadata = identity_of(
        context.model,
        what="scores",
        dictionaries=[case.label for case in cases],
        fingerprints=[case.dictionary.fingerprint for case in cases],
        features=[len(case.features) for case in cases],
        feature_ids=[digest_of(case.features) for case in cases],
        samples=[case.sample.metadata["tokens_digest"] for case in cases],
        n_examples=[case.sample.metadata["n_examples"] for case in cases],
        methods=[method.name for method in methods],
        ks=ks,
        transport=None if context.transport is None else context.transport.metadata,
        output=[case.promoted is not None for case in cases],
        **_files(methods, context),
        few=[None if case.few is None else len(case.few) for case in cases],
        coherence=coherence,
    )
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress, unit="feature×method")


def _files(methods: Sequence[Method], context: Context) -> dict[str, dict[str, str]]:
    """Digests of the files that methods read, for the table's identity; none where they read none."""
    files = {method.name: run_digest(read_identity(method.path)) for method in methods if method.path is not None}
    if context.tuned_lens is not None:
        digest = digest_of_file(context.tuned_lens)
        files |= {m.name: digest for m in methods if m.preset and m.preset.stream_transition == "tuned_lens"}
    return {"files": files} if files else {}


@torch.no_grad()
def coherent_from(model: Model, side: Side, ks: Sequence[int]) -> dict[int, float]:
    """k → the embedding coherence that 5 % of random directions' k top tokens exceed, for k above 1 (seeded).

    The tokens nearest to any direction are more alike than tokens drawn at random, so those are what to compare with:
    unembedded on the value side, by centered cosine with the embeddings on the key side.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, model.d_model, generator=generator).to(model.device, model.dtype)
    lists = top_tokens(model, directions, side, vocabulary_centre(model), min(max(ks), model.vocab_size)).cpu()
    return {k: float(embedding_similarity(model, lists[:, :k]).quantile(1 - CHANCE)) for k in ks if k > 1}


def _places(case: Case, context: Context, method: Method) -> tuple[Tensor, ...]:
    """The places of the case's features, a block at a time."""
    preset, places = method.preset, torch.arange(len(case.features))
    dear = preset is not None and (preset.is_ablation or (preset.needs_transport and context.transport is None))
    if dear and case.few is not None:
        places = places[torch.isin(case.features, case.few)]
    return places.split(FEATURES_AT_ONCE[dear])


def _rows(
    case: Case,
    context: Context,
    method: Method,
    places: Tensor,
    ks: Sequence[int],
    limits: Mapping[Side, Mapping[int, float]],
) -> pa.Table:
    """The rows of the features at some places, for each k; ``limits``: `coherent_from` of each side."""
    features = case.features[places]
    ids = method.token_ids(context, case.dictionary, features, max(ks))
    promoted = None if case.promoted is None else case.promoted.at(places)
    activating, parts = case.sample.tokens[features], []
    for k in ks:
        about = rows(
            len(features),
            source=case.label,
            source_layer=case.dictionary.layer,
            source_id=features,
            method=Categories([method.name], torch.zeros(len(features), dtype=torch.int64)),
            k=k,
            n_examples=(activating >= 0).sum(1),
        )
        columns = _scores(context.model, ids[:, :k], activating, promoted, limits[method.side].get(k))
        for name, column in columns.items():
            about = about.append_column(name, column)
        parts.append(about)
    import pyarrow as pa

    return pa.concat_tables(parts).unify_dictionaries()


def _scores(
    model: Model, ids: Tensor, activating: Tensor, promoted: Promoted | None, limit: float | None
) -> dict[str, pa.Array]:
    """The token ids [n, k] and their scores, as columns; null where there is none."""
    import pyarrow as pa

    missing = torch.full((len(ids),), torch.nan, dtype=torch.float64)
    found = {
        "input_score": input_scores(ids, activating),
        "output_score": missing if promoted is None else output_scores(promoted, ids),
        "string_coherence": missing if limit is None else string_similarity(model, ids),
        "embedding_coherence": missing if limit is None else embedding_similarity(model, ids),
    }
    coherent = [None] * len(ids) if limit is None else (found["embedding_coherence"] > limit).tolist()
    starts = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
    lists = pa.ListArray.from_arrays(pa.array(starts.numpy()), pa.array(ids.int().flatten().numpy()))
    scores = {name: pa.array(values.double().numpy(), from_pandas=True) for name, values in found.items()}
    return {"top_ids": lists, **scores, "coherent": pa.array(coherent, pa.bool_())}


def labels_of(dictionaries: Sequence[Dictionary]) -> list[str]:
    """A short name of each: the last parts of its own, as many as tell them apart, else with its place in the list."""
    names = [Path(d.name).parts or ("",) for d in dictionaries]
    for n in range(1, max(map(len, names), default=1) + 1):
        labels = ["/".join(parts[-n:]) for parts in names]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(parts)} ({i})" for i, parts in enumerate(names)]
