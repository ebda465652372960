"""A Parquet result written in parts, so that a run killed at any moment goes on from its last whole part.

Every block of rows is a part file in ``<out>.parts``, written under another name and renamed when whole. `finish`
copies the parts into one file, a row group at a time (memory does not grow with the result; the disk holds it twice
until then), and only then removes them: killed there, too, nothing is lost and the next call begins the copy again. The
file's bytes depend on the run alone, not on how often it was interrupted.

``run.json`` beside the parts says what run they are of. Each part is sealed (`sealed_parquet`) and records in its
footer that run's digest and its own place, so that a part that is damaged, edited, swapped with another or of another
run is recognised before it is used; it is named in a warning and removed, and its block counts as missing. Several
processes may write parts of one result.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querylens_fast.runs import processes
from querylens_fast.runs.atomic_write import fsync_folder, output_file, remove_leftovers, whole
from querylens_fast.runs.run_record import DamagedFile, differences, digest_of, read_record, refuse_others, write_record
from querylens_fast.runs.sealed_parquet import (
    METADATA_KEY,
    CheckedFile,
    opened,
    problems,
    read_checked,
    read_identity,
    write_sealed,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["METADATA_KEY", "DamagedFile", "PartWriter", "read_identity", "verify"]

logger = logging.getLogger(__name__)
_PART_NAME = re.compile(r"part-(\d{9}|\d{12})\.parquet")
PART_KEY = b"querylens_fast.part"
_ONE_FOLDER = "all processes of a run have to write to the same folder; run the same call again to compute the others"


class PartWriter:
    """Takes tables of rows, each with the row it begins at, and makes one Parquet file of them.

    Args:
        path: The file. A symbolic link is followed. Its folder is made with the first part.
        identity: What the file is a result of, as JSON values; kept in the file (`read_identity`).
        parquet_options: Of pyarrow's ParquetWriter; zstd by default.
        row_group: Rows of a row group of the file.
        resume: Go on from what an earlier call wrote; False: refuse to touch it.

    Raises:
        FileExistsError: ``path`` or its parts belong to another run, or exist and resume is False.
        ValueError: ``path`` is a folder or a device; it was not written by this package; or it is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        identity: dict[str, Any],
        *,
        parquet_options: dict[str, Any] | None = None,
        row_group: int = 1 << 20,
        resume: bool = True,
    ) -> None:
        self.path, self._out = Path(path), output_file(path)
        self.identity = json.loads(json.dumps(identity))
        self._options = {"compression": "zstd", **(parquet_options or {})}
        self._row_group = row_group
        self._digest = digest_of(self.identity)
        self._begun, self._all_sealed = False, True
        self._checked: set[int] = set()
        self.parts = self._out.with_name(self._out.name + ".parts")
        self.complete = self._out.exists()
        if self.complete:
            try:
                refuse_others(self.path, read_identity(self._out), self.identity, resume)
            except DamagedFile as error:
                raise DamagedFile(f"{error}; delete it and run again") from error
            shutil.rmtree(self.parts, ignore_errors=True)  # a run killed after its last step left them
        elif starts := self._starts():
            refuse_others(self.parts, self._earlier(starts), self.identity, resume)

    def done(self, start: int) -> bool:
        """Is the part that begins at row ``start`` written? A part that is not what was written is removed."""
        if self.complete or start in self._checked:
            return True
        part = self._find(start)
        if part is None:
            return False
        try:
            self._check_mark(start, read_checked(part))
        except DamagedFile as error:
            logger.warning("%s; the part is computed again", error)
            part.unlink(missing_ok=True)
            return False
        self._checked.add(start)
        return True

    def write(self, start: int, table: pa.Table) -> None:
        """Write the part that begins at row ``start``, whole or not at all.

        Raises:
            OSError: The disk is full, or the folder that several processes share is gone; what was written stays.
        """
        self._begin()
        mark = {PART_KEY: json.dumps({"run": self._digest, "start": start}).encode()}
        with whole(self._part(start)) as partial:
            write_sealed(partial, [table], table.schema.with_metadata(mark), self._options, part=True)
        self._checked.add(start)

    def finish(self, n_rows: int | None = None, *, n_parts: int | None = None) -> Path:
        """Put the parts together, remove them, and return the path.

        Args:
            n_rows: The rows that there have to be, where the caller knows.
            n_parts: The parts that there have to be, likewise.

        Raises:
            OSError: The disk is full; the parts stay.
            ValueError: Rows or parts are missing, or a part was damaged since it was written; the same call computes
                them.
        """
        if self.complete:
            with opened(self._out, rewritten=True) as file:
                rows = file.metadata.num_rows
            if n_rows is not None and rows != n_rows:
                raise ValueError(f"{str(self.path)!r} holds {rows} rows of {n_rows}; delete it and run again")
            for problem in problems(self._out):
                raise DamagedFile(f"{problem}; delete it and run again")
        else:
            self._join(n_rows, n_parts)
            shutil.rmtree(self.parts)
        remove_leftovers(self._out)
        return self.path

    def _join(self, n_rows: int | None, n_parts: int | None) -> None:
        starts = self._starts()
        if not starts or n_parts not in (None, len(starts)):
            raise ValueError(f"{str(self.parts)!r} holds {len(starts)} parts of {n_parts or 'the run'}; {_ONE_FOLDER}")
        tables = self._tables(starts)
        first = next(tables)
        schema = first.schema.with_metadata({METADATA_KEY: json.dumps(self.identity).encode()})
        groups = _regrouped(chain([first], tables), self._row_group)
        joined = self.parts / self._out.name
        with whole(joined) as partial:
            rows = write_sealed(partial, groups, schema, self._options, self._row_group)
            if n_rows not in (None, rows):
                raise ValueError(f"{str(self.parts)!r} holds {rows} rows of {n_rows}; {_ONE_FOLDER}")
        joined.replace(self._out)
        fsync_folder(self._out.parent)

    def _tables(self, starts: dict[int, Path]) -> Iterator[pa.Table]:
        """The rows of each part; the next part is read and checked while one is decoded."""
        order = sorted(starts.items())
        with ThreadPoolExecutor(1, "parts") as pool:
            ahead = pool.submit(read_checked, order[0][1])
            for i, (start, part) in enumerate(order, 1):
                checked, ahead = ahead, pool.submit(read_checked, order[i][1]) if i < len(order) else ahead
                try:
                    found = checked.result()
                    self._check_mark(start, found)
                    yield found.table()
                except DamagedFile as error:
                    part.unlink(missing_ok=True)
                    raise DamagedFile(f"{error}; it was removed, run the same call again to compute it anew") from error

    def _check_mark(self, start: int, part: CheckedFile) -> None:
        """Raise DamagedFile unless a part says that it is the one of this run that begins at row ``start``."""
        mark = part.entries.get(PART_KEY)
        if mark is None and not self._all_sealed:
            return
        if mark is None or json.loads(mark) != {"run": self._digest, "start": start}:
            raise DamagedFile(f"{str(part.path)!r} is not the part that this run wrote there: it was replaced or moved")

    def _find(self, start: int) -> Path | None:
        """The part that begins at a row, under today's name or the shorter one that earlier relations have."""
        names = (self._part(start), self.parts / f"part-{start:09d}.parquet")
        return next((part for part in names if part.exists()), None)

    def _part(self, start: int) -> Path:
        return self.parts / f"part-{start:012d}.parquet"

    def _starts(self) -> dict[int, Path]:
        """The parts that are there, by the row they begin at."""
        named = ((_PART_NAME.fullmatch(part.name), part) for part in self.parts.glob("part-*.parquet"))
        return {int(name[1]): part for name, part in named if name}

    def _begin(self) -> None:
        """Say what the parts are of; not before there is one, so that a mistake leaves nothing behind."""
        if self._begun:
            return
        shared = processes.current().size > 1
        if shared and not self._out.parent.is_dir():  # rank 0 has made it: this process would write to another one
            missing = "the folder that the processes share is gone, or is not shared with this process"
            raise FileNotFoundError(errno.ENOENT, missing, str(self.path))
        self.parts.mkdir(parents=not shared, exist_ok=True)
        if self._all_sealed:
            write_record(self.parts / "run.json", self.identity)
        self._begun = True

    def _earlier(self, starts: dict[int, Path]) -> dict[str, Any]:
        """The identity of the run that wrote the parts which are there."""
        problem = None
        try:
            found, with_digest = read_record(self.parts / "run.json")
            if not differences(found, self.identity):
                self.identity, self._digest, self._all_sealed = found, digest_of(found), with_digest
                return found
        except DamagedFile as error:
            found, problem = {}, error
        if self._are_ours(starts.values()):
            logger.warning(
                "%s; the parts say that they are of this run", problem or f"{self.parts}/run.json was edited"
            )
            return self.identity
        if problem is None:
            return found
        raise DamagedFile(
            f"{problem}, so nothing says what run the parts there are of; delete {str(self.parts)!r} or choose another "
            "out"
        ) from problem

    def _are_ours(self, parts: Iterable[Path]) -> bool:
        """Do all parts that can be read say that they are of this run, and is there one?"""
        runs = set()
        for part in parts:
            with suppress(DamagedFile), opened(part) as file:
                runs.add(json.loads((file.metadata.metadata or {}).get(PART_KEY, b"{}")).get("run"))
        return runs == {self._digest}


def verify(path: str | Path) -> list[str]:
    """What is wrong with a Parquet result: nothing, or sentences that name it. Reads all of it, some 2 GB/s.

    Raises:
        FileNotFoundError: No such file.
    """
    try:
        read_identity(path)
    except ValueError as error:
        return [str(error)]
    return problems(path)


def _regrouped(tables: Iterable[pa.Table], row_group: int) -> Iterator[pa.Table]:
    """The rows of all tables in order, ``row_group`` at a time; the last table has what is left."""
    import pyarrow as pa

    waiting, n = [], 0
    for table in tables:
        waiting.append(table)
        n += table.num_rows
        while n >= row_group:
            rows = pa.concat_tables(waiting)
            yield rows.slice(0, row_group)
            waiting, n = [rows.slice(row_group)], n - row_group
    if n:
        yield pa.concat_tables(waiting)
