"""What is known of features beside their signatures: feature samples, scores, relations.

Numbers are held in memory; a sample's examples and tokens are read by row group.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from querylens_fast.queries.files import ResultFile, reading
from querylens_fast.runs.sealed_parquet import opened

if TYPE_CHECKING:
    import pyarrow as pa

N_TOKENS = 20
"""Tokens at which a feature is active that are given, at most."""


class SampleTable:
    """A feature sample: one row a feature."""

    NUMBERS = ("density", "mean", "maximum", "n_active", "n_sequences")
    EXAMPLES = ("example_values", "example_sequences", "example_positions", "example_tokens")
    TOKENS = ("token_ids", "token_counts")

    def __init__(self, file: ResultFile) -> None:
        """Read the sample. Raises ResultGone where the file has changed."""
        self.path, self.metadata = file.path, file.identity
        table = _read(file, ["feature", *self.NUMBERS])
        self.features = table["feature"].to_numpy()
        self.numbers = {name: table[name].to_numpy() for name in self.NUMBERS}
        with reading(self.path), opened(self.path) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._lock = threading.Lock()
        self._last: tuple[int, pa.Table] | None = None

    def lists_of(self, row: int) -> tuple[list[tuple[float, int, int, int]], list[tuple[int, int]]]:
        """(Value, sequence, position, token id) of each example, the strongest first, and (token id, count) of the
        tokens at which the feature is active, the most frequent first; both from the row's row group.
        """
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            if self._last is None or self._last[0] != group:
                with reading(self.path), opened(self.path) as parquet:
                    self._last = group, parquet.read_row_group(group, [*self.EXAMPLES, *self.TOKENS])
            found = self._last[1].slice(row - int(self._starts[group]), 1).to_pylist()[0]
        examples = list(zip(*(found[name] for name in self.EXAMPLES), strict=True))
        return examples, list(zip(*(found[name][:N_TOKENS] for name in self.TOKENS), strict=True))


class ScoreTable:
    """The evaluation's scores of one dictionary's features."""

    NUMBERS = ("input_score", "output_score", "string_coherence", "embedding_coherence")

    def __init__(self, file: ResultFile, label: str) -> None:
        """Read the dictionary's rows. Raises ResultGone where the file has changed."""
        import pyarrow.compute as pc

        table = _read(file, ["source", "source_id", "method", "k", "n_examples", *self.NUMBERS])
        table = table.filter(pc.equal(table["source"].cast("string"), label))  # type: ignore[attr-defined]
        self.features = table["source_id"].to_numpy()
        order = np.argsort(self.features, kind="stable")
        self.features = self.features[order]
        self.names, self.codes = _coded(table["method"], order)
        self.methods = tuple(self.names[code] for code in dict.fromkeys(self.codes.tolist()))
        self.k, self.n_examples = (table[name].to_numpy()[order] for name in ("k", "n_examples"))
        self.numbers = {name: table[name].cast("float64").to_numpy()[order] for name in self.NUMBERS}

    def rows_of(self, feature: int) -> range:
        return _rows_of(self.features, feature)

    def column(self, name: str, method: str) -> tuple[np.ndarray, np.ndarray]:
        """(Feature ids, scores) of a method at the largest k; NaN for features without the score."""
        own = self.codes == self.names.index(method)
        own &= self.k == (self.k[own].max() if own.any() else 0)
        return self.features[own], self.numbers[name][own]

    def means(self) -> dict[str, float]:
        """ "input_score query_lens_key" → mean over the features that have it."""
        found = {}
        for name in self.NUMBERS[:2]:
            for method in self.methods:
                values = self.column(name, method)[1]
                values = values[~np.isnan(values)]
                if len(values):
                    found[f"{name} {method}"] = float(values.mean())
        return found


class LinkTable:
    """The relations of one dictionary's features: top side, best first within each relation."""

    def __init__(self, file: ResultFile, name: str, layer: int) -> None:
        """Read the rows of the source with this name and layer. Raises ResultGone where the file has changed."""
        import pyarrow.compute as pc

        self.what = file.identity["what"]
        self.scores_are = file.identity.get("score")
        columns = ["source", "source_layer", "source_id", "target", "target_layer", "target_id", "side", "score"]
        table = _read(file, columns, optional=("relation",))
        own = pc.and_(  # type: ignore[attr-defined]
            pc.equal(table["source"].cast("string"), name),  # type: ignore[attr-defined]
            pc.and_(  # type: ignore[attr-defined]
                pc.equal(table["source_layer"], layer),  # type: ignore[attr-defined]
                pc.equal(table["side"].cast("string"), "top"),  # type: ignore[attr-defined]
            ),
        )
        table = table.filter(own)
        features = table["source_id"].to_numpy()
        order = np.argsort(features, kind="stable")
        self.features = features[order]
        self.target, self.target_codes = _coded(table["target"], order)
        self.relation, self.relation_codes = (
            _coded(table["relation"], order)
            if "relation" in table.column_names
            else ([self.what], np.zeros(len(order), np.int32))
        )
        self.target_layer = table["target_layer"].fill_null(-1).to_numpy()[order]
        self.target_id, self.score = (table[name].to_numpy()[order] for name in ("target_id", "score"))

    def rows_of(self, feature: int) -> list[tuple[str, str, int | None, int, float]]:
        """(Relation, target's name, its layer, feature, score) of each relation."""
        found = []
        for i in _rows_of(self.features, feature):
            layer = int(self.target_layer[i])
            target, relation = self.target[self.target_codes[i]], self.relation[self.relation_codes[i]]
            found.append((relation, target, None if layer < 0 else layer, int(self.target_id[i]), float(self.score[i])))
        return found


def _read(file: ResultFile, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    import pyarrow as pa

    parts = []
    for path in file.parts:
        with reading(path), opened(path) as parquet:
            there = parquet.schema_arrow.names
            parts.append(parquet.read([*columns, *(name for name in optional if name in there)]))
    if not parts:
        raise ValueError(f"{str(file.path)!r} holds no rows yet")
    return pa.concat_tables(parts).unify_dictionaries()


def _coded(column: Any, order: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(Strings, a code for each row)."""
    array = column.combine_chunks()
    encoded = array if hasattr(array, "dictionary") else array.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)[order]


def _rows_of(features: np.ndarray, feature: int) -> range:
    start, stop = np.searchsorted(features, [feature, feature + 1])
    return range(int(start), int(stop))
