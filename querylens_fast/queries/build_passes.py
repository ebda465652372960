"""Passes 2 and 3 of making an index (`queries.build`): rows and postings of each row group; merging these postings."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from querylens_fast.queries.index import ENDS, Layout
from querylens_fast.queries.scan import flat, statistics_of
from querylens_fast.runs.atomic_write import write_whole

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SORTED_AT_ONCE = 1 << 20
"""Postings sorted at a time."""
SECONDS_A_NOTE = 3.0
"""Between notes of how far the build is; each puts what is written on the disk."""
Check = Callable[[], None]
Postings = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids, rows, scores."""


def pieces(layout: Layout) -> dict[str, int]:
    """The files of postings that are not merged yet, and their sizes."""
    sizes = {}
    for end in ENDS:
        _, dtype, (n,) = layout.arrays[f"{end}_scores"]
        sizes |= {f"{end}_ids": 4 * n, f"{end}_rows": 4 * n, f"{end}_scores": dtype.itemsize * n}
    return sizes


class Passes:
    """Fills the files that have been laid out, from where the note says. What is written leaves the memory again."""

    def __init__(
        self,
        layout: Layout,
        starts: dict[str, np.ndarray],
        row_of: np.ndarray | None,
        parts: Path,
        note: dict[str, Any],
        check: Check,
    ) -> None:
        """Open the files.

        Args:
            layout: Of the index.
            starts: Where each token's postings begin, by end, [V + 1].
            row_of: The row of each place in the result; None: they are the same.
            parts: The folder of the files.
            note: How far they are: row groups written, and tokens merged of each end.
            check: Called between steps; what it raises ends the build.
        """
        self.layout, self.starts, self.row_of = layout, starts, row_of
        self.parts, self.note, self.check = parts, note, check
        self._maps: list[mmap.mmap] = []
        self.whole = self._open("index", np.dtype(np.uint8))
        scores = layout.arrays["top_scores"][1]
        self.loose: dict[str, Postings] = {
            end: (
                self._open(f"{end}_ids", np.dtype(np.int32)),
                self._open(f"{end}_rows", np.dtype(np.int32)),
                self._open(f"{end}_scores", scores),
            )
            for end in ENDS
        }
        self.groups: list[int] = []
        self._next_note = time.monotonic() + SECONDS_A_NOTE

    def view(self, name: str) -> np.ndarray:
        """An array of the index."""
        start, dtype, shape = self.layout.arrays[name]
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return self.whole[start : start + size].view(dtype).reshape(shape)

    def write(self, parquet: pq.ParquetFile) -> None:
        """Pass 2: write the rows, and the postings of each row group by token, then by place in the file."""
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        bounds = np.cumsum([0, *sizes])
        k = self.layout.record["top_ids"].shape[0]
        self.groups = (bounds * k).tolist()
        columns = [name for name in parquet.schema_arrow.names if name not in ("top_tokens", "bottom_tokens")]
        for i in range(self.note["group"], len(sizes)):
            self.check()
            table = parquet.read_row_group(i, columns)
            rows = (
                np.arange(*bounds[i : i + 2], dtype=np.int32)
                if self.row_of is None
                else (self.row_of[slice(*bounds[i : i + 2])].astype(np.int32))
            )
            self._write_rows(table, rows)
            here = slice(*self.groups[i : i + 2])
            for end in ENDS:
                tokens, scores = (flat(table[f"{end}_{what}"].combine_chunks()) for what in ("ids", "scores"))
                order = np.argsort(tokens, kind="stable")
                for piece, values in zip(self.loose[end], (tokens, np.repeat(rows, k), scores), strict=True):
                    piece[here] = values[order]
            self._done("group", i + 1)

    def merge(self) -> None:
        """Pass 3: each token's postings by score, then by row, at their places in the index."""
        for end in ENDS:
            starts, first = self.starts[end], self.note[end]
            out = self.view(f"{end}_rows"), self.view(f"{end}_scores")
            while first < len(starts) - 1:
                self.check()
                last = max(first + 1, int(np.searchsorted(starts, starts[first] + SORTED_AT_ONCE, side="right")) - 1)
                here = slice(int(starts[first]), int(starts[last]))
                tokens, rows, scores = self._gathered(end, first, last)
                order = posting_order(tokens, rows, scores, end, by_row=self.row_of is None)
                out[0][here], out[1][here] = rows[order], scores[order]
                self._done(end, last)
                first = last

    def close(self) -> None:
        """Put the index on the disk."""
        self._flush()

    def _open(self, name: str, dtype: np.dtype) -> np.ndarray:
        with open(self.parts / name, "r+b") as file:
            if not (self.parts / name).stat().st_size:
                return np.zeros(0, dtype)
            self._maps.append(mmap.mmap(file.fileno(), 0))
        return np.frombuffer(self._maps[-1], dtype)

    def _gathered(self, end: str, first: int, last: int) -> Postings:
        """The postings of tokens first … last − 1, of all row groups one after another."""
        found: list[tuple[np.ndarray, ...]] = []
        for start, stop in zip(self.groups, self.groups[1:], strict=False):
            low, high = start + np.searchsorted(self.loose[end][0][start:stop], [first, last])
            found.append(tuple(piece[low:high] for piece in self.loose[end]))
        tokens, rows, scores = map(np.concatenate, zip(*found, strict=True))
        return tokens, rows, scores

    def _write_rows(self, table: pa.Table, rows: np.ndarray) -> None:
        dtype, names = self.layout.record, table.column_names
        records = np.zeros(table.num_rows, dtype)
        for name in dtype.names or ():
            column = table["layer_energy_scores" if name == "layer_energy" else name].combine_chunks()
            while not hasattr(column, "to_numpy") or str(column.type).startswith("list"):
                column = column.flatten()
            records[name] = column.to_numpy(zero_copy_only=False).reshape(records[name].shape)
        self.view("rows")[rows] = records.view(np.uint8).reshape(len(rows), dtype.itemsize)
        for name in statistics_of(names):
            self.view(f"column:{name}")[rows] = table[name].to_numpy()
        if "transition" in names:
            codes = {text: i for i, text in enumerate(self.layout.choices)}
            self.view("choices")[rows] = [codes[text] for text in table["transition"].to_pylist()]

    def _done(self, what: str, upto: int) -> None:
        self.note[what] = upto
        if time.monotonic() >= self._next_note:
            self._flush()
            write_whole(self.parts / "note.json", json.dumps(self.note))
            self._next_note = time.monotonic() + SECONDS_A_NOTE
        for mapped in self._maps if hasattr(mmap, "MADV_DONTNEED") else ():
            mapped.madvise(mmap.MADV_DONTNEED)  # the pages stay with the system; this process gives them back

    def _flush(self) -> None:
        for mapped in self._maps:
            mapped.flush()


def posting_order(tokens: np.ndarray, rows: np.ndarray, scores: np.ndarray, end: str, *, by_row: bool) -> np.ndarray:
    """The order by token, then score (top: the largest first), then row. ``by_row``: rows ascend within each token."""
    if scores.dtype == np.float32 and by_row:
        # One stable sort of integers: the token, then the bits of the score in an order that is that of the numbers.
        bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 and 0.0 are equal scores
        ascending = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
        keys = tokens.astype(np.uint64) << np.uint64(32) | (~ascending if end == "top" else ascending)
        return np.argsort(keys, kind="stable")
    return np.lexsort((rows, -scores if end == "top" else scores, tokens))
