"""circuit-tracer: feature files that its frontend reads.

``{folder}/index.json.gz`` is a gzipped JSON list by layer of ``{"filename", "offsets"}``; feature i of a
layer is bytes offsets[i] to offsets[i + 1] of its file: four bytes, the length as a little-endian number, then as many
bytes of zlib-compressed JSON. Give the frontend the folder as ``--features_dir``; a Hub repository holds it as
``features/``.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from querylens_fast.dictionaries.feature_lists import load_features
from querylens_fast.integrations.activity import Activity, open_activity
from querylens_fast.integrations.columns import tokens_and_scores
from querylens_fast.integrations.folder import GZIP_LEVEL, claimed, gzipped, json_bytes, write_bytes
from querylens_fast.integrations.result_rows import held_strings
from querylens_fast.integrations.sources import Source, blocks_of, open_source
from querylens_fast.integrations.tokens import clean, token_strings
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.runs.run_record import digest_of

logger = logging.getLogger(__name__)

FORMAT = "querylens_fast.circuit_tracer/1"
ROWS_AT_ONCE = 1024
DEFAULT_RANGE = (0.0, 1.4)
"""Activations that the frontend colours by where none are known."""


def cantor(layer: int, feature: int) -> int:
    """The number of a feature in a graph: the Cantor pairing of layer and feature."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def uncantor(number: int) -> tuple[int, int]:
    """(layer, feature) of a number, exactly."""
    w = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - w * (w + 1) // 2
    return w - feature, feature


def export_circuit_tracer(
    results_by_layer: Mapping[int, Any] | Sequence[Any],
    folder: str | Path,
    *,
    transcoder_id: str,
    model: Any = None,
    activations: Any = None,
    samples: Mapping[int, Any] | None = None,
    k: int = 10,
    unit_norm: bool = False,
    unembedding: str = "raw",
    token_style: str = "decoded",
    resume: bool = True,
) -> Path:
    """Write feature files for a set of transcoders, one layer after the other.

    Args:
        results_by_layer: For each layer a result of `signatures` (its tokens are shown) or a dictionary (its values
            are read out as dashboards do): by layer number, or a sequence for layers 0, 1, …
        folder: Where index.json.gz is written, usually ``{transcoders}/features``.
        transcoder_id: Name of the set, kept in every record.
        model: Its model. Results can do without: their own token strings are shown then.
        activations: Texts, shown as examples: a feature list (.json, .pkl, or a sequence of `Feature`) of these layers.
        samples: Density and maximum of every feature, by layer (see `activity.open_activity`).
        k: Tokens on each side.
        unit_norm: Of dictionaries: read decoder rows at unit length.
        unembedding: "raw" or "folded".
        token_style: "decoded" or "dashboard".
        resume: Go on with what an earlier, killed call wrote; False: refuse to touch it.

    Returns:
        The folder: pass it as ``features_dir``.

    Raises:
        ValueError: Layers of one set that are not 0 to n − 1, a result of another layer or without some of the
            dictionary's features in order; nothing has been written then.
        FileExistsError: The folder holds another export.
    """
    if not transcoder_id:
        raise ValueError("transcoder_id is ''; expected the set's name")
    given = dict(results_by_layer) if isinstance(results_by_layer, Mapping) else dict(enumerate(results_by_layer))
    model = None if model is None else as_model(model)
    layers = _layers(given, model, k=k, unit_norm=unit_norm, unembedding=unembedding)
    strings = strings_of(given.values(), model, token_style)
    identity = {
        "format": FORMAT,
        "transcoder_id": transcoder_id,
        "token_style": token_style,
        "layers": [source.identity for source in layers],
    }
    activities = _activities(layers, activations, samples or {})
    if activations is not None or samples:
        fields = [_known(a, i) for a, source in zip(activities, layers, strict=True) for i in source.features.tolist()]
        identity["activity"] = digest_of({"fields": fields})
    target = Path(folder)
    with claimed(target, identity, resume):
        index = []
        for layer, source in enumerate(layers):
            name = f"layer_{layer}.bin"
            offsets = _offsets_of(target / f"{name}.offsets.json", target / name)
            if offsets is None:
                offsets = _write_layer(target / name, source, strings, transcoder_id, activities[layer])
            index.append({"filename": name, "offsets": offsets})
        write_bytes(target / "index.json.gz", gzipped(json_bytes(index)))
        for layer in range(len(layers)):
            (target / f"layer_{layer}.bin.offsets.json").unlink(missing_ok=True)
    return target


