"""Making the index of a result (`queries.index`), in memory that does not grow with it.

Three passes: count how often each token occurs (here); write the rows, and each row group's postings sorted by token;
merge these, a range of tokens at a time (`queries.build_passes`). The pieces lie in ``<index>.parts`` with a note of
how far they are, so a build that was killed goes on from there; the index appears under its name when it is whole.

Disk for a million features with k = 25: 400 bytes a feature for its row and 400 for its postings, and 600 while it is
made.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from querylens_fast.queries.build_passes import Check, Passes, pieces
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
            passes = Passes(layout, counted.starts, counted.row_of, parts, _begin(parts, layout), check)
            for name, array in values.items():
                passes.view(name)[:] = array
            passes.write(parquet)
        passes.merge()
        passes.close()
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


def _groups(parquet: pq.ParquetFile, columns: Sequence[str], check: Check) -> Iterator[pa.Table]:
    for i in range(parquet.num_row_groups):
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
        whole = all((parts / name).stat().st_size == size for name, size in pieces(layout).items())
        if found["header"] == known["header"] and whole:
            return found
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    sizes = {"index": layout.size, **pieces(layout)}
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the lock's file goes, too
    waiting = deque(map(Path, paths))
    while waiting:
        path = waiting.popleft()
        try:
            build_index(open_file(path), check)
        except FileExistsError:  # another server makes it; should that end before it is done, this one goes on
            waiting.append(path)
            check()
            time.sleep(1.0)
        except (ValueError, OSError) as error:
            logger.warning("no index of %s: %s", path, error)
