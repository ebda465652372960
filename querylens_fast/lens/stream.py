"""The one loop: blocks of features go through their lens, into memory or into a resumable result file.

Each block is read from the dictionary's file while the one before it is computed. Within `processes.joined` the blocks
of a result are shared among the processes, on any number of which the run resumes; the file is byte for byte
that of one process, and has to lie where all of them can write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.prefetch import prefetch
from querylens_fast.lens.options import LensOptions
from querylens_fast.lens.pipeline import Pipeline
from querylens_fast.lens.results import Signatures
from querylens_fast.lens.storage import Sink, StoredSignatures, format_of, open_sink
from querylens_fast.runs import processes
from querylens_fast.runs.run_lock import held, resumable
from querylens_fast.transport.jacobians import batches as slices


class Batch(NamedTuple):
    """Features of one dictionary, as they follow each other in a result."""

    pipeline: Pipeline
    ids: Tensor
    names: list[str] | None = None
    """The feature_str of each; None: by the dictionary's kind, size and layer."""


class _Block(NamedTuple):
    """Rows of a result: those of one batch whose indices in the result are ``indices``."""

    batch: Batch
    start: int
    """Of the batch in the result."""
    indices: Sequence[int]

    @property
    def rows(self) -> list[int]:
        return [i - self.start for i in self.indices]


def computed(pipeline: Pipeline, blocks: Sequence[Tensor]) -> Iterator[Signatures]:
    """The signatures of each block of feature ids in turn."""
    if not pipeline.transition.reads_vectors:
        yield from (pipeline(*pipeline.read(ids)) for ids in blocks)
        return
    pin = pipeline.model.device.type == "cuda"
    for ids, vectors in prefetch(pipeline.dictionary, pipeline.preset.feature_vector, blocks, pin=pin):
        yield pipeline(ids, vectors)


def write(
    batches: Sequence[Batch],
    out: str | Path,
    identity: dict[str, Any],
    options: LensOptions,
    *,
    block_rows: int,
    beside: Callable[[], None],
) -> StoredSignatures:
    """Stream batches to a result file; of a result that was begun, only what is missing.

    Args:
        batches: Their features, in the order of the result.
        out: The file.
        identity: What tells this run from another.
        options: format, resume, token_strings and progress are read.
        block_rows: Features computed at a time.
        beside: Writes what belongs beside the result; called once it is known to be this run's.

    Raises:
        ValueError: Nothing to write.
        FileExistsError: ``out`` holds the result of another run.
        OSError: The disk is full; what was written stays and the run resumes.
    """
    group, path = processes.current(), Path(out)
    first, n = batches[0].pipeline, sum(len(batch.ids) for batch in batches)
    kind = format_of(path, options.format)
    group.agree("the run", identity)
    with ExitStack() as stack:
        if group.leads:
            stack.enter_context(held(path))
        with group.in_turn("open"):
            sink = open_sink(
                path, kind, identity, resume=options.resume, token_strings=options.token_strings, model=first.model
            )
        stack.enter_context(resumable(path))
        if group.leads:
            beside()
        _fill(sink, batches, block_rows, options.progress is not False)
        group.wait("written")
        if group.leads:
            sink.finish(n)
        group.wait("finished")
        return StoredSignatures(path, n, kind)


def _fill(sink: Sink, batches: Sequence[Batch], block_rows: int, progress: bool) -> None:
    """Compute and write this process's share of the missing blocks."""
    group = processes.current()
    blocks = group.share(list(_blocks(batches, block_rows)))
    missing = [block._replace(indices=left) for block in blocks if (left := sink.pending(_slice(block)))]
    total, left = (sum(len(block.indices) for block in some) for some in (blocks, missing))
    with progress_bar(batches[0].pipeline, total, total - left, progress and group.leads) as bar:
        for _, several in groupby(missing, key=lambda block: block.start):
            own = list(several)
            batch = own[0].batch
            ids = [batch.ids[torch.tensor(block.rows)] for block in own]
            for block, found in zip(own, computed(batch.pipeline, ids), strict=True):
                names = None if batch.names is None else [batch.names[i] for i in block.rows]
                sink.write(found, block.indices, names)
                bar.update(len(found))
                group.check()


def _blocks(batches: Sequence[Batch], block_rows: int) -> Iterator[_Block]:
    start = 0
    for batch in batches:
        for rows in slices(len(batch.ids), block_rows):
            yield _Block(batch, start, range(start + rows.start, start + rows.stop))
        start += len(batch.ids)


def _slice(block: _Block) -> slice:
    return slice(block.indices[0], block.indices[-1] + 1)


def progress_bar(pipeline: Pipeline, total: int, n_done: int, show: bool) -> tqdm[Any]:
    """A bar over features that begins where an earlier run stopped."""
    label = f"{pipeline.preset.name} layer {pipeline.dictionary.layer}"
    return tqdm(total=total, initial=n_done, desc=label, unit="feature", disable=not show)
