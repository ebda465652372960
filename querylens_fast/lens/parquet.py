"""Parquet results: one row a feature, written block by block, one file in the end.

Every block is a part file in ``<out>.parts``, written under another name and renamed when whole, so a run killed at any
moment goes on from its last whole block. `ParquetSink.finish` copies the parts into one file, a row group at a time
(memory does not grow with the result; the disk holds the result twice until then), and only then removes them: killed
there, too, nothing is lost and the next call begins the copy again. The file's bytes depend on the run alone, not on
how often it was interrupted.

Columns: feature_index (position in the run), layer, feature, top_ids, top_scores, bottom_ids, bottom_scores, with token
strings top_tokens and bottom_tokens, then statistics. Lists have k entries each and no nulls. Row groups of
`ROW_GROUP` rows carry the range of their features, by which readers skip them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querylens_fast.lens.results import Signatures
from querylens_fast.lens.storage import METADATA_KEY, Sink, StoredSignatures, read_identity
from querylens_fast.models.model import Model
from querylens_fast.runs.atomic_write import whole, write_whole

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 1 << 15
"""Rows read together: few enough for one feature to be quick, many enough for a scan of a million."""
_ENCODED = [f"{side}_{what}.list.element" for side in ("top", "bottom") for what in ("ids", "tokens")]
"""Columns with a dictionary: values that come again."""
_OPTIONS = {
    "compression": "zstd",
    "use_dictionary": ["layer", "transition", *_ENCODED],
    "dictionary_pagesize_limit": 1 << 24,
}


class ParquetSink(Sink):
    """A part file a block; one Parquet file at the end, with the run's identity in its schema metadata."""

    format = "parquet"

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, token_strings: bool, model: Model) -> None:
        super().__init__(path, {**identity, "token_strings": token_strings}, resume, token_strings, model)
        self.complete, self.begun = path.exists(), False
        if self.complete:
            shutil.rmtree(self.parts, ignore_errors=True)  # a run killed after its last step left them

    @property
    def parts(self) -> Path:
        return self.path.with_name(self.path.name + ".parts")

    def pending(self, block: slice) -> Sequence[int]:
        done = self.complete or self._part(block.start).exists()
        return range(0) if done else range(block.start, block.stop)

    def write(self, found: Signatures, indices: Sequence[int], names: Sequence[str] | None = None) -> None:
        import pyarrow.parquet as pq

        self._begin()
        with whole(self._part(indices[0])) as partial:
            pq.write_table(self._table(found, indices), partial, **_OPTIONS)

    def finish(self, n_features: int) -> StoredSignatures:
        """Put the parts together.

        Raises:
            OSError: The disk is full; the parts stay.
            ValueError: A part is damaged, without which the same call computes it again, or rows are missing.
        """
        import pyarrow.parquet as pq

        if self.complete:
            rows = pq.read_metadata(self.path).num_rows
            if rows != n_features:
                raise ValueError(f"{str(self.path)!r} holds {rows} rows of {n_features}; delete it and run again")
        else:
            parts = sorted(self.parts.glob("part-*.parquet"))
            rows = sum(_open_part(part).metadata.num_rows for part in parts)
            if rows != n_features:
                raise ValueError(
                    f"{str(self.parts)!r} holds {rows} rows of {n_features}: all processes of a run have to write to "
                    "the same folder; run the same call again to compute the others"
                )
            self._join(parts)
            shutil.rmtree(self.parts)
        return super().finish(n_features)

    def _join(self, parts: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        first = _open_part(parts[0]).schema_arrow
        schema = first.with_metadata({METADATA_KEY: json.dumps(self.identity).encode()})
        joined = self.parts / self.path.name
        with whole(joined) as partial, pq.ParquetWriter(partial, schema, **_OPTIONS) as writer:
            for group in _regroup(parts):
                writer.write_table(group.cast(schema), row_group_size=ROW_GROUP)
        joined.replace(self.path)

    def _begin(self) -> None:
        """Say what the parts are of; not before there is one, so that a mistake leaves nothing behind."""
        if not self.begun:
            self.parts.mkdir(exist_ok=True)
            write_whole(self.parts / "run.json", json.dumps(self.identity, indent=1))
            self.begun = True

    def _part(self, start: int) -> Path:
        return self.parts / f"part-{start:012d}.parquet"

    def _earlier_identity(self) -> dict[str, Any] | None:
        if self.path.exists():
            return read_identity(self.path)
        if any(self.parts.glob("part-*.parquet")):
            return json.loads((self.parts / "run.json").read_text(encoding="utf-8"))
        return None

    @cached_property
    def _vocabulary(self) -> pa.Array:
        import pyarrow as pa

        return pa.array(self.model.str_tokens(range(self.model.vocab_size)))

    def _table(self, found: Signatures, indices: Sequence[int]) -> pa.Table:
        import pyarrow as pa

        columns: dict[str, Any] = {
            "feature_index": pa.array(indices, pa.int64()),
            "layer": pa.array([found.layer] * len(found), pa.int32()),
            "feature": pa.array(found.features.numpy()),
        }
        for side in ("top", "bottom"):
            ids, scores = getattr(found, f"{side}_ids"), getattr(found, f"{side}_scores")
            flat = pa.array(ids.int().flatten().numpy())
            columns[f"{side}_ids"] = _lists(flat, ids.shape)
            columns[f"{side}_scores"] = _lists(pa.array(scores.flatten().numpy()), scores.shape)
            if self.token_strings:
                columns[f"{side}_tokens"] = _lists(self._vocabulary.take(flat), ids.shape)
        columns |= {name: pa.array(column.numpy()) for name, column in found.stats.items()}
        if found.choices is not None:
            columns["transition"] = pa.array(found.choices)
        fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
        if found.layer_terms is not None:
            rows = [found._layer_row(i) for i in range(len(found))]
            columns |= {name: pa.array([row[name] for row in rows]) for name in rows[0]}
            fields += [pa.field(name, columns[name].type) for name in rows[0]]
        return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))


def _lists(flat: pa.Array, shape: Sequence[int]) -> pa.ListArray:
    """Lists without nulls, [n] of k entries: readers need not look for any."""
    import numpy as np
    import pyarrow as pa

    n, k = shape
    offsets = pa.array(np.arange(0, n * k + 1, k, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, flat, type=pa.list_(pa.field("element", flat.type, nullable=False)))


def _open_part(part: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(part)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{str(part)!r} is damaged ({error}); delete it and run the same call again to compute it anew"
        ) from error


def _regroup(parts: Sequence[Path]) -> Iterator[pa.Table]:
    """The rows of all parts in order, `ROW_GROUP` at a time; the last has what is left."""
    import pyarrow as pa

    waiting, n = [], 0
    for part in parts:
        with _open_part(part) as file:
            waiting.append(file.read())
        n += waiting[-1].num_rows
        while n >= ROW_GROUP:
            rows = pa.concat_tables(waiting)
            yield rows.slice(0, ROW_GROUP)
            waiting, n = [rows.slice(ROW_GROUP)], n - ROW_GROUP
    if n:
        yield pa.concat_tables(waiting)
