"""Files of users that are read whole: where they are larger than the memory at hand, the error names them."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 22


@contextmanager
def fits_memory(path: str | Path) -> Iterator[None]:
    """Name ``path`` in what is raised where reading it asks for more memory than there is.

    Raises:
        OSError: ENOMEM, with the file and its size.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        size = Path(path).stat().st_size / 2**30
        raise OSError(
            errno.ENOMEM, f"this file of {size:.3g} GiB does not fit into the memory there is", str(path)
        ) from error


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises OSError as `fits_memory`, and ValueError for other bytes."""
    try:
        with fits_memory(path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {str(path)!r} is not UTF-8 ({error}); convert it first") from error


def digest_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits, read a piece at a time."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
