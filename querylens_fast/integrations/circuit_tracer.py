"""circuit-tracer: feature files that its frontend reads, and labels in attribution graphs.

Feature files. ``{folder}/index.json.gz`` is a gzipped JSON list by layer of ``{"filename", "offsets"}``; feature i of a
layer is bytes offsets[i] to offsets[i + 1] of its file: four bytes, the length as a little-endian number, then as many
bytes of zlib-compressed JSON. Give the frontend the folder as ``--features_dir``; a Hub repository holds it as
``features/``.

Graphs. Feature nodes carry ``layer`` l and ``feature``, the Cantor pairing (l + f)(l + f + 1)/2 + f with the feature f.
The frontend shows ``clerp`` as a node's label, ``top_logit_effects`` and ``bottom_logit_effects`` as its outputs and,
beside them, ``top_embedding_effects`` and ``bottom_embedding_effects`` as its inputs.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from querylens_fast.integrations.columns import tokens_and_scores
from querylens_fast.integrations.folder import GZIP_LEVEL, claimed, gzipped, json_bytes, write_bytes
from querylens_fast.integrations.result_rows import held_strings
from querylens_fast.integrations.sources import Source, blocks_of, open_source
from querylens_fast.integrations.tokens import token_strings
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.runs.input_file import read_text

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
    strings = _strings(given.values(), model, token_style)
    identity = {
        "format": FORMAT,
        "transcoder_id": transcoder_id,
        "token_style": token_style,
        "layers": [source.identity for source in layers],
    }
    logger.warning("texts and activations are not known here: features have no examples and no histogram")
    target = Path(folder)
    with claimed(target, identity, resume):
        index = []
        for layer, source in enumerate(layers):
            name = f"layer_{layer}.bin"
            offsets = _offsets_of(target / f"{name}.offsets.json", target / name)
            if offsets is None:
                offsets = _write_layer(target / name, source, strings, transcoder_id)
            index.append({"filename": name, "offsets": offsets})
        write_bytes(target / "index.json.gz", gzipped(json_bytes(index)))
        for layer in range(len(layers)):
            (target / f"layer_{layer}.bin.offsets.json").unlink(missing_ok=True)
    return target


def _strings(results: Iterable[Any], model: Model | None, style: str) -> list[str]:
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


def _write_layer(path: Path, source: Source, strings: Sequence[str], transcoder_id: str) -> list[int]:
    records, offsets = [], [0]
    for rows in source.read(blocks_of(len(source), ROWS_AT_ONCE)):
        top, _ = tokens_and_scores(rows.top_ids, rows.top_scores, strings)
        bottom, _ = tokens_and_scores(rows.bottom_ids, rows.bottom_scores, strings)
        for feature, high, low in zip(rows.features.tolist(), top, bottom, strict=True):
            records.append(feature_record(transcoder_id, cantor(source.layer, feature), high, low))
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


def feature_record(transcoder_id: str, index: int, top: Sequence[str], bottom: Sequence[str]) -> bytes:
    """One feature's bytes: the length, then zlib-compressed JSON."""
    record = {
        "transcoder_id": transcoder_id,
        "index": index,
        "examples_quantiles": [],
        "top_logits": list(top),
        "bottom_logits": list(bottom),
        "act_min": DEFAULT_RANGE[0],
        "act_max": DEFAULT_RANGE[1],
    }
    packed = zlib.compress(json_bytes(record), GZIP_LEVEL)
    return len(packed).to_bytes(4, "little") + packed


@dataclass(frozen=True)
class Annotated:
    """What `annotate_graph` did: nodes that are labelled, and feature nodes whose layer or feature no result holds."""

    path: Path
    labelled: int
    unknown: int


