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

from querylens_fast.queries.views import Skipped
from querylens_fast.runs.run_record import DamagedFile, read_record
from querylens_fast.runs.sealed_parquet import SEAL_KEY, opened, read_identity

PARTS = ".parts"
SIGNATURES, SAMPLE, SCORES = "signatures", "feature sample", "scores"
RELATIONS = ("neighbours", "feature flow", "downstream", "upstream")
MAX_FILES = 10_000
"""Files of a folder, at most."""


class ResultGone(ValueError):
    """A result was deleted, truncated or replaced after it was opened."""


@dataclass(frozen=True)
class Stamp:
    """What tells a file from one that took its place."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        found = os.stat(path)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


@dataclass(frozen=True)
class ResultFile:
    """A file that is served, or the parts of one that is being written."""

    path: Path
    kind: str
    """`SIGNATURES`, `SAMPLE`, `SCORES`, or one of `RELATIONS`."""
    identity: dict[str, Any]
    stamp: Stamp | None
    """None: it is being written."""
    seal: str | None = None
    """The digest of its rows, where it was written with one."""

    @property
    def parts(self) -> list[Path]:
        """The Parquet files that hold its rows so far."""
        if self.stamp is not None:
            return [self.path]
        return sorted(_parts_of(self.path).glob("part-*.parquet"))

    def changed(self) -> bool:
        """Is the file another one by now, or gone, or finished?"""
        try:
            return Stamp.of(self.path) != self.stamp
        except FileNotFoundError:
            return self.stamp is not None or not _parts_of(self.path).is_dir()


def find_files(paths: Sequence[str | Path]) -> tuple[list[ResultFile], list[Skipped]]:
    """(The files to serve, those in given folders that are left out and why).

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file that was named is no result that can be served, or is damaged; or none was found at all.
    """
    found: dict[Path, ResultFile] = {}
    skipped: list[Skipped] = []
    for given in map(Path, paths):
        if given.is_dir() and not given.name.endswith(PARTS):
            for path in _inside(given):
                try:
                    found.setdefault(path.resolve(), open_file(path))
                except (ValueError, OSError) as error:
                    skipped.append(Skipped(str(path), str(error)))
        else:
            path = given.with_name(given.name.removesuffix(PARTS))
            found.setdefault(path.resolve(), open_file(path))
    return list(found.values()), skipped


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
        seal = (file.metadata.metadata or {}).get(SEAL_KEY)
    return ResultFile(path, _kind_of(path, identity), identity, stamp, None if seal is None else seal.decode())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a changed file raises into a `ResultGone` that names it."""
    try:
        yield
    except (DamagedFile, FileNotFoundError) as error:
        raise ResultGone(f"{str(path)!r} was deleted, cut off or replaced since it was opened") from error


def _inside(folder: Path) -> Iterable[Path]:
    """The results in a folder: .parquet files, and those of which there are parts only."""
    named: dict[Path, None] = {}
    for root, folders, names in os.walk(folder):
        here = Path(root)
        for name in sorted(names):
            if name.endswith(".parquet"):
                named[here / name] = None
        for name in sorted(folders):
            if name.endswith(".parquet" + PARTS):
                named[here / name.removesuffix(PARTS)] = None
        folders[:] = sorted(name for name in folders if not name.endswith(PARTS) and not name.startswith("."))
        if len(named) > MAX_FILES:
            raise ValueError(f"{str(folder)!r} holds more than {MAX_FILES:,} Parquet files; name a folder of results")
    return named


def _unfinished(path: Path) -> ResultFile:
    identity, _ = read_record(_parts_of(path) / "run.json")
    return ResultFile(path, _kind_of(path, identity), identity, None)


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
