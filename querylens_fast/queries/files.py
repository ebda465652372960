"""Result files: which of the given paths are served, what each is a result of, and whether it has changed since.

A path is a Parquet file, a run that is being written (``x.parquet``, of which there is only ``x.parquet.parts`` yet),
or a folder of these, looked through with its subfolders. Nothing else is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from querylens_fast.lens.storage import refuse_other_columns
from querylens_fast.queries.inventory import Skipped
from querylens_fast.runs.run_record import DamagedFile, read_record
from querylens_fast.runs.sealed_parquet import SEAL_KEY, opened, read_identity

PARTS = ".parts"
SIGNATURES, SAMPLE, SCORES = "signatures", "feature sample", "scores"
RELATIONS = ("neighbours", "feature flow", "downstream", "upstream")
MAX_ROWS = 1 << 21
"""Rows of a table of scores or relations, which are held in memory, at most."""
MAX_FILES = 10_000
"""Files of a folder, at most."""


class ResultGone(ValueError):
    """A result was deleted, truncated or replaced after it was opened."""


@dataclass(frozen=True)
class Stamp:
    """What tells a file from one that took its place, and the parts of a run from those of a moment later."""

    size: int
    modified_ns: int
    changed_ns: int
    """What cannot be set back."""
    inode: int
    finished: bool

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Of a result, or of the folder of its parts where there is no more yet."""
        try:
            found, finished = os.stat(path), True
        except FileNotFoundError:
            found, finished = os.stat(_parts_of(path)), False
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, finished)


@dataclass(frozen=True)
class ResultFile:
    """A file that is served, or the parts of one that is being written."""

    path: Path
    kind: str
    """`SIGNATURES`, `SAMPLE`, `SCORES`, or one of `RELATIONS`."""
    identity: dict[str, Any]
    stamp: Stamp
    seal: str | None = None
    """The digest of its rows, where it was written with one."""
    n_rows: int = 0
    """Of a finished file."""

    @property
    def finished(self) -> bool:
        """Or is there no more yet than parts?"""
        return self.stamp.finished

    @property
    def parts(self) -> list[Path]:
        """The Parquet files that hold its rows so far."""
        if self.finished:
            return [self.path]
        return sorted(_parts_of(self.path).glob("part-*.parquet"))

    def changed(self) -> bool:
        """Is the file another one by now, or gone, or has it more parts, or is it finished?"""
        try:
            return Stamp.of(self.path) != self.stamp
        except OSError:
            return True


def find_files(
    paths: Sequence[Path], known: Sequence[ResultFile] | None = None
) -> tuple[list[ResultFile], list[Skipped]]:
    """(The files to serve, those that are left out and why).

    Args:
        paths: Files and folders.
        known: What was found before: such files are not opened again unless they have changed, and one that was named
            and cannot be served any more is left out.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file that was named is no result that can be served, or is damaged; or none was found at all.
    """
    found: dict[Path, ResultFile] = {}
    skipped: list[Skipped] = []
    unchanged = {file.path: file for file in known or () if not file.changed()}
    for path, named in candidates(paths).items():
        try:
            found.setdefault(path.resolve(), unchanged.get(path) or open_file(path))
        except (ValueError, OSError) as error:
            if named and known is None:
                raise
            skipped.append(Skipped(str(path), str(error)))
    return list(found.values()), skipped


def candidates(paths: Sequence[Path]) -> dict[Path, bool]:
    """The files that may be results: those that were named (True), and those in folders."""
    found: dict[Path, bool] = {}
    for given in paths:
        if given.is_dir() and not given.name.endswith(PARTS):
            found.update(dict.fromkeys(_inside(given), False))
        else:
            found[given.with_name(given.name.removesuffix(PARTS))] = True
    return found


def open_file(path: Path) -> ResultFile:
    """A result by its path.

    Raises:
        FileNotFoundError: There is neither the file nor parts of it.
        ValueError: It is damaged, or no result that can be served.
    """
    if not path.exists() and _parts_of(path).is_dir():
        return _unfinished(path)
    if not path.is_file():
        raise FileNotFoundError(f"result {str(path)!r} does not exist")
    if path.suffix != ".parquet":
        raise ValueError(f"{str(path)!r} is no .parquet file; results that were written as Parquet are served")
    stamp = Stamp.of(path)
    identity = read_identity(path)
    with opened(path, rewritten=True) as file:
        seal = (file.metadata.metadata or {}).get(SEAL_KEY, b"").decode() or None
        n_rows = file.metadata.num_rows
    kind = _kind_of(path, identity)
    if kind == SIGNATURES:
        refuse_other_columns(path)
    if kind in (SCORES, *RELATIONS) and n_rows > MAX_ROWS:
        raise ValueError(f"{str(path)!r} is a table of {n_rows:,} rows; tables of {kind} are served up to {MAX_ROWS:,}")
    return ResultFile(path, kind, identity, stamp, seal, n_rows)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a changed file raises into a `ResultGone` that names it."""
    try:
        yield
    except (DamagedFile, FileNotFoundError) as error:
        raise ResultGone(f"{str(path)!r} was deleted, cut off or replaced since it was opened") from error


def _inside(folder: Path) -> Iterable[Path]:
    """The results in a folder: .parquet files, those of which there are parts only, and JSONL, which is not served."""
    named: dict[Path, None] = {}
    for root, folders, names in os.walk(folder):
        here = Path(root)
        for name in sorted(names):
            if name.endswith(".parquet") or (name.endswith(".jsonl") and f"{name}.run.json" in names):
                named[here / name] = None
        for name in sorted(folders):
            if name.endswith(".parquet" + PARTS):
                named[here / name.removesuffix(PARTS)] = None
        folders[:] = sorted(name for name in folders if not name.endswith(PARTS) and not name.startswith("."))
        if len(named) > MAX_FILES:
            raise ValueError(f"{str(folder)!r} holds more than {MAX_FILES:,} Parquet files; name a folder of results")
    return named


def _unfinished(path: Path) -> ResultFile:
    stamp = Stamp.of(path)
    identity, _ = read_record(_parts_of(path) / "run.json")
    return ResultFile(path, _kind_of(path, identity), identity, stamp)


def _kind_of(path: Path, identity: dict[str, Any]) -> str:
    if "preset" in identity:
        return SIGNATURES
    what = identity.get("what")
    if what in (SAMPLE, SCORES, *RELATIONS):
        return str(what)
    raise ValueError(
        f"{str(path)!r} is a table of {what!r}; served are results of `signatures`, feature samples, scores, and "
        f"tables of {', '.join(RELATIONS)}"
    )


def _parts_of(path: Path) -> Path:
    return path.with_name(path.name + PARTS)
