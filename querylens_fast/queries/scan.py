"""Rows of a result read from its Parquet files: what there is before an index, and of runs that are not finished.

A feature costs its row group, a token one side of all row groups: some tenths of a second over a million features.
Memory: the feature ids, and the row group that was read last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from querylens_fast.queries.files import ResultFile, reading
from querylens_fast.runs.sealed_parquet import opened

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

LISTS = ("top_ids", "top_scores", "bottom_ids", "bottom_scores", "top_se", "histogram")
TERMS = ("layer_indices", "layer_energy_scores", "layer_top_ids", "layer_bottom_ids")
NOT_STATISTICS = ("feature_index", "layer", "feature", "top_tokens", "bottom_tokens", "transition", *LISTS, *TERMS)


class Record(NamedTuple):
    """A feature's row of a result."""

    top_ids: np.ndarray
    top_scores: np.ndarray
    bottom_ids: np.ndarray
    bottom_scores: np.ndarray
    top_se: np.ndarray | None
    histogram: np.ndarray | None
    """Counts in equal steps from the lowest score to the highest."""
    choice: str | None
    terms: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None
    """Layers [T], energies [T], top ids [T, k], bottom ids [T, k]."""


class Chunk(NamedTuple):
    """A row group of a file."""

    path: Path
    group: int
    rows: int


