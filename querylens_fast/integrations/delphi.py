"""delphi: neighbours and explanations in the files that its scorers read.

    results/{run}/neighbours/{hookpoint}-{method}.json          {"latent": [[similarity, index], …]}
    results/{run}/explanations/{hookpoint}_latent{i}.txt        a JSON string

With ``--explainer none`` delphi reads explanations from there, so that signatures are scored by its fuzzing and
detection scorers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.integrations.columns import tokens_and_scores
from querylens_fast.integrations.folder import json_bytes, write_bytes
from querylens_fast.integrations.neighbours import ComputedNeighbours
from querylens_fast.integrations.sources import blocks_of, checked_texts, open_source
from querylens_fast.integrations.tokens import clean, token_strings
from querylens_fast.models.load import as_model
from querylens_fast.runs.arguments import whole_number

METHODS = {"encoder_similarity": "key", "decoder_similarity": "value"}
TEMPLATE = "The latent promotes the tokens {tokens}."
ROWS_AT_ONCE = 4096


def write_neighbours(
    dictionary: Any, folder: str | Path, hookpoint: str, method: str = "decoder_similarity", k: int = 250
) -> Path:
    """Write each feature's k most similar other features by cosine.

    Args:
        dictionary: Whose features (or what `load_dictionary` takes).
        folder: delphi's ``results/{run}/neighbours``.
        hookpoint: delphi's name of the place, such as "layers.6".
        method: "encoder_similarity" (keys) or "decoder_similarity" (values).
        k: Neighbours kept; all others where there are fewer.

    Returns:
        The file.

    Raises:
        ValueError: Another method, k below 1, or a dictionary of one feature.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected {' or '.join(METHODS)}")
    whole_number("k", k)
    dictionary = load_dictionary(dictionary)
    if dictionary.n_features < 2:
        raise ValueError(f"{dictionary.name!r} has one feature: it has no neighbours")
    computed, lists = ComputedNeighbours(dictionary, k, METHODS[method]), {}
    for ids in dictionary.select().split(ROWS_AT_ONCE):
        others, cosines = computed.others(ids)
        for feature, indices, values in zip(ids.tolist(), others.tolist(), cosines.tolist(), strict=True):
            lists[str(feature)] = [[value, index] for value, index in zip(values, indices, strict=True)]
    path = Path(folder) / f"{_checked(hookpoint)}-{method}.json"
    write_bytes(path, json_bytes(lists))
    return path


def write_explanations(
    source: Any,
    folder: str | Path,
    hookpoint: str,
    template: str = TEMPLATE,
    *,
    model: Any,
    k: int = 10,
    features: Any = None,
    texts: Mapping[int, str] | None = None,
) -> list[Path]:
    """Write an explanation of each feature from its tokens.

    Args:
        source: A result of `signatures`, or a dictionary (read out as dashboards do).
        folder: delphi's ``results/{run}/explanations``.
        hookpoint: delphi's name of the place, such as "layers.6".
        template: The explanation; ``{tokens}`` stands for the top tokens, ``{bottom}`` for the bottom tokens, and
            ``{feature}`` and ``{layer}`` for their numbers.
        model: Its model, for token strings.
        k: Tokens in the list.
        features: Of a dictionary: which of them.
        texts: Explanations by feature id; features without one are explained by the template.

    Returns:
        The files, one a feature.

    Raises:
        ValueError: A template with other names, or a text for a feature that is not explained; nothing has been
            written then.
    """
    try:
        template.format(tokens="", bottom="", feature=0, layer=0)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"template is {template!r}; expected text with {{tokens}}, {{bottom}}, {{feature}} or {{layer}} ({error})"
        ) from error
    model = as_model(model)
    opened = open_source(source, model, features=features, k=k, bins=0)
    texts = checked_texts("texts", texts, opened.features)
    strings, name, written = token_strings(model, "decoded"), _checked(hookpoint), []
    for rows in opened.read(blocks_of(len(opened), ROWS_AT_ONCE)):
        top, _ = tokens_and_scores(rows.top_ids, rows.top_scores, strings)
        bottom, _ = tokens_and_scores(rows.bottom_ids, rows.bottom_scores, strings)
        for feature, high, low in zip(rows.features.tolist(), top, bottom, strict=True):
            listed = {"tokens": _listed(high), "bottom": _listed(low), "feature": feature, "layer": opened.layer}
            text = template.format(**listed) if feature not in texts else texts[feature]
            written.append(Path(folder) / f"{name}_latent{feature}.txt")
            write_bytes(written[-1], json_bytes(clean(text)))
    return written


def _listed(tokens: list[str]) -> str:
    return ", ".join(f'"{token}"' for token in tokens)


def _checked(hookpoint: str) -> str:
    if not hookpoint or "/" in hookpoint:
        raise ValueError(f"hookpoint is {hookpoint!r}; expected delphi's name of it, such as 'layers.6'")
    return hookpoint