def annotate_graph(
    path: str | Path,
    *,
    values: Mapping[int, Any] | None = None,
    keys: Mapping[int, Any] | None = None,
    model: Any = None,
    k: int = 10,
    label_tokens: int = 3,
    overwrite: bool = False,
    out: str | Path | None = None,
    token_style: str = "decoded",
) -> Annotated:
    """Fill the feature nodes of an attribution graph with tokens: label, outputs (values) and inputs (keys).

    Args:
        path: The graph's JSON file.
        values: By layer, results of a value-side preset (query_lens_value, …) or dictionaries.
        keys: By layer, results of a key-side preset, shown as inputs.
        model: Their model. Results can do without: their own token strings are shown then.
        k: Tokens on each side.
        label_tokens: Tokens in the label, from the values or, without them, the keys.
        overwrite: Replace labels that nodes have already.
        out: The file to write; by default the graph itself, replaced atomically.
        token_style: "decoded" or "dashboard".

    Raises:
        ValueError: The file is no attribution graph, neither side is given, or none of its features is in a result;
            nothing has been written then.
        FileNotFoundError: No such file.
    """
    if not values and not keys:
        raise ValueError("neither values= nor keys= is given: pass results by layer")
    path, model = Path(path), None if model is None else as_model(model)
    graph = _read_graph(path)
    strings = _strings([*(values or {}).values(), *(keys or {}).values()], model, token_style)
    nodes = {_place_of(node): None for node in graph["nodes"] if _is_feature(node)}
    found = {
        side: _tokens_of(results or {}, list(nodes), model, strings, k)
        for side, results in (("logit", values), ("embedding", keys))
    }
    labelled = unknown = 0
    for node in filter(_is_feature, graph["nodes"]):
        tokens = {side: found[side].get(_place_of(node)) for side in found}
        if not any(tokens.values()):
            unknown += 1
            continue
        _annotate(node, tokens, label_tokens, overwrite)
        labelled += 1
    if not labelled:
        raise ValueError(f"none of the {unknown} feature nodes of {str(path)!r} is in a result: are they of this set?")
    if unknown:
        logger.warning("%d feature nodes of %s are in no result: left as they are", unknown, path)
    target = Path(out or path)
    write_bytes(target, json.dumps(graph, indent=2).encode())
    return Annotated(target, labelled, unknown)


def _annotate(node: dict[str, Any], tokens: dict[str, Any], label_tokens: int, overwrite: bool) -> None:
    for side, lists in tokens.items():
        if lists:
            node[f"top_{side}_effects"], node[f"bottom_{side}_effects"] = lists
    # The frontend shows inputs only beside outputs.
    node.setdefault("top_logit_effects", [])
    node.setdefault("bottom_logit_effects", [])
    if overwrite or not node.get("clerp"):
        top = (tokens["logit"] or tokens["embedding"])[0]
        node["clerp"] = " · ".join(token.strip() or repr(token)[1:-1] for token in top[:label_tokens])


def _read_graph(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"graph file {str(path)!r} does not exist")
    try:
        graph = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"graph file {str(path)!r} is not valid JSON: {error}") from error
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise ValueError(f"{str(path)!r} is no attribution graph: expected an object with a list 'nodes'")
    return graph


def _is_feature(node: dict[str, Any]) -> bool:
    return "transcoder" in str(node.get("feature_type", "")) and isinstance(node.get("feature"), int)


def _place_of(node: dict[str, Any]) -> tuple[int, int]:
    """(layer, feature) of a feature node."""
    layer, feature = uncantor(node["feature"])
    if str(layer) != str(node.get("layer")):
        raise ValueError(
            f"node {node.get('node_id')!r} is of layer {node.get('layer')}, but its feature number {node['feature']} "
            f"is that of layer {layer}, feature {feature}: is this a graph of circuit-tracer?"
        )
    return layer, feature


def _tokens_of(
    results: Mapping[int, Any], places: Sequence[tuple[int, int]], model: Model | None, strings: Sequence[str], k: int
) -> dict[tuple[int, int], tuple[list[str], list[str]]]:
    """(top tokens, bottom tokens) of the places that the results hold."""
    found = {}
    for layer, result in results.items():
        source = open_source(result, model, k=k, bins=0, unit_norm=False)
        if source.layer != layer:
            raise ValueError(f"the result given for layer {layer} is of layer {source.layer}")
        at = {feature: i for i, feature in enumerate(source.features.tolist())}
        wanted = sorted(at[feature] for there, feature in places if there == layer and feature in at)
        for rows in source.read([slice(i, i + 1) for i in wanted]):
            top, _ = tokens_and_scores(rows.top_ids, rows.top_scores, strings)
            bottom, _ = tokens_and_scores(rows.bottom_ids, rows.bottom_scores, strings)
            found[layer, int(rows.features[0])] = top[0], bottom[0]
    return found
