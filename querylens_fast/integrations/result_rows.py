"""Rows of results of `signatures`: in memory, in Parquet and in JSONL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.integrations.tokens import OUT_OF_RANGE, clean
from querylens_fast.lens.results import Signatures
from querylens_fast.lens.storage import FORMATS, StoredSignatures, read_jsonl
from querylens_fast.runs.sealed_parquet import opened

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NO_TOKEN = -1
"""Pads the lists of rows that hold fewer tokens than others; its score is NaN."""
COLUMNS = ("top_ids", "top_scores", "bottom_ids", "bottom_scores")
HISTOGRAM = "histogram"
"""A further column of results that were computed with one: heights [n, bins]."""


def is_result(source: Any) -> bool:
    """Whether a source is a result, and no dictionary."""
    if isinstance(source, (Signatures, StoredSignatures)):
        return True
    return isinstance(source, (str, Path)) and Path(source).suffix in FORMATS


def rows_of(result: Any) -> _Stored:
    """The rows of a result: `Signatures`, `StoredSignatures`, or the path of a .parquet or .jsonl file."""
    if isinstance(result, Signatures):
        return _Held(result)
    path = Path(result.path if isinstance(result, StoredSignatures) else result)
    return _Jsonl(path) if FORMATS[path.suffix] == "jsonl" else _Parquet(path)


def held_strings(sources: Iterable[Any]) -> list[str]:
    """Token strings by id, as results hold them; OUT_OF_RANGE for tokens that none of them has.

    Raises:
        ValueError: A source is a dictionary, or a result without token strings.
    """
    found: dict[int, str] = {}
    for source in sources:
        if not is_result(source):
            raise ValueError("a dictionary is read out through its model: pass model=")
        for ids, tokens in _held_tokens(source):
            found.update(zip(ids, map(clean, tokens), strict=True))
    return [found.get(i, OUT_OF_RANGE) for i in range(max(found, default=-1) + 1)]


def _held_tokens(source: Any) -> Iterator[tuple[list[int], list[str]]]:
    """Ids and strings of the tokens of both sides of a result."""
    if isinstance(source, Signatures):
        for ids, tokens in ((source.top_ids, source.top_tokens), (source.bottom_ids, source.bottom_tokens)):
            yield ids.flatten().tolist(), [token for row in tokens for token in row]
        return
    path = Path(source.path if isinstance(source, StoredSignatures) else source)
    for row in read_jsonl(path) if FORMATS[path.suffix] == "jsonl" else _token_rows(path):
        if "top_tokens" not in row:
            raise ValueError(f"{str(path)!r} holds no token strings: pass model=")
        yield row["top_ids"], row["top_tokens"]
        yield row["bottom_ids"], row["bottom_tokens"]


def _token_rows(path: Path) -> Iterator[dict[str, Any]]:
    with opened(path) as file:
        columns = [c for c in ("top_ids", "top_tokens", "bottom_ids", "bottom_tokens") if c in file.schema_arrow.names]
        for i in range(file.num_row_groups):
            yield from file.read_row_group(i, columns).to_pylist()


class _Stored:
    """The rows of a result: feature ids, and tokens, scores and histogram of a slice of rows."""

    columns: tuple[str, ...] = COLUMNS

    def features(self) -> Tensor:
        raise NotImplementedError

    def read(self, rows: slice) -> dict[str, Tensor]:
        raise NotImplementedError


class _Held(_Stored):
    def __init__(self, found: Signatures) -> None:
        self.found = found
        self.columns = COLUMNS if found.histogram is None else (*COLUMNS, HISTOGRAM)

    def features(self) -> Tensor:
        return self.found.features

    def read(self, rows: slice) -> dict[str, Tensor]:
        return {name: getattr(self.found, name)[rows] for name in self.columns}


class _Jsonl(_Stored):
    def __init__(self, path: Path) -> None:
        self.rows = sorted(read_jsonl(path), key=lambda row: row["feature_index"])
        if self.rows and all(HISTOGRAM in row for row in self.rows):
            self.columns = (*COLUMNS, HISTOGRAM)

    def features(self) -> Tensor:
        return torch.tensor([row["feature"] for row in self.rows], dtype=torch.int64)

    def read(self, rows: slice) -> dict[str, Tensor]:
        chosen = self.rows[rows]
        return {name: _padded([row[name] for row in chosen], name) for name in self.columns}


class _Parquet(_Stored):
    """Reads a row group at a time and keeps the one that was read last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as file:
            if HISTOGRAM in file.schema_arrow.names:
                self.columns = (*COLUMNS, HISTOGRAM)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self.ids = torch.from_numpy(file.read(["feature"])["feature"].to_numpy().copy()).long()
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.group: tuple[int, pa.Table] | None = None

    def features(self) -> Tensor:
        return self.ids

    def read(self, rows: slice) -> dict[str, Tensor]:
        import pyarrow as pa

        parts = []
        for i, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            low, high = max(rows.start, start), min(rows.stop, stop)
            if low < high:
                parts.append(self._group(i).slice(low - start, high - low))
        table = pa.concat_tables(parts)
        return {name: _tensor(table[name].combine_chunks(), name) for name in self.columns}

    def _group(self, i: int) -> pa.Table:
        if self.group is None or self.group[0] != i:
            with opened(self.path) as file:
                self.group = i, file.read_row_group(i, list(self.columns))
        return self.group[1]


def _tensor(lists: pa.Array, name: str) -> Tensor:
    """[n, k] from lists of k entries each, or padded ones."""
    import numpy as np

    offsets: np.ndarray = lists.offsets.to_numpy()
    sizes = np.diff(offsets)
    if not len(sizes) or (sizes != sizes[0]).any():
        return _padded(lists.to_pylist(), name)
    flat = lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.copy()).view(len(sizes), int(sizes[0])).to(_dtype(name))


def _padded(lists: Sequence[Sequence[float]], name: str) -> Tensor:
    fill = float("nan") if name.endswith("scores") else NO_TOKEN
    k = max(map(len, lists), default=0)
    return torch.tensor([[*row, *[fill] * (k - len(row))] for row in lists], dtype=_dtype(name)).view(len(lists), k)


def _dtype(name: str) -> torch.dtype:
    return torch.float64 if name.endswith("scores") else torch.int64
