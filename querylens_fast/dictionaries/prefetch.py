"""Prefetch: read the next block of a dictionary's vectors from its file while the current block is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.rows import FeatureIds, Rows


def prefetch(
    dictionary: Dictionary, side: str, blocks: Sequence[Tensor], *, pin: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, vectors [m, D]) for each block of feature ids, in order.

    While the caller works on one block, a background thread reads the next, so at most two blocks are in memory.

    Args:
        dictionary: Where the vectors come from.
        side: "value" or "key".
        blocks: Feature ids, int64 [m] each.
        pin: Copy each block to page-locked memory, from where a GPU copies it faster.

    Raises:
        ValueError: The dictionary has no such side, or a vector of the block holds NaN or inf.
        OSError: The file cannot be read. Errors are raised when their block is asked for.
    """

    def read(ids: Tensor) -> Tensor:
        vectors = dictionary.vectors(side, ids)
        return vectors.pin_memory() if pin and vectors.device.type == "cpu" else vectors

    with ThreadPoolExecutor(1, "prefetch") as reader:
        waiting: Future[Tensor] | None = None
        try:
            for i, ids in enumerate(blocks):
                vectors = read(ids) if waiting is None else waiting.result()
                waiting = reader.submit(read, blocks[i + 1]) if i + 1 < len(blocks) else None
                yield ids, vectors
                del vectors
        finally:
            if waiting is not None:
                waiting.cancel()


class ReadAhead:
    """Rows of which blocks are read in a known order, each in the background while the one before it is used.

    Holds two blocks at most: the current one, which may be read again at no cost, and the next. Other rows than those
    are read at once. An error of the background read is raised when its block is asked for.
    """

    def __init__(self, rows: Rows, blocks: Sequence[Tensor], reader: ThreadPoolExecutor, pin: bool = False) -> None:
        self.rows, self.blocks, self.reader, self.pin = rows, blocks, reader, pin
        self.at = -1
        self.current: Tensor | None = None
        self.next: Future[Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    def read(self, ids: FeatureIds) -> Tensor:
        """Rows [m, D] of ids. Raises what the rows' own reading raises."""
        if self.current is not None and self._is_block(self.at, ids):
            return self.current
        if not self._is_block(self.at + 1, ids):
            return self.rows.read(ids)
        self.at, self.current = self.at + 1, None
        self.current = self._load(self.at) if self.next is None else self.next.result()
        more = self.at + 1 < len(self.blocks)
        self.next = self.reader.submit(self._load, self.at + 1) if more else None
        return self.current

    def __str__(self) -> str:
        return str(self.rows)

    def _is_block(self, at: int, ids: FeatureIds) -> bool:
        return at < len(self.blocks) and isinstance(ids, Tensor) and torch.equal(self.blocks[at], ids)

    def _load(self, at: int) -> Tensor:
        found = self.rows.read(self.blocks[at])
        return found.pin_memory() if self.pin and found.device.type == "cpu" else found


@contextmanager
def read_ahead(
    dictionary: Dictionary, side: str, blocks: Sequence[Tensor], device: torch.device
) -> Iterator[Dictionary]:
    """The dictionary, one side of it read ahead by blocks of feature ids; page-locked where the device is a GPU."""
    name = "value_rows" if side == "value" else "key_rows"
    rows: Rows | None = getattr(dictionary, name)
    if rows is None:
        yield dictionary
        return
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        ahead = ReadAhead(rows, blocks, reader, pin=device.type == "cuda")
        try:
            yield replace(dictionary, **{name: ahead})
        finally:
            reader.shutdown(cancel_futures=True)
            ahead.blocks, ahead.current, ahead.next = (), None, None
