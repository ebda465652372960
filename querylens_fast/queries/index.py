"""The index of a result: rows of fixed width by feature, and for every token the rows whose signatures hold it.

One safetensors file beside the result, ``x.parquet.index`` (in the system's folder for temporary files where the
result's own cannot be written), made by `queries.build`. Answers read the few hundred bytes they need by `os.pread`:
memory does not grow with the result, and a file that is cut off under way is a short read, not a crash.

    rows            [n] records: top_ids [k] int32, top_scores [k], bottom_ids, bottom_scores, and where the result has
                    them top_se [k], histogram [bins] int32, layer energies [T] and layer top and bottom ids [T, kl];
                    sorted by layer, feature
    layers, features                      [n]
    column:NAME                           [n] a statistic
    choices                               [n] places in the metadata's list, where the result has them
    top_starts, bottom_starts             [V + 1] where a token's postings begin
    top_rows, top_scores, bottom_…        [n k] by token, then by score (the most extreme first), then by row
    text, text_starts, text_ids           the token strings that the result holds, one after another

The metadata names the result that it was made of: by the digest of its rows where there is one, else by its size and
time. An index of another result, version or length counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from querylens_fast.queries.files import ResultFile, ResultGone
from querylens_fast.queries.scan import Record

FORMAT = "querylens_fast.index/1"
ENDS = ("top", "bottom")
DTYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64, "U8": np.uint8}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


def index_paths(file: ResultFile) -> tuple[Path, Path]:
    """Where the index of a result may lie: beside it, or in the user's own folder for temporary files."""
    absolute = file.path.resolve()
    digest = hashlib.sha256(str(absolute).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    aside = Path(tempfile.gettempdir()) / f"querylens-index-{user}" / f"{digest}.index"
    return absolute.with_name(absolute.name + ".index"), aside


def source_of(file: ResultFile) -> dict[str, Any]:
    """What an index records of its result."""
    return {"size": file.stamp.size, "modified_ns": file.stamp.modified_ns, "seal": file.seal}


def find_index(file: ResultFile, layer: int | None = None) -> Index | None:
    """The index of a finished result, or None where there is none of this very result."""
    if not file.finished or not hasattr(os, "pread"):  # Windows has none
        return None
    for path in index_paths(file):
        if path == index_paths(file)[1] and not is_own(path.parent):
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = Index(path, layer)
            known, now = found.said["source"], source_of(file)
            same = known["seal"] == now["seal"] if now["seal"] else known == now
            if same:
                return found
    return None


def is_own(folder: Path) -> bool:
    """Is the folder this user's, and closed to others?"""
    try:
        found = os.stat(folder)
    except OSError:
        return False
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def record_dtype(k: int, scores: str, *, errors: bool, terms: tuple[int, int] | None, bins: int = 0) -> np.dtype:
    """A row: ids and scores of both ends, standard errors, histogram, layer terms (T layers, kl tokens)."""
    fields: list[Any] = []
    for end in ("top", "bottom"):
        fields += [(f"{end}_ids", "<i4", (k,)), (f"{end}_scores", scores, (k,))]
    if errors:
        fields.append(("top_se", scores, (k,)))
    if bins:
        fields.append(("histogram", "<i4", (bins,)))
    if terms is not None:
        fields += [("layer_energy", "<f4", (terms[0],)), *((f"layer_{e}_ids", "<i4", terms) for e in ("top", "bottom"))]
    return np.dtype(fields)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in an index that is being made."""

    header: bytes
    arrays: dict[str, tuple[int, np.dtype, tuple[int, ...]]]
    """Each array's first byte, dtype and shape."""
    record: np.dtype
    choices: list[str]
    size: int


def layout_of(arrays: dict[str, tuple[np.dtype, tuple[int, ...]]], record: np.dtype, said: dict[str, Any]) -> Layout:
    """Arrays one after another, as safetensors has them."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "index": json.dumps(said)}}
    places, at = {}, 0
    for name, (dtype, shape) in arrays.items():
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        places[name] = at, dtype, shape
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text) + 8
    placed = {name: (begin + start, dtype, shape) for name, (start, dtype, shape) in places.items()}
    return Layout(len(text).to_bytes(8, "little") + text, placed, record, said["choices"], begin + at)


class Index:
    """One layer's rows of a result, read from its index."""

    indexed = True

    def __init__(self, path: Path, layer: int | None = None) -> None:
        """Open an index, of a result of several layers that of one.

        Raises:
            OSError: There is none.
            ValueError: It is no whole index of this version.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if not 2 <= length <= size:
            raise ValueError(f"{str(path)!r} is no index")
        self.header: dict[str, Any] = json.loads(os.pread(self._fd, length, 8))
        said = self.header.pop("__metadata__")
        self._start = 8 + length
        if said["format"] != FORMAT or size != self._start + max(s["data_offsets"][1] for s in self.header.values()):
            raise ValueError(f"{str(path)!r} is an index of another version, or cut off")
        self.said: dict[str, Any] = json.loads(said["index"])
        self._record = record_dtype(**{**self.said["record"], "terms": _pair(self.said["record"]["terms"])})
        self._starts = {end: self._array(f"{end}_starts") for end in ("top", "bottom")}
        first, stop = 0, self.header["features"]["shape"][0]
        if layer is not None:
            first, stop = np.searchsorted(self._array("layers"), [layer, layer + 1]).tolist()
        self.first, self.n = first, stop - first
        self.features = self._array("features", first, stop).astype(np.int64)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._fd)

    def __len__(self) -> int:
        return self.n

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the numbers that each row has."""
        return tuple(name.removeprefix("column:") for name in self.header if name.startswith("column:"))

    def has(self, column: str) -> bool:
        """Is the column in the result?"""
        return column in self.said["columns"]

    def record(self, row: int) -> Record:
        """The row's signature."""
        start = self._offset("rows") + (self.first + row) * self._record.itemsize
        found = np.frombuffer(self._read(start, self._record.itemsize), self._record)[0]
        terms = None
        if self.said["record"]["terms"] is not None:
            terms = (
                np.array(self.said["layers"]),
                found["layer_energy"],
                found["layer_top_ids"],
                found["layer_bottom_ids"],
            )
        choice = None
        if "choices" in self.header:
            choice = self.said["choices"][int(self._value("choices", row))]
        names = ("top_ids", "top_scores", "bottom_ids", "bottom_scores", "top_se", "histogram")
        there = self._record.names or ()
        return Record(*(found[name] if name in there else None for name in names), choice, terms)  # type: ignore

    def ids(self, row: int, end: str) -> list[int]:
        """The tokens of one end of the row's signature."""
        start, size, step = self._ids_at[end]
        return np.frombuffer(self._read(start + row * step, size), np.int32).tolist()

    def value(self, name: str, row: int) -> float:
        """A statistic of one row."""
        return float(self._value(f"column:{name}", row))

    def column(self, name: str) -> np.ndarray:
        """A statistic of every row, [n]."""
        return self._array(f"column:{name}", self.first, self.first + self.n)

    def postings(
        self, token_id: int, end: str, check: Callable[[], None] = lambda: None, limit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(Rows whose ``end`` holds the token, its scores), the most extreme score first, or the first ones of them."""
        starts = self._starts[end]
        if not 0 <= token_id < len(starts) - 1:
            return np.zeros(0, np.int64), np.zeros(0)
        first, stop = int(starts[token_id]), int(starts[token_id + 1])
        several_layers = self.n != self.header["features"]["shape"][0]
        if limit is not None and not several_layers:
            stop = min(stop, first + limit)
        rows, scores = (self._array(f"{end}_{what}", first, stop) for what in ("rows", "scores"))
        if several_layers:
            own = (rows >= self.first) & (rows < self.first + self.n)
            rows, scores = rows[own] - self.first, scores[own]
        return rows, scores

    def strings(self) -> dict[int, str]:
        """Every token that the result holds the string of, by id."""
        if "text" not in self.header:
            return {}
        text, starts, ids = (self._array(name) for name in ("text", "text_starts", "text_ids"))
        data, ends = text.tobytes(), starts.tolist()
        parts = (data[a:b].decode() for a, b in zip(ends, ends[1:], strict=False))
        return dict(zip(ids.tolist(), parts, strict=True))

    @cached_property
    def _ids_at(self) -> dict[str, tuple[int, int, int]]:
        """(First byte, bytes, bytes from row to row) of each end's tokens."""
        step, fields = self._record.itemsize, self._record.fields or {}
        rows = self._offset("rows") + self.first * step
        return {end: (rows + at, dtype.itemsize, step) for end in ENDS for dtype, at, *_ in [fields[f"{end}_ids"]]}

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, np.dtype]]:
        return {
            name: (self._start + said["data_offsets"][0], np.dtype(DTYPES[said["dtype"]]))
            for name, said in self.header.items()
        }

    def _offset(self, name: str) -> int:
        return self._offsets[name][0]

    def _value(self, name: str, row: int) -> Any:
        start, dtype = self._offsets[name]
        return np.frombuffer(self._read(start + (self.first + row) * dtype.itemsize, dtype.itemsize), dtype)[0]

    def _array(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        start, dtype = self._offsets[name]
        stop = self.header[name]["shape"][0] if stop is None else stop
        return np.frombuffer(self._read(start + first * dtype.itemsize, (stop - first) * dtype.itemsize), dtype)  # type: ignore

    def _read(self, start: int, n: int) -> bytes:
        data = os.pread(self._fd, n, start)
        if len(data) != n:
            raise ResultGone(f"{str(self.path)!r} was cut off since it was opened")
        return data


def _pair(values: Any) -> tuple[int, int] | None:
    return None if values is None else (int(values[0]), int(values[1]))
