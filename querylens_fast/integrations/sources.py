"""Where an exporter's rows come from: a dictionary, read out as dashboards do, or a result of `signatures`.

`open_source` takes either and checks it before anything is written; the rest of the exporters sees a `Source`, which
gives `Rows` block by block.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.integrations.dashboard import Dashboard, Rows
from querylens_fast.lens.results import Signatures
from querylens_fast.lens.storage import FORMATS, StoredSignatures, read_identity, read_jsonl
from querylens_fast.models.model import Model
from querylens_fast.runs.run_record import agree
from querylens_fast.runs.sealed_parquet import opened

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

logger = logging.getLogger(__name__)

NO_TOKEN = -1
"""Pads the lists of rows that hold fewer tokens than others; its score is NaN."""
_COLUMNS = ("top_ids", "top_scores", "bottom_ids", "bottom_scores")


@dataclass(frozen=True)
class Source:
    """Rows of features, in order.

    Attributes:
        features: Feature ids, [n] int64.
        read: Yields `Rows` for each slice of positions in ``features``.
        identity: What the rows are of, as JSON values.
        preset: The preset's name.
        layer: The dictionary's layer.
        dictionary: For vectors and neighbours, or None.
        missing: Sentences that say what an export will lack.
    """

    features: Tensor
    read: Callable[[Sequence[slice]], Iterator[Rows]]
    identity: dict[str, Any]
    preset: str
    layer: int
    dictionary: Dictionary | None
    missing: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    def say_missing(self) -> None:
        """Log what the export will lack. Called before anything is written."""
        for sentence in self.missing:
            logger.warning("%s", sentence)


def open_source(
    source: Any,
    model: Model,
    *,
    features: Any = None,
    dictionary: Any = None,
    k: int = 10,
    bins: int = 50,
    unit_norm: bool = True,
    unembedding: str = "raw",
) -> Source:
    """The rows of a dictionary or of a result.

    Args:
        source: A dictionary (or what `load_dictionary` takes), or a result: `Signatures`, `StoredSignatures`, or the
            path of a .parquet or .jsonl file.
        model: Its model.
        features: Of a dictionary: which of them. A result is exported whole.
        dictionary: Of a result: the dictionary it is of, for its vectors and neighbours.
        k: Tokens on each side; a result that holds fewer gives what it has.
        bins: Of the histogram.
        unit_norm: See `Dashboard`.
        unembedding: See `Dashboard`.

    Raises:
        ValueError: What does not fit together.
        FileNotFoundError: No such file.
    """
    if not _is_result(source):
        if dictionary is not None:
            raise ValueError("dictionary= is for an export of a result; the first argument is a dictionary already")
        return _of_dictionary(load_dictionary(source), model, features, k, bins, unit_norm, unembedding)
    if features is not None:
        raise ValueError("features= chooses from a dictionary; a result is exported whole")
    return _of_result(source, model, k, None if dictionary is None else load_dictionary(dictionary))


def blocks_of(n: int, rows: int) -> list[slice]:
    """Slices of at most ``rows`` positions."""
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _is_result(source: Any) -> bool:
    if isinstance(source, (Signatures, StoredSignatures)):
        return True
    return isinstance(source, (str, Path)) and Path(source).suffix in FORMATS


def _of_dictionary(
    dictionary: Dictionary, model: Model, features: Any, k: int, bins: int, unit_norm: bool, unembedding: str
) -> Source:
    board = Dashboard(dictionary, model, k, unit_norm, unembedding, bins)
    board.check()
    ids = dictionary.select(features)
    identity = {**board.identity, "features": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}
    return Source(
        ids,
        lambda slices: board.blocks([ids[rows] for rows in slices]),
        identity,
        "dashboard",
        dictionary.layer,
        dictionary,
    )


def _of_result(source: Any, model: Model, k: int, dictionary: Dictionary | None) -> Source:
    path = source.path if isinstance(source, StoredSignatures) else source
    identity = _identity_in_memory(source) if isinstance(source, Signatures) else read_identity(path)
    if "preset" not in identity:
        raise ValueError(f"{str(path)!r} is a table of {identity.get('what')!r}; expected a result of `signatures`")
    difference = None if identity.get("fingerprint") is None else model.difference_from(identity)
    if difference is not None:
        raise ValueError(
            f"the result is of model {identity.get('model')!r} with {difference}; pass the model it was computed with"
        )
    stored = _Held(source) if isinstance(source, Signatures) else _file(Path(path))
    features = stored.features()
    _check_dictionary(identity, features, model, dictionary)
    missing = [f"the result ({identity['preset']}) holds no histogram of all logits: those fields are left empty"]
    if dictionary is None:
        missing.append("the result holds no vectors: pass dictionary= for vectors, alignments and neighbours")

    def read(slices: Sequence[slice]) -> Iterator[Rows]:
        for rows in slices:
            ids = features[rows]
            vectors = None if dictionary is None else dictionary.values(ids)
            sides: dict[str, Any] = {name: x[:, :k] for name, x in stored.read(rows).items()}
            yield Rows(ids, **sides, vectors=vectors)

    kept = {name: identity[name] for name in sorted(identity) if name != "block_rows"}
    kept |= {"exported_k": k, "rows": hashlib.sha256(features.numpy().tobytes()).hexdigest()[:16]}
    if dictionary is not None:
        kept["dictionary_fingerprint"] = dictionary.fingerprint
    return Source(features, read, kept, identity["preset"], int(identity["layer"]), dictionary, missing)


def _check_dictionary(identity: dict[str, Any], features: Tensor, model: Model, dictionary: Dictionary | None) -> None:
    if not len(features):
        raise ValueError("the result holds no features: nothing to export")
    if len(features.unique()) < len(features):
        raise ValueError("the result holds a feature more than once; export the results of one dictionary at a time")
    if dictionary is None:
        return
    dictionary.check_model(model)
    dictionary.select(features)
    known = identity.get("dictionary_fingerprint", dictionary.fingerprint)
    if not agree(known, dictionary.fingerprint) or identity["layer"] != dictionary.layer:
        raise ValueError(
            f"dictionary {dictionary.name!r} (layer {dictionary.layer}) is not the one that the result is of: "
            f"{identity.get('dictionary')!r}, layer {identity['layer']}"
        )


def _identity_in_memory(found: Signatures) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in _COLUMNS:
        digest.update(getattr(found, name).contiguous().numpy().tobytes())
    return {"preset": found.preset, "layer": found.layer, "digest": digest.hexdigest()[:32]}


class _Stored:
    """The rows of a result: feature ids, and tokens and scores of a slice of rows."""

    def features(self) -> Tensor:
        raise NotImplementedError

    def read(self, rows: slice) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass
class _Held(_Stored):
    found: Signatures

    def features(self) -> Tensor:
        return self.found.features

    def read(self, rows: slice) -> dict[str, Tensor]:
        return {name: getattr(self.found, name)[rows] for name in _COLUMNS}


def _file(path: Path) -> _Stored:
    return _Jsonl(path) if FORMATS[path.suffix] == "jsonl" else _Parquet(path)


class _Jsonl(_Stored):
    def __init__(self, path: Path) -> None:
        self.rows = sorted(read_jsonl(path), key=lambda row: row["feature_index"])

    def features(self) -> Tensor:
        return torch.tensor([row["feature"] for row in self.rows], dtype=torch.int64)

    def read(self, rows: slice) -> dict[str, Tensor]:
        chosen = self.rows[rows]
        return {name: _padded([row[name] for row in chosen], name) for name in _COLUMNS}


class _Parquet(_Stored):
    """Reads a row group at a time and keeps the one that was read last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self.ids = torch.from_numpy(file.read(["feature"])["feature"].to_numpy().copy()).long()
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.group: tuple[int, pa.Table] | None = None

    def features(self) -> Tensor:
        return self.ids

    def read(self, rows: slice) -> dict[str, Tensor]:
        import pyarrow as pa

        parts = []
        for i, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            low, high = max(rows.start, start), min(rows.stop, stop)
            if low < high:
                parts.append(self._group(i).slice(low - start, high - low))
        table = pa.concat_tables(parts)
        return {name: _tensor(table[name].combine_chunks(), name) for name in _COLUMNS}

    def _group(self, i: int) -> pa.Table:
        if self.group is None or self.group[0] != i:
            with opened(self.path) as file:
                self.group = i, file.read_row_group(i, list(_COLUMNS))
        return self.group[1]


def _tensor(lists: pa.Array, name: str) -> Tensor:
    """[n, k] from lists of k entries each, or padded ones."""
    import numpy as np

    offsets: np.ndarray = lists.offsets.to_numpy()
    sizes = np.diff(offsets)
    if not len(sizes) or (sizes != sizes[0]).any():
        return _padded(lists.to_pylist(), name)
    flat = lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.copy()).view(len(sizes), int(sizes[0])).to(_dtype(name))


def _padded(lists: Sequence[Sequence[float]], name: str) -> Tensor:
    fill = NO_TOKEN if name.endswith("ids") else float("nan")
    k = max(map(len, lists), default=0)
    return torch.tensor([[*row, *[fill] * (k - len(row))] for row in lists], dtype=_dtype(name)).view(len(lists), k)


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name.endswith("ids") else torch.float64
