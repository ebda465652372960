"""Signatures as JSON lines, in the reference's row format and with a checksum at the end of each line.

Rows are appended a block at a time; each of several processes appends to a file of its own in ``<out>.parts``, and the
first puts them together. A run goes on from the rows that are there: a half-written last line is cut off, a row that is
damaged, edited, of another run, or there twice is named in a warning, its block is computed again and the row written.
The finished file holds every row once, in the order of feature_index, and has the bytes of an unbroken run. Beside it
lies the identity of its run, ``<out>.run.json``.

The checksum is the last key of a line, ``"crc32"``: of the line's bytes before it, begun with the run's digest. Rows of
versions before there were checksums have none and are taken as they are.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querylens_fast.runs import processes as ranks
from querylens_fast.runs.atomic_write import output_file, remove_leftovers, whole
from querylens_fast.runs.run_record import DamagedFile, digest_of, read_record, refuse_others, write_record

if TYPE_CHECKING:
    from querylens_fast.lens.results import Signatures
    from querylens_fast.models.model import Model

MAX_WARNINGS = 5
"""Damaged rows named in each file."""
logger = logging.getLogger(__name__)
_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\n\Z')


_REMEDY = "restore it, delete both, or choose another out"


class JsonlSink:
    """One JSON object a line; resumes by feature_index."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, token_strings: bool, model: Model) -> None:
        self.path, self._out = path, output_file(path)
        self.identity = json.loads(json.dumps(identity))
        self._parts = self._out.with_name(self._out.name + ".parts")
        self._seed: int | None = _seed(self.identity)
        self._done: set[int] = set()
        self._in_order = True
        group = ranks.current()
        self._mine = self._out if group.size == 1 else self._parts / f"rank{group.rank:04d}.jsonl"
        self._mine.parent.mkdir(parents=True, exist_ok=True)
        self._open(resume)

    def pending(self, block: slice) -> Sequence[int]:
        # Whole blocks: sums over other rows may round differently, and the bytes are to be an unbroken run's.
        indices = range(block.start, block.stop)
        return range(0) if all(i in self._done for i in indices) else indices

    def write(self, found: Signatures, indices: Sequence[int], names: Sequence[str] | None = None) -> None:
        names = names or [found.source.feature_name(f) for f in found.features.tolist()]
        lines = {
            index: _line({"feature_index": index, "feature_str": name, **row}, self._seed)
            for index, name, row in zip(indices, names, found.rows(), strict=True)
            if index not in self._done
        }
        with open(self._mine, "ab") as file:
            file.write(b"".join(lines.values()))
            file.flush()
            os.fsync(file.fileno())
        self._in_order &= list(lines) == list(range(len(self._done), len(self._done) + len(lines)))
        self._done.update(lines)

    def finish(self, n_features: int) -> None:
        """Put rows into one file and in order, where they are not.

        Raises:
            ValueError: Rows are missing; the same call computes them.
        """
        places: dict[int, tuple[Path, int, int]] = {}
        if self._parts.is_dir() or not self._in_order:
            self._find_rows(places)
        missing = [i for i in range(n_features) if i not in self._done]
        if missing or len(self._done) != n_features:
            raise ValueError(
                f"{str(self.path)!r} holds {len(self._done)} rows of {n_features} (missing: {missing[:5]}); all "
                "processes of a run have to write to the same folder; run the same call again to compute the others"
            )
        if places:
            self._rewrite(places)
        shutil.rmtree(self._parts, ignore_errors=True)
        remove_leftovers(self._out)
        remove_leftovers(identity_path(self._out))

    def _open(self, resume: bool) -> None:
        there = self._out.exists() and self._out.stat().st_size > 0 or any(self._parts.glob("rank*.jsonl"))
        record = identity_path(self._out)
        if not there:
            write_record(record, self.identity)
            return
        if not record.is_file():
            raise FileExistsError(
                f"{str(self.path)!r} has no .run.json beside it that says what it is a result of, so it is left alone; "
                "choose another out"
            )
        try:
            earlier, with_digest = read_record(record)
            refuse_others(self.path, earlier, self.identity, resume)
            self.identity, self._seed = earlier, _seed(earlier) if with_digest else None
        except DamagedFile as error:
            if not any(_is_whole(line, self._seed) for path in self._files() for line in _lines(path)):
                raise DamagedFile(f"{error}, so nothing says what run {str(self.path)!r} is of; {_REMEDY}") from error
            logger.warning("%s; the rows say that they are of this run", error)
            write_record(record, self.identity)
        self._find_rows()

    def _files(self) -> list[Path]:
        return [path for path in (self._out, *sorted(self._parts.glob("rank*.jsonl"))) if path.exists()]

    def _find_rows(self, places: dict[int, tuple[Path, int, int]] | None = None) -> None:
        """Look for whole rows in all files; ``places`` gets (file, offset, length) of each. Half-written ends go."""
        self._done, self._in_order = set(), True
        for path in self._files():
            place = spoiled = 0
            for number, line in enumerate(_lines(path), 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    index = _checked(line, self._seed)["feature_index"]
                    if index in self._done:
                        raise ValueError(f"the row of feature_index {index} is there twice")
                    self._in_order &= index == len(self._done)
                    self._done.add(index)
                    if places is not None:
                        places[index] = path, place, len(line)
                except ValueError as error:
                    self._in_order, spoiled = False, spoiled + 1
                    if places is None and spoiled <= MAX_WARNINGS:
                        logger.warning("%r line %d: %s; the row is computed again", str(path), number, error)
                place += len(line)
            with open(path, "r+b") as file:
                file.truncate(place)

    def _rewrite(self, places: dict[int, tuple[Path, int, int]]) -> None:
        """Write every row once, in order."""
        with whole(self._out) as partial, ExitStack() as stack:
            out = stack.enter_context(open(partial, "wb"))
            files = {path: stack.enter_context(open(path, "rb")) for path in self._files()}
            for _, (path, place, size) in sorted(places.items()):
                files[path].seek(place)
                out.write(files[path].read(size))


def identity_path(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def read_jsonl_identity(path: Path) -> dict[str, Any]:
    """What a JSONL result is a result of; raises ValueError where nothing beside it says so, or that is damaged."""
    return _read_record(path)[0]


def read_jsonl(path: str | Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a result file, in the reference's format, without their checksums.

    Args:
        path: The file.
        columns: Keys that every row has to have; those of ids and scores have to hold lists.

    Raises:
        ValueError: A row is damaged, edited, there twice or not in its place, or one is missing before another; the
            line is named. Without the run's record beside it, no more is checked than that lines are rows.
    """
    rows = list(_result_rows(Path(path)))
    for number, row in enumerate(rows, 1):
        for name in columns:
            if name not in row or name.endswith(("_ids", "_scores")) and not isinstance(row[name], list):
                raise ValueError(f"{str(path)!r} line {number} is no row of signatures: {name} is missing or no list")
    return rows


def has_checksums(path: Path) -> bool:
    """Were the result's rows written with checksums?"""
    return _read_record(path)[1]


def jsonl_problems(path: Path) -> list[str]:
    """What is wrong with a JSONL result: nothing, or the first thing, or that rows are missing at its end."""
    try:
        expected = read_jsonl_identity(path).get("n_features")
        n = sum(1 for _ in _result_rows(path))
    except ValueError as error:
        return [str(error)]
    if expected not in (None, n):
        return [f"{str(path)!r} holds {n} rows of {expected}; run the same call again to compute the others"]
    return []


def _result_rows(path: Path) -> Iterator[dict[str, Any]]:
    seed, checked = None, False
    if _record_of(path).is_file():
        identity, checked = _read_record(path)
        seed = _seed(identity) if checked else None
    seen: set[int] = set()
    for number, line in enumerate(_lines(path), 1):
        try:
            row = _checked(line, seed)
            index = row["feature_index"]
            if index in seen:
                raise ValueError(f"the row of feature_index {index} is there twice")
            if checked and index != len(seen):
                raise ValueError(f"it is the row of feature_index {index}; expected {len(seen)}")
        except ValueError as error:
            raise DamagedFile(
                f"{str(path)!r} line {number}: {error}; run the same call again to compute what is missing"
            ) from error
        seen.add(index)
        row.pop("crc32", None)
        yield row


def _read_record(path: Path) -> tuple[dict[str, Any], bool]:
    record = _record_of(path)
    if not record.is_file():
        raise ValueError(f"{str(path)!r} has no .run.json beside it that says what it is a result of")
    try:
        return read_record(record)
    except DamagedFile as error:
        raise DamagedFile(f"{error}; {_REMEDY}") from error


def _record_of(path: Path) -> Path:
    """The record beside a file, or beside what a link to it points to."""
    record = identity_path(path)
    return record if record.is_file() else identity_path(output_file(path))


def _seed(identity: dict[str, Any]) -> int:
    return zlib.crc32(digest_of(identity).encode())


def _line(row: dict[str, Any], seed: int | None) -> bytes:
    text = json.dumps(row, ensure_ascii=False).encode()
    if seed is None:
        return text + b"\n"
    return text[:-1] + f', "crc32": "{zlib.crc32(text[:-1], seed):08x}"}}\n'.encode()


def _checked(line: bytes, seed: int | None) -> dict[str, Any]:
    """The row in a line; raises ValueError where it is none, or not what was written (no ``seed``: not checked)."""
    found = _CHECKSUM.search(line)
    if seed is not None and (found is None or int(found[1], 16) != zlib.crc32(line[: found.start()], seed)):
        raise ValueError("it is damaged, was edited, or is of another run: its checksum is not that of its bytes")
    try:
        row = json.loads(line)
        if type(row["feature_index"]) is int:
            return row
        raise TypeError("feature_index is no number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no result row ({error})") from error


def _is_whole(line: bytes, seed: int | None) -> bool:
    try:
        return bool(_checked(line, seed))
    except ValueError:
        return False


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file
