"""Making the index of a result (`queries.index`), in memory that does not grow with it.
Three passes: count how often each token occurs; write every row and put its tokens at their places; sort each token's
postings by score, a range of tokens at a time. The pieces lie in ``<index>.parts`` with a note of how far they are, so
a build that was killed goes on from there; the index appears under its name when it is whole.

Disk for a million features with k = 25: 400 bytes a feature for its row and 400 for its postings.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from querylens_fast.queries.files import ResultFile, open_file, reading
from querylens_fast.queries.index import (
    ENDS,
    Layout,
    find_index,
    index_paths,
    is_own,
    layout_of,
    record_dtype,
    source_of,
)
from querylens_fast.queries.scan import flat, statistics_of, strings_of
from querylens_fast.runs.atomic_write import fsync_folder, write_whole
from querylens_fast.runs.run_lock import held
from querylens_fast.runs.sealed_parquet import opened

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)
SORTED_AT_ONCE = 1 << 21
"""Postings sorted at a time."""
SECONDS_A_NOTE = 3.0
"""Between notes of how far the build is; each puts what is written on the disk."""
Check = Callable[[], None]


def build_index(file: ResultFile, check: Check = lambda: None) -> Path:
    """Make the index of a finished result of `signatures` where there is none of it; return its path.

    Args:
        file: The result.
        check: Called between steps; what it raises ends the build, which goes on from there when it is called again.

    Raises:
        ValueError: Signatures of different lengths, or the result is damaged.
        OSError: Neither the result's folder nor that for temporary files can be written, or the disk is full.
        FileExistsError: Another process is making it.
    """
    path = _writable(file)
    with held(path):
        if (there := find_index(file)) is not None:
            return there.path
        parts = path.with_name(path.name + ".parts")
        with reading(file.path), opened(file.path, read_dictionary=_encoded(file)) as parquet:
            counted = _count(file, parquet, check)
            layout, values = _plan(file, parquet, counted)
            build = _Build(counted, layout, parts, _begin(parts, layout), check)
            for name, array in values.items():
                build.view(name)[:] = array
            build.scatter(parquet)
        build.sort()
        build.close()
        with open(parts / "index", "rb") as done:
            os.fsync(done.fileno())
        os.replace(parts / "index", path)
        fsync_folder(path.parent)
        shutil.rmtree(parts, ignore_errors=True)
    return path


@dataclass
class Counted:
    """What has to be known before anything is written."""

    n: int
    k: int
    starts: dict[str, np.ndarray]
    """Where each token's postings begin, by end, [V + 1]."""
    row_of: np.ndarray | None
    """The row of each place in the file; None where the file is sorted by layer and feature."""
    layers: np.ndarray
    features: np.ndarray


def _encoded(file: ResultFile) -> list[str] | None:
    """Columns of strings that are read as codes."""
    return [f"{end}_tokens.list.element" for end in ENDS] if file.identity.get("token_strings") is not False else None


def _writable(file: ResultFile) -> Path:
    beside, aside = index_paths(file)
    if os.access(beside.parent, os.W_OK):
        return beside
    aside.parent.mkdir(mode=0o700, exist_ok=True)
    if not is_own(aside.parent):
        raise PermissionError(f"{str(aside.parent)!r} is another user's, or open to others: remove it")
    return aside


def _groups(parquet: pq.ParquetFile, columns: Sequence[str], check: Check, first: int = 0) -> Iterator[pa.Table]:
    for i in range(first, parquet.num_row_groups):
        check()
        yield parquet.read_row_group(i, list(columns))


def _count(file: ResultFile, parquet: pq.ParquetFile, check: Check) -> Counted:
    """Pass 1: ids alone."""
    counts = {end: np.zeros(0, np.int64) for end in ENDS}
    sizes: set[int] = set()
    features, layers = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for table in _groups(parquet, ["feature", "layer", "top_ids", "bottom_ids"], check):
        for end in ENDS:
            lists = table[f"{end}_ids"].combine_chunks()
            sizes.update(np.unique(np.diff(lists.offsets.to_numpy())).tolist())
            counts[end] = _added(counts[end], np.bincount(flat(lists)))
        features.append(table["feature"].to_numpy())
        layers.append(table["layer"].to_numpy())
    if len(sizes) > 1:
        raise ValueError(f"{str(file.path)!r} holds signatures of {sorted(sizes)} tokens; expected one length")
    ids, of_layer = np.concatenate(features), np.concatenate(layers)
    order, row_of = np.lexsort((ids, of_layer)), None
    if not np.array_equal(order, np.arange(len(order))):
        row_of = np.empty(len(order), np.int64)
        row_of[order] = np.arange(len(order))
    width = max(map(len, counts.values()))
    starts = {end: np.cumsum([0, *_added(found, np.zeros(width, np.int64))]) for end, found in counts.items()}
    return Counted(len(ids), max(sizes, default=0), starts, row_of, of_layer[order], ids[order])


