"""Sinks: where signatures are written, so that nothing is lost and a killed run goes on.

Parquet, for whole dictionaries, is in `parquet`. JSONL, the reference's row format: rows are appended a block at a
time, and a half-written last line is cut off when the run resumes. Beside either lies the identity of the run it
belongs to; a file of another run is refused, never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from querylens_fast.lens.results import Signatures
from querylens_fast.models.model import Model
from querylens_fast.runs.atomic_write import write_whole

METADATA_KEY = b"querylens_fast"
FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl"}


@dataclass(frozen=True)
class StoredSignatures:
    """Signatures in a file."""

    path: Path
    n_features: int
    format: str

    def table(self) -> Any:
        """The file as a pyarrow Table."""
        if self.format == "parquet":
            import pyarrow.parquet as pq

            return pq.read_table(self.path)
        import pyarrow as pa

        return pa.Table.from_pylist(read_jsonl(self.path))

    def metadata(self) -> dict[str, Any]:
        """What the file is a result of: preset, dictionary, model, transport, …"""
        return read_identity(self.path)


def open_sink(
    path: str | Path,
    format: str | None,
    identity: dict[str, Any],
    *,
    resume: bool,
    token_strings: bool,
    model: Model,
) -> Sink:
    """The sink for a path.

    Raises:
        ValueError: An ending or format that is not known, or no tokenizer for token strings.
        FileExistsError: The path holds another run's result, or one of this run and ``resume`` is False.
    """
    path = Path(path)
    format = format or FORMATS.get(path.suffix)
    if format not in ("parquet", "jsonl"):
        raise ValueError(f"out is {str(path)!r}; expected a .parquet or .jsonl file, or format='parquet' or 'jsonl'")
    if token_strings or format == "jsonl":
        model.str_tokens([0])
    from querylens_fast.lens.parquet import ParquetSink

    kind = ParquetSink if format == "parquet" else JsonlSink
    return kind(path, identity, resume, token_strings, model)


class Sink:
    """Takes blocks of signatures. Opening it writes at most the run's identity."""

    format = ""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, token_strings: bool, model: Model) -> None:
        self.path, self.identity, self.token_strings, self.model = (
            path,
            json.loads(json.dumps(identity)),
            token_strings,
            model,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier_identity()
        if earlier is not None and not resume:
            raise FileExistsError(f"{str(path)!r} exists already; delete it, choose another out, or use resume=True")
        if earlier is not None and earlier != self.identity:
            changed = sorted(k for k in self.identity if earlier.get(k) != self.identity[k])
            raise FileExistsError(
                f"{str(path)!r} holds the result of another run (different: {', '.join(changed) or 'format'}); "
                "delete it or choose another out"
            )

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            kept = f"what was written of {str(self.path)!r} is kept; run the same call again to go on from there"
            raise OSError(error.errno, f"{error.strerror or error}; {kept}", error.filename) from error

    def pending(self, block: slice) -> Sequence[int]:
        """Indices of the block that are not written yet."""
        raise NotImplementedError

    def write(self, found: Signatures, indices: Sequence[int], names: Sequence[str] | None = None) -> None:
        """Write signatures; indices are their positions in the run, names their feature_str."""
        raise NotImplementedError

    def finish(self, n_features: int) -> StoredSignatures:
        """Close the result."""
        return StoredSignatures(self.path, n_features, self.format)

    def _earlier_identity(self) -> dict[str, Any] | None:
        raise NotImplementedError


class JsonlSink(Sink):
    """One JSON object a line, in the reference's row format; resumes by feature_index."""

    format = "jsonl"

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, token_strings: bool, model: Model) -> None:
        super().__init__(path, identity, resume, token_strings, model)
        self.done = _mend_jsonl(path)
        write_whole(_identity_path(path), json.dumps(self.identity, indent=1))

    def pending(self, block: slice) -> Sequence[int]:
        return [i for i in range(block.start, block.stop) if i not in self.done]

    def write(self, found: Signatures, indices: Sequence[int], names: Sequence[str] | None = None) -> None:
        names = names or [found.source.feature_name(f) for f in found.features.tolist()]
        lines = [
            json.dumps({"feature_index": index, "feature_str": name, **row}, ensure_ascii=False)
            for index, name, row in zip(indices, names, found.rows(), strict=True)
        ]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.done.update(indices)

    def _earlier_identity(self) -> dict[str, Any] | None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return None
        if _identity_path(self.path).is_file():
            return json.loads(_identity_path(self.path).read_text(encoding="utf-8"))
        raise FileExistsError(
            f"{str(self.path)!r} has no .run.json beside it that says what it is a result of, so it is left alone; "
            "choose another out"
        )


def _identity_path(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def _mend_jsonl(path: Path) -> set[int]:
    """The feature_index of every whole row; a half-written last line is cut off."""
    if not path.exists():
        return set()
    done, end = set(), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(int(json.loads(line)["feature_index"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{str(path)!r} line {number} is no result row ({error}); mend or delete the file"
                ) from error
            end += len(line)
    with open(path, "r+b") as file:
        file.truncate(end)
    return done


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a result file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def read_identity(path: str | Path) -> dict[str, Any]:
    """What a result file is a result of.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It was not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"result file {str(path)!r} does not exist")
    if FORMATS.get(path.suffix) == "jsonl":
        if not _identity_path(path).is_file():
            raise ValueError(f"{str(path)!r} has no .run.json beside it that says what it is a result of")
        return json.loads(_identity_path(path).read_text(encoding="utf-8"))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is no whole Parquet file: {error}") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{str(path)!r} was not written by querylens_fast")
    return json.loads(metadata[METADATA_KEY])
