"""Scores of signatures: the paper's input and output scores of any method, feature by feature, and their means.

    input score     I(T) = share of a feature's maximally activating tokens (repetitions counted) that are in T, §5.1
    output score    O(T) = |S ∩ T| / |S|, S the tokens that rise most under steering, §5.2 (`output_score`)
    coherence       how alike the tokens of T are (`similarity`): exact and offline, and no judgement of meaning

T is the k top tokens of a method. Means are over the features of a dictionary, mean ± 1.96 s/√n, and over dictionaries
with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.evaluation.feature_sample import FeatureSample
from querylens_fast.evaluation.methods import Context, Method
from querylens_fast.evaluation.output_score import Promoted, output_scores
from querylens_fast.lens.similarity import embedding_similarity, string_similarity
from querylens_fast.relations.tables import Block, Categories, RelationTable, identity_of, rows, tabulate

if TYPE_CHECKING:
    import pyarrow as pa

Z_95 = 1.959964
SCORES = ("input_score", "output_score", "string_coherence", "embedding_coherence")
FEATURES_AT_ONCE = {True: 64, False: 4096}
"""Features of a block, by whether the method runs the model for each."""


@dataclass(frozen=True)
class Case:
    """A dictionary with what its features are scored against.

    Attributes:
        dictionary: The dictionary.
        label: A short name that tells it from the others.
        features: Ids of the features that are scored, [n].
        sample: Where they are active, for the input score.
        promoted: Tokens that steering promotes, of the same features, for the output score; None: without.
    """

    dictionary: Dictionary
    label: str
    features: Tensor
    sample: FeatureSample
    promoted: Promoted | None = None


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
        ks: Signature sizes; all come from one pass with the largest.
        coherence: Also the similarity of the tokens; needs a tokenizer.
        out: A ``.parquet`` file to stream to; a killed run resumes.
        resume: As in `signatures`.
        progress: As in `signatures`.

    Returns:
        `RelationTable`: source (the label), source_layer, source_id, method, k, n_examples, input_score, output_score
        (null without ``promoted``), string_coherence and embedding_coherence (null without ``coherence``).

    Raises:
        ValueError: k below 1, no method that serves a dictionary, or what `signatures` raises.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"k is {list(ks)}; expected sizes of at least 1")
    pairs = [(case, method) for case in cases for method in methods if method.serves(case.dictionary)]
    if not pairs:
        raise ValueError("none of the result files is of one of these dictionaries")
    blocks = [
        Block(len(ids), partial(_rows, case, context, method, ids, sorted(ks), coherence))
        for case, method in pairs
        for ids in _places(case, context, method)
    ]
    metadata = identity_of(
        context.model,
        what="scores",
        dictionaries=[case.label for case in cases],
        fingerprints=[case.dictionary.fingerprint for case in cases],
        features=[len(case.features) for case in cases],
        samples=[case.sample.metadata["tokens_digest"] for case in cases],
        n_examples=[case.sample.metadata["n_examples"] for case in cases],
        methods=[method.name for method in methods],
        ks=sorted(ks),
        transport=None if context.transport is None else context.transport.metadata,
        output=[case.promoted is not None for case in cases],
        coherence=coherence,
    )
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress, unit="feature×method")


def _places(case: Case, context: Context, method: Method) -> tuple[Tensor, ...]:
    """The places of the case's features, a block at a time."""
    preset = method.preset
    dear = preset is not None and (preset.is_ablation or (preset.needs_transport and context.transport is None))
    return torch.arange(len(case.features)).split(FEATURES_AT_ONCE[dear])


