"""A folder of files that one run writes, each whole or not at all, and that the same run goes on with after a kill."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from querylens_fast.runs.atomic_write import whole
from querylens_fast.runs.run_lock import held, resumable
from querylens_fast.runs.run_record import read_record, refuse_others, write_record

RECORD = "querylens_fast.json"
"""Beside the files: what they are of. The tools do not read it."""
GZIP_LEVEL = 5


@contextmanager
def claimed(folder: Path, identity: dict[str, Any], resume: bool = True) -> Iterator[None]:
    """Write files of one run into a folder; its record is made first.

    Raises:
        FileExistsError: The folder holds files of another run, or without a record, or resume is False.
        DamagedFile: Its record is not what was written.
    """
    identity = json.loads(json.dumps(identity))
    record = folder / RECORD
    if record.is_file():
        refuse_others(folder, read_record(record)[0], identity, resume)
    elif folder.is_dir() and any(p.suffix != ".partial" and not p.name.endswith(".lock") for p in folder.iterdir()):
        raise FileExistsError(
            f"{str(folder)!r} holds files, but no {RECORD} that says what they are of, so it is left alone; choose "
            "another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with held(record), resumable(folder):
        write_record(record, identity)
        yield


def json_bytes(value: Any) -> bytes:
    """Compact UTF-8 JSON. Raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all; gzipped where the name ends in .gz, the same bytes every time."""
    data = b"".join(json_bytes(line) + b"\n" for line in lines)
    write_bytes(path, gzipped(data) if path.suffix == ".gz" else data)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_bytes(data)


def gzipped(data: bytes) -> bytes:
    """gzip without a time or a name in its header."""
    raw = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=GZIP_LEVEL, mtime=0) as file:
        file.write(data)
    return raw.getvalue()
