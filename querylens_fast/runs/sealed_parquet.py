"""Parquet files that prove their own bytes: page checksums for readers, SHA-256 digests of everything in the footer.

A sealed file has the entry ``querylens_fast.sha256`` in its key-value metadata, "<data>.<footer>": the digest of all
bytes before the footer, and that of the footer to the end of the file, in which its own 64 digits count as zeros. A
reader checks the footer (some 100 kB for a million rows) and, page by page, the checksums of what it decodes;
`problems` reads the whole file. Any other reader takes a sealed file as an ordinary Parquet file. The schema says that
the file is sealed, too: when another program writes the table again, that stays and the digests go. Files of versions
before there were seals have neither and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from querylens_fast.runs.input_file import fits_memory
from querylens_fast.runs.run_record import DamagedFile

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

METADATA_KEY = b"querylens_fast"
"""Key of the JSON that says what a file is a result of."""
SEAL_KEY = b"querylens_fast.sha256"
SEALED_KEY = b"querylens_fast.sealed"
_UNSEALED = b"0" * 64
_SEAL = re.compile(rb"[0-9a-z:]{64}\.([0-9a-f]{64})(?![0-9a-f])")
_TAIL = 8  # length of the footer, little endian, and "PAR1"
_CHUNK = 1 << 22
_MOST_WAITING = 64  # writes that are not hashed yet


def write_sealed(
    path: Path,
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    options: dict[str, Any],
    row_group: int | None = None,
    *,
    part: bool = False,
) -> int:
    """Write tables of one schema to a Parquet file, seal it, and return how many rows it has.

    Each table begins a row group, and fills as many of ``row_group`` rows as it needs. A ``part``, which is read whole
    once and then deleted, has the CRC-32 of its data instead of their SHA-256 and checksums of pages.
    """
    import pyarrow.parquet as pq

    rows, schema = 0, schema.with_metadata({**(schema.metadata or {}), SEALED_KEY: b"1"})
    try:
        with open(path, "wb") as file, ThreadPoolExecutor(1, "digest") as hashing:
            sink = _Sink(file, _Crc32() if part else hashlib.sha256(), None if part else hashing)
            with pq.ParquetWriter(sink, schema, write_page_checksum=not part, **options) as writer:
                for table in tables:
                    writer.write_table(table.cast(schema), row_group_size=row_group)
                    rows += table.num_rows
                writer.add_key_value_metadata({SEAL_KEY: _UNSEALED + b"." + _UNSEALED})
                sink.hold()
            sink.seal()
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    return rows


class _Crc32:
    """CRC-32 with the interface of hashlib and as many digits as SHA-256: several times as fast."""

    def __init__(self, data: bytes = b"") -> None:
        self._value = zlib.crc32(data)

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"crc32:{self._value:08x}".ljust(64, "0")


def _hash_of(seal: bytes) -> Any:
    """The kind of hash that a seal was made with."""
    return _Crc32 if seal.startswith(b"crc32:") else hashlib.sha256


class _Sink:
    """A file to write that hashes what is written meanwhile, in a thread that does not hold the interpreter's lock."""

    closed = False

    def __init__(self, file: IO[bytes], data: Any, hashing: ThreadPoolExecutor | None) -> None:
        self._file, self._hashing, self._data = file, hashing, data
        self._waiting: deque[Future[None]] = deque()
        self._hashed, self._held = 0, cast("bytearray | None", None)

    def write(self, data: Any) -> int:
        data = bytes(data)  # the writer uses its buffer again
        self._file.write(data)
        if self._held is None:
            self._hash(data)
        else:
            self._held += data
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def hold(self) -> None:
        """From now on keep what is written until `seal`: the footer is among it."""
        self._held = bytearray()

    def seal(self) -> None:
        """Put the digests into the footer, which has been written."""
        end = bytes(self._held or b"")
        start = _start_of(self._hashed + len(end), end[-_TAIL:]) - self._hashed
        self._hash(end[:start])
        for future in self._waiting:
            future.result()
        data, footer = self._data.hexdigest().encode(), end[start:]
        place = footer.index(_UNSEALED + b"." + _UNSEALED)
        footer = footer[:place] + data + footer[place + 64 :]
        self._file.seek(self._hashed + place)
        self._file.write(data + b"." + hashlib.sha256(footer).hexdigest().encode())

    def _hash(self, data: bytes) -> None:
        self._hashed += len(data)
        if self._hashing is None:
            self._data.update(data)
            return
        self._waiting.append(self._hashing.submit(self._data.update, data))
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft().result()


@contextmanager
def opened(path: Path, *, rewritten: bool = False, **options: Any) -> Iterator[pq.ParquetFile]:
    """The file as a ParquetFile whose footer has been checked and whose pages are checked as they are read.

    Whatever the body of the ``with`` raises counts as damage, so it should do no more than read.

    Args:
        path: The file.
        rewritten: Take a file that another program has written again, too.
        **options: Of ParquetFile.

    Raises:
        FileNotFoundError: No such file.
        DamagedFile: Now, or while the caller reads: the file is not what was written, or none of this package.
    """
    import pyarrow.parquet as pq

    with _named(path):
        with open(path, "rb") as raw:
            raw.seek(_footer_start(raw))
            metadata = _parsed(path, raw.read(), rewritten)
        if not any(key.startswith(METADATA_KEY) for key in metadata.metadata or {}):
            raise DamagedFile(f"{str(path)!r} was not written by querylens_fast, or its footer is damaged")
        with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True, **options) as file:
            yield file


