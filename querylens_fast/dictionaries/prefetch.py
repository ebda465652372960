"""Prefetch: read the next block of a dictionary's vectors from its file while the current block is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary


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
