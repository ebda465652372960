"""Signatures as Parquet: one row a feature, written part by part (`runs.part_writer`), one file in the end.

Columns: feature_index (position in the run), layer, feature, top_ids, top_scores, bottom_ids, bottom_scores, with token
strings top_tokens and bottom_tokens, then statistics, and top_se (standard errors of top_scores) where there are any.
Lists have k entries each and no nulls. Row groups of `ROW_GROUP` rows carry the range of their features, by which
readers skip them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querylens_fast.runs.part_writer import PartWriter

if TYPE_CHECKING:
    import pyarrow as pa

    from querylens_fast.lens.results import Signatures
    from querylens_fast.models.model import Model

ROW_GROUP = 1 << 15
"""Rows read together: few enough for one feature to be quick, many enough for a scan of a million."""
_ENCODED = [f"{side}_{what}.list.element" for side in ("top", "bottom") for what in ("ids", "tokens")]
"""Columns with a dictionary: values that come again."""
_OPTIONS = {
    "compression": "zstd",
    "use_dictionary": ["layer", "transition", *_ENCODED],
    "dictionary_pagesize_limit": 1 << 24,
}


class ParquetSink:
    """A part file a block; one Parquet file at the end, with the run's identity in its metadata."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, token_strings: bool, model: Model) -> None:
        identity = {**identity, "token_strings": token_strings}
        self.writer = PartWriter(path, identity, parquet_options=_OPTIONS, row_group=ROW_GROUP, resume=resume)
        self.token_strings, self.model = token_strings, model

    def pending(self, block: slice) -> Sequence[int]:
        return range(0) if self.writer.done(block.start) else range(block.start, block.stop)

    def write(self, found: Signatures, indices: Sequence[int], names: Sequence[str] | None = None) -> None:
        self.writer.write(indices[0], self._table(found, indices))

    def finish(self, n_features: int) -> None:
        self.writer.finish(n_features)

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
        if found.top_se is not None:
            columns["top_se"] = _lists(pa.array(found.top_se.flatten().numpy()), found.top_se.shape)
        if found.histogram is not None:
            columns["histogram"] = _lists(pa.array(found.histogram.int().flatten().numpy()), found.histogram.shape)
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
