"""Token lists of a result file or of a table of scores for a judge, and the judgements as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from querylens_fast.evaluation.judge import Judgement, list_key, prompt_digest, token_lists
from querylens_fast.lens.search import show
from querylens_fast.lens.storage import StoredSignatures, format_of, read_identity, refuse_other_columns
from querylens_fast.models.load import load_model
from querylens_fast.relations.tables import Block, Categories, RelationTable, read_table, rows, tabulate
from querylens_fast.runs.run_record import digest_of

if TYPE_CHECKING:
    import pyarrow as pa


class TokenList(NamedTuple):
    """The k top tokens of a feature under one method."""

    source: str
    """The dictionary."""
    layer: int | None
    feature: int
    method: str
    tokens: list[str]


def result_lists(path: str | Path, n_features: int, *, seed: int = 0, model: str | None = None) -> list[TokenList]:
    """The top tokens of a seeded sample of features.

    Args:
        path: A ``.parquet`` or ``.jsonl`` result of `signatures`, of one layer; or scores.parquet of an evaluation: the
            25 tokens (or the largest k) of each of its methods, for the same features.
        n_features: Features to take of each dictionary; all where there are fewer.
        seed: Of the sample.
        model: Whose tokenizer to use, for files without token strings. Default: the model that the scores name.

    Raises:
        FileNotFoundError: No such file.
        ValueError: n_features below 1, several layers in one result, or no token strings and no model.
    """
    if n_features < 1:
        raise ValueError(f"features is {n_features}; expected at least 1")
    if not Path(path).is_file():
        raise FileNotFoundError(f"result {str(path)!r} does not exist")
    identity = read_identity(path)
    if identity.get("what") == "scores":
        return _scored_lists(read_table(path), n_features, seed, model)
    refuse_other_columns(path)
    table = StoredSignatures(Path(path), 0, format_of(path)).table()
    features = table["feature"].to_pylist()
    if not features:
        raise ValueError(f"result {str(path)!r} holds no signatures to judge")
    if len(set(features)) != len(features):
        raise ValueError(f"result {str(path)!r} holds features of several layers; judge one layer's result at a time")
    places = _sample(len(features), n_features, seed)
    chosen = [int(features[i]) for i in places]
    if "top_tokens" in table.column_names:
        lists = table["top_tokens"].take(places).to_pylist()
    elif model is not None:
        lists = [show(path, feature, model=model)[0]["top_tokens"] for feature in chosen]
    else:
        raise ValueError(f"result {str(path)!r} has no token strings; name its model with --model")
    source, method = Path(identity.get("dictionary", "")).name, identity.get("preset", "")
    layer = identity.get("layer")
    return [TokenList(source, layer, f, method, tokens) for f, tokens in zip(chosen, lists, strict=True)]


def _sample(n: int, size: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size].sort().values.tolist()


def _scored_lists(scores: RelationTable, n_features: int, seed: int, model: str | None) -> list[TokenList]:
    import pyarrow.compute as pc

    sizes = scores.metadata["ks"]
    k = 25 if 25 in sizes else max(sizes)
    columns = ["source", "source_layer", "source_id", "method", "k", "top_ids"]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in scores.table(columns).filter(pc.field("k") == k).to_pylist():
        found.setdefault(row["source"], []).append(row)
    wanted = []
    for own in found.values():
        features = sorted({row["source_id"] for row in own})
        chosen = {features[i] for i in _sample(len(features), n_features, seed)}
        wanted += [row for row in own if row["source_id"] in chosen]
    lists = token_lists(load_model(model or scores.metadata["model"]), [row["top_ids"] for row in wanted])
    return [
        TokenList(row["source"], row["source_layer"], row["source_id"], row["method"], tokens)
        for row, tokens in zip(wanted, lists, strict=True)
    ]


def judge_table(
    lists: Sequence[TokenList],
    found: Mapping[str, Judgement],
    *,
    judge: str,
    source: str = "",
    out: str | Path | None = None,
) -> RelationTable:
    """One row per token list: source, source_layer, source_id, method, k, key, interpretability, summary, explanation.

    Interpretability is null where there is no readable answer.

    Args:
        lists: From `result_lists`.
        found: Judgements by `list_key`.
        judge: The judging model's name, for the table's metadata.
        source: The result that was judged, likewise.
        out: A ``.parquet`` file to write as well.

    Raises:
        ValueError: No list has an answer.
        FileExistsError: ``out`` holds other judgements.
    """
    keys = [list_key(one.tokens) for one in lists]
    own = [found.get(key) for key in keys]
    if not any(own):
        raise ValueError(f"none of the {len(lists)} token lists has an answer; are the answers of another result?")

    def compute() -> pa.Table:
        import pyarrow as pa

        table = rows(
            len(own),
            source=Categories([one.source for one in lists], torch.arange(len(lists))),
            source_id=torch.tensor([one.feature for one in lists]),
            method=Categories([one.method for one in lists], torch.arange(len(lists))),
            k=torch.tensor([len(one.tokens) for one in lists]),
            key=keys,
        )
        columns = {
            "source_layer": pa.array([one.layer for one in lists], pa.int32()),
            "interpretability": pa.array([j.score if j else None for j in own], pa.float64()),
            "summary": pa.array([j.summary if j else None for j in own], pa.string()),
            "explanation": pa.array([j.explanation if j else None for j in own], pa.string()),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    metadata = {"what": "judgements", "result": source, "judge": judge, "prompt": prompt_digest()}
    metadata["answers"] = digest_of([keys, [None if j is None else astuple(j) for j in own]])
    return tabulate([Block(len(own), compute)], metadata, out=out, progress=False)
