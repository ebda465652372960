"""Files written whole or not at all: write under another name, fsync, rename."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed runs stay
    fcntl = None

PARTIAL = ".partial"


def output_file(path: str | Path) -> Path:
    """The regular file that an output path stands for: symbolic links are followed, so a link stays one.

    Raises:
        ValueError: It is a folder, or a device or pipe, which cannot be written whole or resumed.
    """
    found = Path(os.path.realpath(path))
    if found.is_dir():
        raise ValueError(f"out is {str(path)!r}, a folder; expected the file to write")
    if found.exists() and not found.is_file():
        raise ValueError(f"out is {str(path)!r}, a device or pipe; expected a regular file")
    return found


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write to a temporary file, fsync, rename to ``path``, fsync the folder; the temporary file is deleted on error.

    Several processes may write the same file at a time: each has a temporary file of its own. Temporary files that
    killed processes left are deleted once this one has its name.

    Raises:
        ValueError: The path is a folder, a device or a pipe.
    """
    path = output_file(path)
    partial, lock = _temporary(path)
    try:
        mode = partial.stat().st_mode
        yield partial
        os.chmod(partial, mode)  # some writers leave files that only their owner can read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    remove_leftovers(path)


def write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power failure, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files of ``path`` whose writers are gone: a live writer holds a lock on its own."""
    if fcntl is None:
        return
    for partial in path.parent.glob(f"{_escaped(path.name)}.????????{PARTIAL}"):
        with suppress(OSError):  # locked: somebody is writing it
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(descriptor)


def _temporary(path: Path) -> tuple[Path, int]:
    """A new temporary file for ``path`` and a descriptor that holds a lock on it, which dies with the process."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return partial, descriptor


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
