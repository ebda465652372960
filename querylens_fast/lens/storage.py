"""Signatures in files: which format a path means, the sink that writes it, and the result that is read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from querylens_fast.lens.jsonl import JsonlSink, has_checksums, jsonl_problems, read_jsonl, read_jsonl_identity
from querylens_fast.lens.parquet import ParquetSink
from querylens_fast.runs import part_writer, sealed_parquet, sealed_tensors

if TYPE_CHECKING:
    import pyarrow as pa

    from querylens_fast.lens.results import Signatures
    from querylens_fast.models.model import Model

__all__ = ["FORMATS", "Sink", "StoredSignatures", "format_of", "open_sink", "read_identity", "read_jsonl", "verify"]

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl"}


@dataclass(frozen=True)
class StoredSignatures:
    """Signatures in a file."""

    path: Path
    n_features: int
    format: str

    def table(self) -> Any:
        """The file as a pyarrow Table. Raises ValueError where it is damaged."""
        if self.format == "parquet":
            with sealed_parquet.opened(self.path) as file:
                return file.read()
        import pyarrow as pa

        return pa.Table.from_pylist(read_jsonl(self.path))

    def metadata(self) -> dict[str, Any]:
        """What the file is a result of: preset, dictionary, model, transport, …"""
        return read_identity(self.path)


class Sink(Protocol):
    """Takes blocks of signatures. Opening one writes at most the run's identity."""

    def pending(self, block: slice) -> Sequence[int]:
        """Indices of the block that are not written yet."""
        ...

    def write(self, found: Signatures, indices: Sequence[int], names: Sequence[str] | None = None) -> None:
        """Write signatures; indices are their positions in the run, names their feature_str."""
        ...

    def finish(self, n_features: int) -> None:
        """Close the result, which has to hold n_features rows."""
        ...


def format_of(path: str | Path, format: str | None = None) -> str:
    """ "parquet" or "jsonl": as asked for, or by the path's ending.

    Raises:
        ValueError: Another one.
    """
    found = format or FORMATS.get(Path(path).suffix)
    if found not in ("parquet", "jsonl"):
        raise ValueError(f"out is {str(path)!r}; expected a .parquet or .jsonl file, or format='parquet' or 'jsonl'")
    return found


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
        ValueError: An ending or format that is not known, a folder or device, or no tokenizer for token strings.
        FileExistsError: The path holds another run's result, or one of this run and ``resume`` is False.
    """
    format = format_of(path, format)
    if token_strings or format == "jsonl":
        model.str_tokens([0])
    kind = ParquetSink if format == "parquet" else JsonlSink
    return kind(Path(path), identity, resume, token_strings, model)


def read_identity(path: str | Path) -> dict[str, Any]:
    """What a result file is a result of.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, or was not written by this package.
    """
    path = Path(path)
    if path.is_file() and FORMATS.get(path.suffix) == "jsonl":
        return read_jsonl_identity(path)
    return sealed_parquet.read_identity(path)


def refuse_other_columns(path: str | Path) -> None:
    """Raise ValueError unless a Parquet file has the columns of signatures: ids and scores of both sides, as lists.

    The rows of a file without a seal, which any program may have written, are looked at too.
    """
    if FORMATS.get(Path(path).suffix) == "jsonl":
        return
    with sealed_parquet.opened(Path(path), rewritten=True) as file:
        schema, sealed = file.schema_arrow, sealed_parquet.SEAL_KEY in (file.metadata.metadata or {})
        wrong = _wrong_types(schema)
        for i in range(file.num_row_groups if not (sealed or wrong) else 0):
            wrong = wrong or _wrong_rows(file.read_row_group(i, [*SINGLE, *(n for n in LISTS if n in schema.names)]))
    if wrong:
        raise ValueError(
            f"{str(path)!r} is no file of signatures: {', '.join(wrong)} is missing, of another type, or not whole in "
            "every row"
        )


SINGLE = ("feature", "layer")
LISTS = {f"{side}_{what}": what for what in ("ids", "scores", "tokens") for side in ("top", "bottom")}


def _wrong_types(schema: pa.Schema) -> list[str]:
    """The columns of signatures that a table lacks, has twice, or has of another type; token strings may be missing."""
    import pyarrow as pa

    fits = {"ids": pa.types.is_integer, "scores": pa.types.is_floating, "tokens": pa.types.is_string}
    counts = {name: schema.names.count(name) for name in (*SINGLE, *LISTS)}
    wrong = [name for name, n in counts.items() if n > 1 or n == 0 and LISTS.get(name) != "tokens"]
    types = {name: schema.field(name).type for name, n in counts.items() if n == 1}
    wrong += [name for name in SINGLE if name in types and not pa.types.is_integer(types[name])]
    lists = {name: types[name] for name in LISTS if name in types}
    return wrong + [n for n, t in lists.items() if not (pa.types.is_list(t) and fits[LISTS[n]](t.value_type))]


def _wrong_rows(table: pa.Table) -> list[str]:
    """The columns with nulls, or with lists that are not all of one length."""
    import pyarrow.compute as pc

    lists = [name for name in table.column_names if name in LISTS]
    counted = {name: pc.call_function("list_value_length", [table[name]]) for name in lists}
    lengths = {name: pc.call_function("min_max", [counted[name]]).as_py() for name in lists}
    one = lengths["top_ids"]
    wrong = [name for name in table.column_names if table[name].null_count]
    wrong += [name for name in lists if lengths[name] != one or one["min"] != one["max"]]
    return wrong + [name for name in lists if pc.call_function("list_flatten", [table[name]]).null_count]


def verify(path: str | Path) -> list[str]:
    """What is wrong with a result file: nothing, or sentences that name the damage. Reads all of it.

    Every byte of a Parquet file is compared with the digests in its footer (some 2 GB/s), every JSONL row with its
    checksum and its place. Results of versions before there were digests are only decoded.

    Args:
        path: A result of `signatures` or of a relation, Parquet or JSONL; a sample; a transport.

    Raises:
        FileNotFoundError: No such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"result file {str(path)!r} does not exist")
    if FORMATS.get(path.suffix) == "jsonl":
        return jsonl_problems(path)
    if path.suffix == ".safetensors":
        return sealed_tensors.problems(path)
    found = part_writer.verify(path)
    if not found:
        with sealed_parquet.opened(path) as file:
            rows = file.metadata.num_rows
        identity = sealed_parquet.read_identity(path)
        expected = identity.get("n_features", rows)
        if rows != expected and "what" not in identity:  # a relation has more rows than features
            found = [f"{str(path)!r} holds {rows} rows of {expected}"]
    return found


def is_checked(path: str | Path) -> bool:
    """Was the result written with digests of its rows? Those of earlier versions were not."""
    if FORMATS.get(Path(path).suffix) == "jsonl":
        return has_checksums(Path(path))
    if Path(path).suffix == ".safetensors":
        return sealed_tensors.check_seal(path)
    return sealed_parquet.is_sealed(path)