def strings_of(results: Iterable[Any], model: Model | None, style: str) -> list[str]:
    """Token strings by id: the model's, or those that the results hold."""
    if model is not None:
        return token_strings(model, style)
    if style != "decoded":
        raise ValueError(f"token_style is {style!r}, but results hold decoded tokens: pass model=")
    return held_strings(results)


def _layers(given: dict[int, Any], model: Model | None, **options: Any) -> list[Source]:
    if sorted(given) != list(range(len(given))) or not given:
        raise ValueError(
            f"results_by_layer has layers {sorted(given)}; the frontend counts a set's layers from 0, so all of 0 to "
            "n − 1 are needed"
        )
    layers = []
    for layer in range(len(given)):
        source = open_source(given[layer], model, bins=0, **options)
        if source.layer != layer:
            raise ValueError(f"results_by_layer[{layer}] is of layer {source.layer}")
        if not torch.equal(source.features, torch.arange(len(source))):
            raise ValueError(
                f"results_by_layer[{layer}] holds features other than 0 to {len(source) - 1} in order; feature files "
                "are indexed by feature, so compute it with features='all'"
            )
        layers.append(source)
    return layers


def _activities(layers: Sequence[Source], activations: Any, samples: Mapping[int, Any]) -> list[Activity]:
    """The activity of each layer's features; what will be lacking is logged."""
    listed = load_features(activations) if isinstance(activations, (str, Path)) else list(activations or [])
    of = [[feature for feature in listed if int(feature.layer) == layer] for layer in range(len(layers))]
    if listed and not any(of):
        raise ValueError(f"activations lists {len(listed)} features, none of which is of layers 0 to {len(layers) - 1}")
    if unknown := sorted(set(samples) - set(range(len(layers)))):
        raise ValueError(f"samples has layer {unknown[0]}; expected layers 0 to {len(layers) - 1}")
    if not listed:
        logger.warning("no activations= are given: features have no examples")
    if not samples:
        logger.warning("no samples= are given: features have no activation frequency")
    logger.warning("the frontend's histogram is one of activations, which is not known here: it is left out")
    return [
        open_activity(of[layer] or None, samples.get(layer), source.features, layer, len(source))
        for layer, source in enumerate(layers)
    ]


def _known(activity: Activity, feature: int) -> dict[str, Any]:
    """The fields of a record that come from activations."""
    examples = []
    for text in activity.whole_texts(feature):
        values = [round(float(x), 5) for x in text.get_values()]
        peak = max(range(len(values)), key=values.__getitem__)
        tokens = [clean(token) for token in text.get_tokens()]
        examples.append(
            {"tokens_acts_list": values, "train_token_ind": peak, "is_repeated_datapoint": False, "tokens": tokens}
        )
    strongest = round(activity.max_of(feature), 5)
    low, high = (0.0, strongest) if strongest > 0 else DEFAULT_RANGE
    known = {
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}] if examples else [],
        "act_min": low,
        "act_max": high,
    }
    return known if activity.density is None else {**known, "activation_frequency": activity.density_of(feature)}


def _write_layer(
    path: Path, source: Source, strings: Sequence[str], transcoder_id: str, activity: Activity
) -> list[int]:
    records, offsets = [], [0]
    for rows in source.read(blocks_of(len(source), ROWS_AT_ONCE)):
        top, _ = tokens_and_scores(rows.top_ids, rows.top_scores, strings)
        bottom, _ = tokens_and_scores(rows.bottom_ids, rows.bottom_scores, strings)
        for feature, high, low in zip(rows.features.tolist(), top, bottom, strict=True):
            record = {
                "transcoder_id": transcoder_id,
                "index": cantor(source.layer, feature),
                "top_logits": high,
                "bottom_logits": low,
                **_known(activity, feature),
            }
            records.append(_packed(record))
            offsets.append(offsets[-1] + len(records[-1]))
    write_bytes(path, b"".join(records))
    write_bytes(path.with_name(f"{path.name}.offsets.json"), json_bytes(offsets))
    return offsets


def _offsets_of(record: Path, data: Path) -> list[int] | None:
    """The offsets of a layer that an earlier call wrote whole."""
    if not record.is_file() or not data.is_file():
        return None
    try:
        offsets = json.loads(record.read_text(encoding="utf-8"))
        return offsets if data.stat().st_size == offsets[-1] else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _packed(record: dict[str, Any]) -> bytes:
    """One feature's bytes: the length, then zlib-compressed JSON."""
    packed = zlib.compress(json_bytes(record), GZIP_LEVEL)
    return len(packed).to_bytes(4, "little") + packed
