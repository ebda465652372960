"""Token lists of a result file for a judge, and the judgements as a table of one row a feature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from querylens_fast.evaluation.judge import Judgement, list_key, prompt_digest
from querylens_fast.lens.search import show
from querylens_fast.lens.storage import StoredSignatures, format_of, read_identity, refuse_other_columns
from querylens_fast.relations.tables import Block, RelationTable, rows, tabulate

if TYPE_CHECKING:
    import pyarrow as pa


def result_lists(path: str | Path, n_features: int, *, seed: int = 0, model: str | None = None) -> dict[int, list[str]]:
    """The top tokens of a seeded sample of a result's features, by feature id.

    Args:
        path: A ``.parquet`` or ``.jsonl`` result of `signatures`, of one layer.
        n_features: Features to take; all where the result has fewer.
        seed: Of the sample.
        model: Whose tokenizer to use, for a result without token strings.

    Raises:
        FileNotFoundError: No such file.
        ValueError: n_features below 1, several layers in one file, or no token strings and no model.
    """
    if n_features < 1:
        raise ValueError(f"features is {n_features}; expected at least 1")
    if not Path(path).is_file():
        raise FileNotFoundError(f"result {str(path)!r} does not exist")
    if format_of(path) == "parquet":
        read_identity(path)
        refuse_other_columns(path)
    table = StoredSignatures(Path(path), 0, format_of(path)).table()
    features = table["feature"].to_pylist()
    if len(set(features)) != len(features):
        raise ValueError(f"result {str(path)!r} holds features of several layers; judge one layer's result at a time")
    places = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:n_features].sort().values
    chosen = [int(features[i]) for i in places.tolist()]
    if "top_tokens" in table.column_names:
        return dict(zip(chosen, table["top_tokens"].take(places.tolist()).to_pylist(), strict=True))
    if model is None:
        raise ValueError(f"result {str(path)!r} has no token strings; name its model with --model")
    return {feature: show(path, feature, model=model)[0]["top_tokens"] for feature in chosen}


def judge_table(
    lists: Mapping[int, list[str]], found: Mapping[str, Judgement], *, source: str = "", out: str | Path | None = None
) -> RelationTable:
    """One row a feature: score (null where there is no readable answer), summary, explanation.

    Args:
        lists: Token lists by feature id.
        found: Judgements by `list_key`.
        source: The result that was judged, for the table's metadata.
        out: A ``.parquet`` file to write as well.

    Raises:
        ValueError: No list has an answer.
        FileExistsError: ``out`` exists.
    """
    own = [found.get(list_key(tokens)) for tokens in lists.values()]
    if not any(own):
        raise ValueError(f"none of the {len(lists)} token lists has an answer; are the answers of another result?")

    def compute() -> pa.Table:
        import pyarrow as pa

        table = rows(len(own), feature=torch.tensor(list(lists), dtype=torch.int64))
        columns = {
            "score": pa.array([j.score if j else None for j in own], pa.float64()),
            "summary": pa.array([j.summary if j else None for j in own], pa.string()),
            "explanation": pa.array([j.explanation if j else None for j in own], pa.string()),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    metadata = {"what": "judgements", "result": source, "prompt": prompt_digest()}
    return tabulate([Block(len(own), compute)], metadata, out=out, resume=False, progress=False)