def _rows(case: Case, context: Context, method: Method, places: Tensor, ks: Sequence[int], coherence: bool) -> pa.Table:
    features = case.features[places]
    ids = method.token_ids(context, case.dictionary, features, max(ks))
    activating = case.sample.tokens[features]
    columns: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    missing = torch.full((len(features),), torch.nan, dtype=torch.float64)
    for k in ks:
        few = ids[:, :k]
        promoted = None if case.promoted is None else output_scores(case.promoted.at(places), few)
        columns["input_score"].append(input_scores(few, activating).double())
        columns["output_score"].append(missing if promoted is None else promoted.double())
        alike = coherence and k > 1
        columns["string_coherence"].append(string_similarity(context.model, few) if alike else missing)
        columns["embedding_coherence"].append(embedding_similarity(context.model, few) if alike else missing)
    n = len(features)
    table = rows(
        n * len(ks),
        source=case.label,
        source_layer=case.dictionary.layer,
        source_id=features.repeat(len(ks)),
        method=Categories([method.name], torch.zeros(n * len(ks), dtype=torch.int64)),
        k=torch.tensor(list(ks)).repeat_interleave(n),
        n_examples=(activating >= 0).sum(1).repeat(len(ks)),
    )
    for name, parts in columns.items():
        table = table.append_column(name, _nullable(torch.cat(parts)))
    return table


def _nullable(values: Tensor) -> pa.Array:
    """A float64 column with nulls for NaN."""
    import pyarrow as pa

    return pa.array(values.numpy(), from_pandas=True)


@dataclass(frozen=True)
class MeanScore:
    """The mean of one score over the features of a dictionary; dictionary None: over dictionaries, equal weights."""

    score: str
    method: str
    k: int
    dictionary: str | None
    layer: int | None
    mean: float
    low: float
    """mean − 1.96 standard errors."""
    high: float
    n_features: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_scores(found: RelationTable, score: str = "input_score") -> list[MeanScore]:
    """Means of a score by method, k and dictionary, and over dictionaries; features without the score do not count.

    Raises:
        ValueError: The table is none of `score_methods`, or the score is unknown.
    """
    if found.metadata.get("what") != "scores":
        raise ValueError(f"found is a table of {found.metadata.get('what')!r}; expected one of score_methods")
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(SCORES)}")
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = ["method", "k", "source", "source_layer"]
    table = found.table([*keys, score])
    for name in ("method", "source"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    grouped = table.group_by(keys, use_threads=False)
    measures = [(score, "mean"), (score, "stddev", pc.VarianceOptions(ddof=1)), (score, "count")]
    own = []
    for row in grouped.aggregate(measures).to_pylist():
        method, k, label, layer = (row[key] for key in keys)
        mean, spread, n = (row[f"{score}_{measure}"] for measure in ("mean", "stddev", "count"))
        error = spread / n**0.5 if n > 1 else math.nan
        if n:
            low, high = mean - Z_95 * error, mean + Z_95 * error
            own.append(MeanScore(score, method, k, label, layer, mean, low, high, n))
    together: dict[tuple[str, int], list[MeanScore]] = {}
    for mean in own:
        together.setdefault((mean.method, mean.k), []).append(mean)
    return [mean for several in together.values() for mean in (*several, _over_dictionaries(several))]


def _over_dictionaries(own: Sequence[MeanScore]) -> MeanScore:
    mean = sum(m.mean for m in own) / len(own)
    error = sum(((m.high - m.mean) / Z_95) ** 2 for m in own) ** 0.5 / len(own)
    low, high, n = mean - Z_95 * error, mean + Z_95 * error, sum(m.n_features for m in own)
    return MeanScore(own[0].score, own[0].method, own[0].k, None, None, mean, low, high, n)


def labels_of(dictionaries: Sequence[Dictionary]) -> list[str]:
    """A short name of each: the last parts of its own, as many as tell them apart, else with its place in the list."""
    names = [Path(d.name).parts or ("",) for d in dictionaries]
    for n in range(1, max(map(len, names), default=1) + 1):
        labels = ["/".join(parts[-n:]) for parts in names]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(parts)} ({i})" for i, parts in enumerate(names)]
