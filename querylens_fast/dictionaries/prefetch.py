"""Read-ahead: the next block of a dictionary is read from its file while the current one is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.rows import FeatureIds, Rows


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
