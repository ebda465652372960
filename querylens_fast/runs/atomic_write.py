"""Files: written whole or not at all, and by one run at a time."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write that takes the name ``path`` when it is whole and on the disk, and is gone when writing fails."""
    # A name of its own: several processes may write the same file, and each must end up with a whole one.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        os.chmod(partial, mode)  # some writers leave files that only their owner can read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