class Scan:
    """One layer's rows of a result, sorted by feature, without an index."""

    indexed = False

    def __init__(self, file: ResultFile, layer: int | None = None) -> None:
        """Read the feature ids.

        Args:
            file: A result of `signatures`, finished or not.
            layer: Of a result of several layers, which.

        Raises:
            ResultGone: The file is not there any more.
        """
        self.file = file
        self.chunks: list[Chunk] = []
        ids: list[np.ndarray] = []
        layers: list[np.ndarray] = []
        self.columns: tuple[str, ...] = ()
        for path in file.parts:
            with reading(path), opened(path) as parquet:
                sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
                self.chunks += [Chunk(path, i, n) for i, n in enumerate(sizes)]
                self.columns = tuple(parquet.schema_arrow.names)
                table = parquet.read(["feature"] if layer is None else ["feature", "layer"])
            ids.append(table["feature"].to_numpy().astype(np.int64))
            layers.append(table[-1].to_numpy())
        all_ids = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        of_layer = np.concatenate(layers) if layers else np.zeros(0, np.int32)
        self.places: np.ndarray | None = None
        """Where in the file each row is, [n]; None: there is one layer, sorted by feature."""
        if layer is not None or (np.diff(all_ids) < 0).any():
            places = np.arange(len(all_ids)) if layer is None else np.flatnonzero(of_layer == layer)
            self.places = places[np.argsort(all_ids[places], kind="stable")]
        self.features = all_ids if self.places is None else all_ids[self.places]
        self.starts = np.cumsum([0, *(c.rows for c in self.chunks)])
        self._lock = threading.Lock()
        self._last: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the numbers that each row has."""
        return statistics_of(self.columns)

    def has(self, column: str) -> bool:
        """Is the column in the result?"""
        return column in self.columns

    def value(self, name: str, row: int) -> float:
        """A statistic of one row."""
        return float(self.column(name)[row])

    def record(self, row: int) -> Record:
        """The row's signature."""
        wanted = [name for name in (*LISTS, *TERMS, "transition") if name in self.columns]
        place = row if self.places is None else int(self.places[row])
        chunk = int(np.searchsorted(self.starts, place, side="right")) - 1
        with self._lock:
            if self._last is None or self._last[0] != chunk:
                self._last = chunk, self._read(self.chunks[chunk], wanted)
            found = self._last[1].slice(place - int(self.starts[chunk]), 1).to_pylist()[0]
        terms = None
        if "layer_indices" in found:
            terms = tuple(np.array(found[name]) for name in TERMS)
        lists = {name: np.array(found[name]) if name in found else None for name in LISTS}
        return Record(**lists, choice=found.get("transition"), terms=terms)  # type: ignore[arg-type]

    def ids(self, row: int, end: str) -> list[int]:
        """The tokens of one end of the row's signature."""
        record = self.record(row)
        return (record.top_ids if end == "top" else record.bottom_ids).tolist()

    def column(self, name: str) -> np.ndarray:
        """A statistic of every row, [n]."""
        parts = []
        for path in dict.fromkeys(c.path for c in self.chunks):
            with reading(path), opened(path) as parquet:
                parts.append(parquet.read([name])[name].to_numpy())
        values = np.concatenate(parts) if parts else np.zeros(0)
        return values if self.places is None else values[self.places]

    def postings(
        self, token_id: int, end: str, check: Callable[[], None] = lambda: None, limit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(Rows whose ``end`` holds the token, its scores), the most extreme score first, or the first ones of them.

        ``check`` is called between row groups and may raise.
        """
        rows: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        for start, table in zip(self.starts, self._tables([f"{end}_ids", f"{end}_scores"]), strict=False):
            check()
            ids = table[f"{end}_ids"].combine_chunks()
            at = np.flatnonzero(flat(ids) == token_id)
            rows.append(start + np.searchsorted(ids.offsets.to_numpy(), at, side="right") - 1)
            scores.append(flat(table[f"{end}_scores"].combine_chunks())[at])
        if not rows:
            return np.zeros(0, np.int64), np.zeros(0)
        found, values = np.concatenate(rows), np.concatenate(scores)
        if self._row_of is not None:
            found = self._row_of[found]
            found, values = found[found >= 0], values[found >= 0]
        order = np.lexsort((found, -values if end == "top" else values))
        return found[order][:limit], values[order][:limit]

    def strings(self) -> dict[int, str]:
        """Every token that the result holds the string of, by id."""
        if "top_tokens" not in self.columns:
            return {}
        found: dict[int, str] = {}
        encoded = [f"{end}_tokens.list.element" for end in ("top", "bottom")]
        for path in dict.fromkeys(chunk.path for chunk in self.chunks):
            with reading(path), opened(path, read_dictionary=encoded) as parquet:
                found |= strings_of(parquet)
        return found

    @cached_property
    def _row_of(self) -> np.ndarray | None:
        """The row of each place in the file, −1 for other layers' places; None: they are the same."""
        if self.places is None:
            return None
        found = np.full(int(self.starts[-1]), -1)
        found[self.places] = np.arange(len(self.places))
        return found

    def _read(self, chunk: Chunk, columns: Sequence[str]) -> pa.Table:
        with reading(chunk.path), opened(chunk.path) as parquet:
            return parquet.read_row_group(chunk.group, list(columns))

    def _tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of every row group, in their order."""
        for path in dict.fromkeys(chunk.path for chunk in self.chunks):
            with reading(path), opened(path) as parquet:
                for i in range(parquet.num_row_groups):
                    yield parquet.read_row_group(i, list(columns))


def statistics_of(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns of a result that are statistics."""
    return tuple(name for name in columns if name not in NOT_STATISTICS and not name.startswith("layer_"))


def flat(lists: Any) -> np.ndarray:
    """The elements of lists, one after another."""
    return lists.flatten().to_numpy(zero_copy_only=False)


def strings_of(parquet: pq.ParquetFile) -> dict[int, str]:
    """Token strings by id, from a file whose columns of strings are read as dictionaries.

    Strings are read of those row groups only that hold an id which was not seen before.
    """
    found: dict[int, str] = {}
    seen = np.zeros(1 << 18, bool)
    for i in range(parquet.num_row_groups):
        for end in ("top", "bottom"):
            ids = flat(parquet.read_row_group(i, [f"{end}_ids"])[f"{end}_ids"].combine_chunks())
            if len(ids) and ids.max() >= len(seen):
                seen = np.pad(seen, (0, int(ids.max()) + 1 - len(seen)))
            places = np.flatnonzero(~seen[ids])
            if len(places):
                new, first = np.unique(ids[places], return_index=True)
                texts = parquet.read_row_group(i, [f"{end}_tokens"])[f"{end}_tokens"].combine_chunks().flatten()
                found.update(zip(new.tolist(), texts.take(places[first]).to_pylist(), strict=True))
                seen[new] = True
    return found
