"""Which features predict output tokens, from the distribution of their logits alone.

Liu & Deng (arXiv 2601.22447) explain features out of context: a feature that predicts output tokens has a few logits
far above the rest, and the tokens at the top are alike. For every feature here

    skewness, kurtosis (excess), entropy    of its V scores, and of their softmax, from the streamed pass
    top_mass                                softmax mass of its k highest tokens
    string_similarity                       mean over pairs of those tokens of the Dice coefficient of their character
                                            bigrams, stripped and in lower case
    embedding_similarity                    mean over pairs of the cosine of their embeddings, centred on the vocabulary

The paper's thresholds are not all public. Ours are relative to chance: random directions of the same space go the same
way, and each measure's threshold is the ``level`` quantile of theirs. A feature *predicts* when its kurtosis and at
least one similarity are beyond chance; ``thresholds`` sets any of them by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.dictionaries.rows import MemoryRows
from querylens_fast.lens.pipeline import Pipeline
from querylens_fast.lens.planning import plan
from querylens_fast.lens.presets import Preset, find_preset
from querylens_fast.lens.similarity import embedding_similarity, string_similarity, vocabulary_centre
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.relations.readers import identity_of_features
from querylens_fast.relations.tables import Block, RelationTable, identity_of, rows, tabulate
from querylens_fast.transport.transport import Transport, load_transport

if TYPE_CHECKING:
    import pyarrow as pa

MEASURES = ("kurtosis", "string_similarity", "embedding_similarity")
"""Those that `predicts` goes by."""
FEATURES_AT_ONCE = 4096
SHOWN_TOKENS = 5


def output_features(
    dictionary: Any,
    model: Any,
    *,
    preset: str | Preset = "logit_lens_value",
    transport: Transport | str | Path | None = None,
    tuned_lens: str | Path | None = None,
    k: int = 10,
    thresholds: Mapping[str, float] | None = None,
    level: float = 0.99,
    n_random: int = 1024,
    seed: int = 0,
    features: Any = None,
    final_norm: bool = True,
    backend: str = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """How each feature's logits are distributed, and whether it predicts output tokens.

    Args:
        dictionary: As in `signatures`; its values are read out.
        model: As in `signatures`, with a tokenizer.
        preset: A value preset without ablation, e.g. "query_lens_value" with a transport.
        transport: As in `signatures`.
        tuned_lens: As in `signatures`.
        k: Highest tokens that are compared with one another, at least 2.
        thresholds: Of "kurtosis", "string_similarity" and "embedding_similarity"; those left out are set by chance.
        level: Quantile of the random directions' measures that is the threshold.
        n_random: Random directions.
        seed: Of the random directions.
        features: As in `signatures`.
        final_norm: As in `signatures`.
        backend: Of the streamed top-k.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable` of one row a feature: source, source_layer, source_id, mean, deviation, skewness, kurtosis,
        entropy (nats), top_score, top_mass, string_similarity, embedding_similarity, predicts (bool) and tokens (the
        five highest as text). ``metadata["thresholds"]`` holds the thresholds.

    Raises:
        ValueError: As in `signatures`; a key preset or an ablation; no tokenizer; a threshold of another name.

    Memory: never features × vocabulary.
    """
    model, dictionary, lens = as_model(model), load_dictionary(dictionary), find_preset(preset)
    if lens.is_ablation or lens.feature_vector != "value":
        raise ValueError(f"preset {lens.name!r} does not read out a value vector; use one of the value side")
    if k < 2:
        raise ValueError(f"k is {k}; expected at least 2 tokens, to compare them")
    if not 0 < level < 1 or n_random < 1:
        raise ValueError(
            f"level, n_random are {level}, {n_random}; expected a quantile between 0 and 1, and at least 1"
        )
    given = dict(thresholds or {})
    if not set(given) <= set(MEASURES):
        raise ValueError(f"thresholds are of {', '.join(given)}; expected {', '.join(MEASURES)}")
    model.str_tokens([0])
    moved = load_transport(transport) if isinstance(transport, (str, Path)) else transport
    pipeline = plan(
        dictionary,
        model,
        k=k,
        preset=lens,
        transport=moved,
        tuned_lens=tuned_lens,
        stats="none",
        final_norm=final_norm,
        backend=backend,
    )
    measure = _Measures(model, pipeline, k)
    if set(given) != set(MEASURES):
        random = measure.of(replace(pipeline, dictionary=random_directions(dictionary, n_random, seed)))
        given = {name: float(random[name].double().quantile(level)) for name in MEASURES} | given
    chosen = dictionary.select(features)
    metadata = identity_of(
        model,
        what="output features",
        **lens.as_dict(),
        k=k,
        thresholds={name: given[name] for name in MEASURES},
        level=level,
        n_random=n_random,
        seed=seed,
        transport=None if moved is None else moved.metadata,
        tuned_lens=None if pipeline.tuned_lens is None else pipeline.tuned_lens.identity,
        final_norm=final_norm,
        **identity_of_features(dictionary, chosen),
    )
    blocks = [Block(len(ids), partial(measure.rows, ids, given)) for ids in chosen.split(FEATURES_AT_ONCE)]
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress)


def random_directions(dictionary: Dictionary, n: int, seed: int) -> Dictionary:
    """A dictionary of the same place with n normally distributed values, as long on average as its first ones."""
    lengths = at_least_float32(dictionary.values(slice(0, min(n, dictionary.n_features)))).norm(dim=1)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, dictionary.d_model, generator=generator) / dictionary.d_model**0.5
    scaled = MemoryRows(values * lengths.mean().cpu())
    return replace(dictionary, name="random directions", n_features=n, value_rows=scaled, key_rows=None)


class _Measures:
    """The measures of a pipeline's features."""

    def __init__(self, model: Model, pipeline: Pipeline, k: int) -> None:
        self.model, self.pipeline, self.k = model, pipeline, k
        self.centre = vocabulary_centre(model)

    @torch.no_grad()
    def of(self, pipeline: Pipeline, features: Tensor | None = None) -> dict[str, Tensor]:
        """Every measure [n] of the features of a pipeline like ours; "ids" [n, k] are the highest tokens."""
        vectors = pipeline.vectors(features)
        found = pipeline.scorer.topk(vectors, self.k, pipeline.backend, bottom=False, statistics=True).to("cpu")
        assert found.statistics is not None and found.top_scores is not None and found.top_ids is not None
        row = found.statistics
        mass = (found.top_scores.double() - row.logsumexp[:, None]).exp().sum(1)
        return {
            "mean": row.mean,
            "deviation": row.variance.sqrt(),
            "skewness": row.skewness,
            "kurtosis": row.kurtosis,
            "entropy": row.entropy,
            "top_score": found.top_scores[:, 0].double(),
            "top_mass": mass,
            "string_similarity": string_similarity(self.model, found.top_ids),
            "embedding_similarity": embedding_similarity(self.model, found.top_ids, self.centre),
            "ids": found.top_ids,
        }

    def rows(self, ids: Tensor, thresholds: Mapping[str, float]) -> pa.Table:
        found = self.of(self.pipeline, ids)
        tokens = found.pop("ids")[:, :SHOWN_TOKENS]
        texts = self.model.str_tokens(tokens.flatten().tolist())
        width = tokens.shape[1]
        beyond = {name: found[name] > thresholds[name] for name in MEASURES}
        dictionary = self.pipeline.dictionary
        return rows(
            len(ids),
            source=dictionary.name,
            source_layer=dictionary.layer,
            source_id=ids,
            **found,
            predicts=beyond["kurtosis"] & (beyond["string_similarity"] | beyond["embedding_similarity"]),
            tokens=[" ".join(map(repr, texts[i : i + width])) for i in range(0, len(texts), width)],
        )