def _plan(file: ResultFile, parquet: pq.ParquetFile, counted: Counted) -> tuple[Layout, dict[str, np.ndarray]]:
    """Where everything goes, and the arrays that are known already."""
    import pyarrow as pa

    schema = parquet.schema_arrow
    scores = np.dtype(schema.field("top_scores").type.value_type.to_pandas_dtype())
    layers, terms = [], None
    if "layer_indices" in schema.names and counted.n:
        first = parquet.read_row_group(0, ["layer_indices", "layer_top_ids"]).slice(0, 1).to_pylist()[0]
        layers = first["layer_indices"]
        terms = len(layers), len(first["layer_top_ids"][0]) if layers else 0
    bins = 0
    if "histogram" in schema.names and counted.n:
        bins = len(parquet.read_row_group(0, ["histogram"])["histogram"][0])
    choices = _choices(parquet) if "transition" in schema.names else []
    record = {"k": counted.k, "scores": scores.str, "errors": "top_se" in schema.names, "terms": terms, "bins": bins}
    values = {"layers": counted.layers.astype(np.int32), "features": counted.features, **_text(parquet)}
    values |= {f"{end}_starts": counted.starts[end] for end in ENDS}
    arrays = {name: (array.dtype, array.shape) for name, array in values.items()}
    arrays["rows"] = np.dtype(np.uint8), (counted.n, record_dtype(**record).itemsize)
    for name in statistics_of(schema.names):
        narrow = schema.field(name).type == pa.float32()
        arrays[f"column:{name}"] = np.dtype(np.float32 if narrow else np.float64), (counted.n,)
    if choices:
        arrays["choices"] = np.dtype(np.uint8), (counted.n,)
    for end in ENDS:
        arrays[f"{end}_rows"] = np.dtype(np.int32), (counted.n * counted.k,)
        arrays[f"{end}_scores"] = scores, (counted.n * counted.k,)
    said = {"source": source_of(file), "columns": schema.names, "record": record, "layers": layers, "choices": choices}
    return layout_of(arrays, record_dtype(**record), said), values


def _begin(parts: Path, layout: Layout) -> dict[str, Any]:
    """The note of an earlier build of the same index, or of a new one whose file has been laid out."""
    note, known = parts / "note.json", {"header": layout.header.hex(), "group": 0, "top": 0, "bottom": 0}
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(note.read_text(encoding="utf-8"))
        pieces = all((parts / name).stat().st_size == size for name, size in _pieces(layout).items())
        if found["header"] == known["header"] and pieces:
            return found
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    sizes = {"index": layout.size, **_pieces(layout)}
    try:
        for name, size in sizes.items():
            with open(parts / name, "wb") as file:
                if size and hasattr(os, "posix_fallocate"):  # macOS has none
                    # Taken now: a mapped file that finds the disk full later ends the process with SIGBUS.
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
                if name == "index":
                    file.write(layout.header)
        write_whole(note, json.dumps(known))
    except OSError as error:
        shutil.rmtree(parts, ignore_errors=True)
        said = f"no room for an index of {sum(sizes.values()) / 2**20:.0f} MiB while it is made: {error.strerror}"
        raise OSError(error.errno, said, str(parts)) from error
    return known


