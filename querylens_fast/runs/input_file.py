"""Files of users that are read whole: where they are larger than the memory at hand, the error names them."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 22


@contextmanager
def fits_memory(path: str | Path) -> Iterator[None]:
    """Name ``path`` where reading it asks for more memory than there is; do not begin with more than the machine has.

    Raises:
        OSError: ENOMEM, with the file and its size.
    """
    size = Path(path).stat().st_size
    too_large = f"this file of {size / 2**30:.3g} GiB does not fit into the memory there is"
    if size > _machine_memory():
        raise OSError(errno.ENOMEM, too_large, str(path))
    try:
        yield
    except Exception as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise OSError(errno.ENOMEM, too_large, str(path)) from error


def _machine_memory() -> float:
    """Bytes of memory that the machine has; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


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
