"""One run at a time writes a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from querylens_fast.runs.atomic_write import output_file


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other runs from writing the result ``path`` meanwhile, by a lock beside it that dies with the process.

    Raises:
        FileExistsError: Another run is writing it.
        ValueError: The path is a folder, a device or a pipe.
    """
    from filelock import FileLock, Timeout

    target = output_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(target.name + ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"another run is writing {str(path)!r}: wait for it, or choose another out") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Add to a full disk's error, or to Ctrl-C, what is kept of the result ``path`` and how to go on."""
    kept = f"what was written of {str(path)!r} is kept; run the same call again to go on from there"
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {kept}", error.filename) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; {kept}") from stop
