"""circuit-tracer: labels, outputs and inputs of the feature nodes of an attribution graph.

Feature nodes carry ``layer`` l and ``feature``, the Cantor pairing (l + f)(l + f + 1)/2 + f with the feature f.
The frontend shows ``clerp`` as a node's label, ``top_logit_effects`` and ``bottom_logit_effects`` as its outputs and,
beside them, ``top_embedding_effects`` and ``bottom_embedding_effects`` as its inputs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from querylens_fast.integrations.circuit_tracer import strings_of, uncantor
from querylens_fast.integrations.columns import tokens_and_scores
from querylens_fast.integrations.folder import write_bytes
from querylens_fast.integrations.sources import open_source
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.runs.input_file import read_text

logger = logging.getLogger(__name__)


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
    strings = strings_of([*(values or {}).values(), *(keys or {}).values()], model, token_style)
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
