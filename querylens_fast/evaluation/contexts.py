"""Contexts of chosen features: the tokens of their strongest sequences with the activation at each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.feature_lists import Activation, Feature
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.feature_sample import FeatureSample
from querylens_fast.lens.ablations import activations
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.runs.run_record import agree


@torch.no_grad()
def feature_list(
    sample: FeatureSample,
    dictionary: Any,
    model: Any,
    tokens: Tokens | Tensor | str | Path,
    features: Sequence[int] | Tensor,
) -> list[Feature]:
    """The reference's `Feature` list of chosen features, with an `Activation` (tokens and values) for each example.

    Args:
        sample: Of the same dictionary and tokens.
        dictionary: As in `feature_sample`.
        model: As in `feature_sample`, with a tokenizer.
        tokens: The sample's tokens.
        features: Feature ids.

    Returns:
        Features as `save_features_json` writes them and the reference's code reads them.

    Raises:
        ValueError: Other tokens or another dictionary than the sample's.
    """
    model, dictionary = as_model(model), load_dictionary(dictionary)
    tokens = as_tokens(tokens, model)
    _check_same(sample, dictionary, tokens)
    chosen = torch.as_tensor(features).long()
    needed = sample.sequences[chosen]
    values: dict[int, Tensor] = {}
    for sequence in needed[needed >= 0].unique().tolist():
        acts = activations(model, dictionary, tokens.ids[sequence : sequence + 1].to(model.device))[0]
        values[sequence] = acts[:, chosen.to(acts.device)].float().cpu()
    return [_as_feature(sample, dictionary, model, tokens, values, i, int(f)) for i, f in enumerate(chosen)]


def _as_feature(
    sample: FeatureSample,
    dictionary: Dictionary,
    model: Model,
    tokens: Tokens,
    values: dict[int, Tensor],
    place: int,
    feature: int,
) -> Feature:
    """One feature with its examples; ``values`` holds [S, chosen features] of each sequence."""
    examples = []
    for sequence, position in zip(sample.sequences[feature].tolist(), sample.positions[feature].tolist(), strict=True):
        if sequence < 0:
            break
        valid = tokens.valid_mask[sequence]
        acts = values[sequence][valid, place]
        strings = model.str_tokens(tokens.ids[sequence][valid].tolist())
        peak = int(valid[:position].sum())
        pairs = list(zip(strings, acts.tolist(), strict=True))
        examples.append(
            Activation(f"{sequence}", pairs, float(acts.max()), float(acts.min()), max_value_token_index=peak)
        )
    return Feature(
        model_id=model.name,
        feature=feature,
        layer=dictionary.layer,
        type=dictionary.kind,
        activations=examples,
        sae_id=None if dictionary.kind == "neurons" else Path(dictionary.name).name,
        sae_release=None if dictionary.kind == "neurons" else dictionary.name,
        size=dictionary.n_features,
    )


def _check_same(sample: FeatureSample, dictionary: Dictionary, tokens: Tokens) -> None:
    for name, mine, theirs in (
        ("tokens", tokens.digest, sample.metadata["tokens_digest"]),
        ("dictionary", dictionary.fingerprint, sample.metadata["dictionary_fingerprint"]),
    ):
        if not agree(theirs, mine):
            raise ValueError(
                f"this sample was made with another {name} (digests {theirs[-8:]} and {mine[-8:]}): pass those that "
                f"feature_sample was called with ({sample.metadata['tokens']}, {sample.metadata['dictionary']})"
            )