class _Build:
    """Passes 2 and 3, which go on where the note says."""

    def __init__(self, counted: Counted, layout: Layout, parts: Path, note: dict[str, Any], check: Check) -> None:
        self.counted, self.layout, self.parts, self.note, self.check = counted, layout, parts, note, check
        self.whole = np.memmap(parts / "index", np.uint8, "r+")
        self.next_note = time.monotonic() + SECONDS_A_NOTE
        self.loose = {end: (self._piece(f"{end}_rows"), self._piece(f"{end}_scores")) for end in ENDS}

    def view(self, name: str) -> np.ndarray:
        """An array of the index."""
        start, dtype, shape = self.layout.arrays[name]
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return self.whole[start : start + size].view(dtype).reshape(shape)

    def scatter(self, parquet: pq.ParquetFile) -> None:
        """Pass 2: write the rows, and put their tokens at their places, in the order of the rows."""
        cursors = {end: self.counted.starts[end][:-1].copy() for end in ENDS}
        start = 0
        for i in range(parquet.num_row_groups):
            self.check()
            done = i < self.note["group"]
            table = parquet.read_row_group(i, ["top_ids", "bottom_ids"] if done else None)
            places = np.arange(start, start + table.num_rows)
            rows = places if self.counted.row_of is None else self.counted.row_of[places]
            if not done:
                self._write_rows(table, rows)
            for end in ENDS:
                tokens = flat(table[f"{end}_ids"].combine_chunks())
                if not done:
                    scores = flat(table[f"{end}_scores"].combine_chunks())
                    self._put(end, tokens, np.repeat(rows, self.counted.k), scores, cursors[end])
                cursors[end] += np.bincount(tokens, minlength=len(cursors[end]))
            start += table.num_rows
            if not done:
                self._done("group", i + 1)

    def sort(self) -> None:
        """Pass 3: each token's postings by score, then by row, into their places in the index."""
        for end in ENDS:
            starts = self.counted.starts[end]
            out = self.view(f"{end}_rows"), self.view(f"{end}_scores")
            first = self.note[end]
            while first < len(starts) - 1:
                self.check()
                last = max(first + 1, int(np.searchsorted(starts, starts[first] + SORTED_AT_ONCE, side="right")) - 1)
                here = slice(int(starts[first]), int(starts[last]))
                rows, scores = (np.array(piece[here]) for piece in self.loose[end])
                tokens = np.repeat(np.arange(last - first), np.diff(starts[first : last + 1]))
                order = _posting_order(tokens, rows, scores, end)
                out[0][here], out[1][here] = rows[order], scores[order]
                self._done(end, last)
                first = last

    def close(self) -> None:
        """Put the index on the disk."""
        self.whole.flush()

    def _piece(self, name: str) -> np.ndarray:
        """A file of unsorted postings."""
        _, dtype, shape = self.layout.arrays[name]
        return np.memmap(self.parts / name, dtype, "r+") if shape[0] else np.zeros(0, dtype)

    def _write_rows(self, table: pa.Table, rows: np.ndarray) -> None:
        dtype, names = self.layout.record, table.column_names
        records = np.zeros(table.num_rows, dtype)
        for name in dtype.names or ():
            column = table["layer_energy_scores" if name == "layer_energy" else name].combine_chunks()
            while not hasattr(column, "to_numpy") or str(column.type).startswith("list"):
                column = column.flatten()
            records[name] = column.to_numpy(zero_copy_only=False).reshape(records[name].shape)
        self.view("rows")[rows] = records.view(np.uint8).reshape(len(rows), dtype.itemsize)
        for name in statistics_of(names):
            self.view(f"column:{name}")[rows] = table[name].to_numpy()
        if "transition" in names:
            codes = {text: i for i, text in enumerate(self.layout.choices)}
            self.view("choices")[rows] = [codes[text] for text in table["transition"].to_pylist()]

    def _put(self, end: str, tokens: np.ndarray, rows: np.ndarray, scores: np.ndarray, cursors: np.ndarray) -> None:
        """Put postings behind those that their tokens have already."""
        order = np.argsort(tokens, kind="stable")
        ordered = tokens[order]
        run = np.flatnonzero(np.diff(ordered, prepend=-1))
        within = np.arange(len(ordered)) - np.repeat(run, np.diff(run, append=len(ordered)))
        at = cursors[ordered] + within
        self.loose[end][0][at], self.loose[end][1][at] = rows[order], scores[order]

    def _done(self, what: str, upto: int) -> None:
        self.note[what] = upto
        if time.monotonic() < self.next_note:
            return
        for array in (self.whole, *(piece for pieces in self.loose.values() for piece in pieces)):
            if isinstance(array, np.memmap):
                array.flush()
        write_whole(self.parts / "note.json", json.dumps(self.note))
        self.next_note = time.monotonic() + SECONDS_A_NOTE


def _pieces(layout: Layout) -> dict[str, int]:
    """The files of unsorted postings, and their sizes."""
    arrays = {name: layout.arrays[name] for end in ENDS for name in (f"{end}_rows", f"{end}_scores")}
    return {name: dtype.itemsize * shape[0] for name, (_, dtype, shape) in arrays.items()}


def _posting_order(tokens: np.ndarray, rows: np.ndarray, scores: np.ndarray, end: str) -> np.ndarray:
    """The order by token, then score (top: the largest first), then row, of postings that are sorted by token."""
    if scores.dtype == np.float32 and (np.diff(rows)[np.diff(tokens) == 0] >= 0).all():
        # One stable sort of integers: the token, then the bits of the score in an order that is that of the numbers.
        bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 and 0.0 are equal scores
        ascending = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
        keys = tokens.astype(np.uint64) << np.uint64(32) | (~ascending if end == "top" else ascending)
        return np.argsort(keys, kind="stable")
    return np.lexsort((rows, -scores if end == "top" else scores, tokens))


def _added(some: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The sum of two arrays, the shorter one filled up with zeros."""
    n = max(len(some), len(more))
    return np.pad(some, (0, n - len(some))) + np.pad(more, (0, n - len(more)))


def _choices(parquet: pq.ParquetFile) -> list[str]:
    column = parquet.read(["transition"])["transition"]
    return sorted(column.unique().to_pylist())


def _text(parquet: pq.ParquetFile) -> dict[str, np.ndarray]:
    """The token strings, one after another, where each begins, and whose they are."""
    if "top_tokens" not in parquet.schema_arrow.names:
        return {}
    found = strings_of(parquet)
    ids = sorted(found)
    encoded = [found[i].encode("utf-8", "replace") for i in ids]
    return {
        "text": np.frombuffer(b"".join(encoded), np.uint8),
        "text_starts": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "text_ids": np.array(ids, np.int32),
    }


def main(paths: Sequence[str]) -> None:
    """Make the indexes of results, one after another, at low priority; stop when the process that started this ends."""
    parent = os.getppid()

    def check() -> None:
        if os.getppid() != parent:
            raise SystemExit

    if hasattr(os, "nice"):
        os.nice(10)
    for path in paths:
        try:
            build_index(open_file(Path(path)), check)
        except (ValueError, OSError) as error:
            logger.warning("no index of %s: %s", path, error)