def read_identity(path: str | Path) -> dict[str, Any]:
    """What a Parquet result is a result of.

    Raises:
        FileNotFoundError: No such file.
        DamagedFile: It is no whole Parquet file, its footer has been changed, or it was not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"result file {str(path)!r} does not exist")
    with opened(path, rewritten=True) as file:
        text = (file.metadata.metadata or {}).get(METADATA_KEY)
        found = None if text is None else json.loads(text)
    if not isinstance(found, dict):
        raise DamagedFile(f"{str(path)!r} is no result of querylens_fast, or its footer is damaged")
    return found


def is_sealed(path: str | Path) -> bool:
    """Does the file hold digests of its own bytes? Those of earlier versions do not."""
    with opened(Path(path)) as file:
        return SEAL_KEY in (file.metadata.metadata or {})


def problems(path: str | Path) -> list[str]:
    """What is wrong with a Parquet file: nothing, or sentences that name it. Reads all of it, some 2 GB/s.

    A file without a seal is decoded from end to end instead, which shows only damage that breaks the encoding.
    """
    path = Path(path)
    try:
        with opened(path) as file:
            seal = (file.metadata.metadata or {}).get(SEAL_KEY)
            for i in range(file.num_row_groups if seal is None else 0):
                file.read_row_group(i)
        if seal is not None:
            with open(path, "rb") as raw:
                if _digest(raw, _footer_start(raw), _hash_of(seal)()) != seal[:64]:
                    raise _damaged(path, "rows are")
    except DamagedFile as error:
        return [str(error)]
    return []


class CheckedFile(NamedTuple):
    """A small file in memory whose bytes have been checked."""

    path: Path
    data: bytes
    metadata: pq.FileMetaData

    @property
    def entries(self) -> dict[bytes, bytes]:
        """The key-value metadata."""
        return self.metadata.metadata or {}

    def table(self) -> pa.Table:
        """Its rows, decoded."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _named(self.path), pq.ParquetFile(pa.BufferReader(self.data), metadata=self.metadata) as file:
            return file.read()


def read_checked(path: Path) -> CheckedFile:
    """Read a small file once and check it byte by byte before its rows are decoded; without a seal, by decoding it.

    Raises:
        DamagedFile: A byte of it has changed.
    """
    with fits_memory(path):
        data = path.read_bytes()
    with _named(path):
        start = _start_of(len(data), data[-_TAIL:])
        found = CheckedFile(path, data, _parsed(path, data[start:]))
        seal = found.entries.get(SEAL_KEY)
        if seal is None:
            found.table()
        elif _hash_of(seal)(memoryview(data)[:start]).hexdigest().encode() != seal[:64]:
            raise _damaged(path, "rows are")
    return found


def _parsed(path: Path, footer: bytes, rewritten: bool = False) -> pq.FileMetaData:
    """The metadata in a footer, which has to be the one that was sealed; that is checked before it is parsed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seal = _SEAL.search(footer)  # by its form: the damage may be in its key
    if seal is not None:
        blank = footer[: seal.start(1)] + _UNSEALED + footer[seal.end(1) :]
        if hashlib.sha256(blank).hexdigest().encode() != seal[1]:
            raise _damaged(path, "footer is")
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    entries = metadata.metadata or {}
    if SEALED_KEY in entries and SEAL_KEY not in entries and not rewritten:
        raise DamagedFile(f"{str(path)!r} was edited: another program has written it again")
    if SEAL_KEY in entries and seal is None:
        raise _damaged(path, "footer is")
    return metadata


def _damaged(path: Path, what: str) -> DamagedFile:
    return DamagedFile(f"{str(path)!r} is damaged or was edited: its {what} not what was written")


def _footer_start(file: Any) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    return _start_of(size, file.read())


def _start_of(size: int, tail: bytes) -> int:
    start = size - _TAIL - int.from_bytes(tail[:4], "little")
    if len(tail) < _TAIL or tail[4:] != b"PAR1" or start < 4:
        raise ValueError("it does not end as a Parquet file does; it may be cut off")
    return start


def _digest(file: Any, n: int, found: Any) -> bytes:
    """The hash of a file's first n bytes, in hexadecimal digits."""
    file.seek(0)
    while n > 0:
        chunk = file.read(min(n, _CHUNK))
        if not chunk:
            break
        found.update(chunk)
        n -= len(chunk)
    return found.hexdigest().encode()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into a DamagedFile that names it; system errors pass."""
    try:
        yield
    except DamagedFile:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedFile(f"{str(path)!r} is damaged, or no whole Parquet file: {error}") from error
