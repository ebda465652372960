"""Tables: what relates to what, one row a relation, in memory or streamed to Parquet.

Every product of `querylens_fast.relations` is one long table. A relation found by the streamed top-k is a row of

    source, source_layer, source_id    what was asked about: a dictionary's feature, a token of the vocabulary, …
    target, target_layer, target_id    what was found: a neuron, a head, a feature of another dictionary, a token, …
    side, rank, score                  "top" or "bottom"; 0 is the most extreme; larger scores first on top

followed by columns of the product's own. Long, not lists: a filter, a join of two products or a group-by is one line in
pandas, polars or DuckDB, and Parquet stores the repeated columns in next to nothing. Rows are sorted by source id, then
side, then rank within each target. Layers are null where a side has none (the vocabulary).

A product is a sequence of `Block`s, each of which computes its rows when called:

    def rows(ids: Tensor) -> pa.Table:
        found = streamed_topk(values[ids], W, k)
        return topk_rows(found, ids, source="sae", source_layer=3, target="unembedding", target_layer=None)

    blocks = [Block(len(ids), partial(rows, ids)) for ids in torch.arange(n).split(2048)]
    found = tabulate(blocks, {"what": "downstream", "k": k}, out="readers.parquet")
    found.table(), found.pandas(), found.metadata

With ``out`` every block becomes a part file in ``<out>.parts``, whole or not at all; a killed run called again computes
only what is missing, and the file appears under its name once it is complete. Within `processes.joined` the blocks are
shared among the processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.models.model import Model
from querylens_fast.runs import processes
from querylens_fast.runs.part_writer import PartWriter, read_identity
from querylens_fast.runs.run_lock import held, resumable
from querylens_fast.runs.sealed_parquet import opened
from querylens_fast.topk.api import TopK

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROW_GROUP = 1 << 20
"""Rows of a Parquet row group, at most."""
FORMAT = "querylens_fast.relations/1"


class Block(NamedTuple):
    """A part of a product that is computed, written and resumed as one."""

    size: int
    """Progress units: features, tokens, …"""
    compute: Callable[[], pa.Table]
    """Its rows; every block of a product gives the same columns."""


@dataclass(frozen=True)
class RelationTable:
    """A product's rows and what they are: in memory, or in the Parquet file ``path``.

    ``metadata`` holds the product's name, conventions, model, dictionaries and settings. ``len()`` counts rows.
    """

    metadata: dict[str, Any]
    path: Path | None = None
    in_memory: pa.Table | None = field(default=None, repr=False)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows as a pyarrow Table; from a file, only the columns asked for are read."""
        if self.in_memory is not None:
            return self.in_memory if columns is None else self.in_memory.select(list(columns))
        with self._open() as file:
            return file.read(None if columns is None else list(columns))

    def head(self, n: int) -> pa.Table:
        """The first n rows; from a file, no more is read than the row groups they are in."""
        if self.in_memory is not None:
            return self.in_memory.slice(0, n)
        import pyarrow as pa

        with self._open() as file:
            batches = file.iter_batches(batch_size=n) if n > 0 else ()
            return pa.Table.from_batches(islice(batches, n), file.schema_arrow).slice(0, n)

    def pandas(self) -> Any:
        """The rows as a pandas DataFrame (repeated strings as categories). Raises ImportError without pandas."""
        return self.table().to_pandas()

    def __len__(self) -> int:
        if self.in_memory is not None:
            return self.in_memory.num_rows
        with self._open() as file:
            return file.metadata.num_rows

    def _open(self) -> AbstractContextManager[pq.ParquetFile]:
        if self.path is None:
            raise ValueError("this table has neither rows nor a file")
        return opened(self.path)


def tabulate(
    blocks: Sequence[Block],
    metadata: dict[str, Any],
    *,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
    unit: str = "feature",
) -> RelationTable:
    """Compute every block and keep its rows, in memory or in a Parquet file.

    Args:
        blocks: The product, at least one block.
        metadata: What the rows are, as JSON values; ``what`` names the product. A file of other metadata is refused.
        out: A ``.parquet`` file to stream to. Peak memory is then one block's rows.
        resume: Go on from what an earlier, killed call wrote; False: refuse to touch it.
        progress: Show a progress bar; by default with ``out``.
        unit: What the bar counts.

    Raises:
        ValueError: No blocks, or out is no .parquet file.
        FileExistsError: ``out`` holds another run's result, or one of this run and resume is False.
        OSError: The disk is full; what was written stays and the run resumes.
    """
    import pyarrow as pa

    if not blocks:
        raise ValueError(f"there is nothing to compute for {metadata.get('what')!r}: no features or no targets chosen")
    metadata = json.loads(json.dumps({"format": FORMAT, **metadata, "blocks": len(blocks)}))
    show = out is not None if progress is None else progress
    own = processes.current().share(blocks) if out is not None else blocks
    hidden = not (show and processes.current().leads)
    with tqdm(total=sum(b.size for b in own), desc=metadata.get("what"), unit=unit, disable=hidden) as bar:
        if out is not None:
            return _write(blocks, metadata, Path(out), resume, bar)
        parts = []
        for block in blocks:
            parts.append(block.compute())
            bar.update(block.size)
    return RelationTable(metadata, in_memory=pa.concat_tables(parts).unify_dictionaries())


def read_table(path: str | Path) -> RelationTable:
    """A table that was written with ``out=``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no table of this package.
    """
    metadata = read_identity(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is a result of {metadata.get('preset')!r}, not a table of relations")
    return RelationTable(metadata, Path(path))


def topk_rows(
    found: TopK,
    source_ids: Tensor,
    *,
    source: str,
    source_layer: int | None,
    target: str | Categories,
    target_layer: int | Tensor | None,
    target_ids: Tensor | None = None,
    **more: Any,
) -> pa.Table:
    """The rows of a `TopK` of n sources over W's V rows.

    Args:
        found: A side that is None gives no rows.
        source_ids: [n] ids of the sources.
        source: Name of what they are, e.g. a dictionary's.
        source_layer: Their layer.
        target: Name of what was searched: one, or `Categories` of V codes where W's rows are of several.
        target_layer: Its layer: one, or [V].
        target_ids: [V] ids of W's rows, where they are not 0 … V−1.
        **more: Further columns: a str, int, float or None for all rows; or a Tensor [n] or `Categories` of n codes.
    """
    sides = {"top": (found.top_ids, found.top_scores), "bottom": (found.bottom_ids, found.bottom_scores)}
    kept = {name: (ids, scores) for name, (ids, scores) in sides.items() if ids is not None and scores is not None}
    ids = torch.stack([ids.cpu() for ids, _ in kept.values()], 1)
    scores = torch.stack([scores.cpu() for _, scores in kept.values()], 1)
    n, _, k = ids.shape
    repeats, columns = len(kept) * k, ids.flatten()
    return rows(
        n * repeats,
        source=source,
        source_layer=source_layer,
        source_id=source_ids.cpu().repeat_interleave(repeats),
        target=target[columns] if isinstance(target, Categories) else target,
        target_layer=target_layer[columns] if isinstance(target_layer, Tensor) else target_layer,
        target_id=columns if target_ids is None else target_ids.cpu()[columns],
        side=Categories(list(kept), torch.arange(len(kept)).repeat_interleave(k).repeat(n)),
        rank=torch.arange(k, dtype=torch.int32).repeat(n * len(kept)),
        score=scores.flatten(),
        **{name: _for_each(value, repeats) for name, value in more.items()},
    )


@dataclass(frozen=True)
class Categories:
    """A column of strings that repeat: names[codes], codes an int64 Tensor [n]."""

    names: Sequence[str]
    codes: Tensor

    def __getitem__(self, at: Tensor) -> Categories:
        return Categories(self.names, self.codes[at])

    def repeat_interleave(self, repeats: int) -> Categories:
        return Categories(self.names, self.codes.repeat_interleave(repeats))


Column = Tensor | Categories | Sequence[str] | str | int | float | None


def rows(n: int, **columns: Column) -> pa.Table:
    """A table of n rows: of each column a Tensor [n], `Categories`, a list of strings, or one value for all rows.

    Columns that are layers (their name ends in "layer") are int32 and may be None; other integers are int64.
    """
    import pyarrow as pa

    return pa.table({name: _column(name, value, n) for name, value in columns.items()})


def identity_of(model: Model, **settings: Any) -> dict[str, Any]:
    """Metadata that every product on a model has: the model and its convention, then the product's settings."""
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "convention": model.convention,
        **settings,
    }


def digest_of(ids: Tensor) -> str:
    """A digest of chosen ids [n], for metadata."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def _column(name: str, value: Column, n: int) -> pa.Array:
    import pyarrow as pa

    strings = pa.dictionary(pa.int32(), pa.string())
    if isinstance(value, Categories):
        # Names may repeat (byte tokens that print alike, dictionaries of one name); categories may not.
        unique = {name: place for place, name in enumerate(dict.fromkeys(value.names))}
        places = torch.tensor([unique[name] for name in value.names], dtype=torch.int32)
        codes = pa.array(places[value.codes.cpu()].numpy())
        return pa.DictionaryArray.from_arrays(codes, pa.array(list(unique), pa.string()))
    if isinstance(value, str):
        codes = pa.array(torch.zeros(n, dtype=torch.int32).numpy())
        return pa.DictionaryArray.from_arrays(codes, pa.array([value], pa.string()))
    if name.endswith("layer"):
        layers = value.cpu().numpy() if isinstance(value, Tensor) else [value] * n
        return pa.array(layers, pa.int32())
    if isinstance(value, Tensor):
        return pa.array(value.detach().cpu().numpy())
    if value is None or isinstance(value, (int, float)):
        return pa.array([value] * n, pa.int64() if isinstance(value, int) else pa.float64())
    return pa.array(list(value), pa.string()).cast(strings)


def _for_each(value: Any, repeats: int) -> Any:
    return value.repeat_interleave(repeats) if isinstance(value, (Tensor, Categories)) else value


def _write(blocks: Sequence[Block], metadata: dict[str, Any], out: Path, resume: bool, bar: tqdm[Any]) -> RelationTable:
    if out.suffix != ".parquet":
        raise ValueError(f"out is {str(out)!r}; expected a .parquet file")
    group = processes.current()
    group.agree("the table", metadata)
    with ExitStack() as stack:
        if group.leads:
            stack.enter_context(held(out))
        stack.enter_context(resumable(out))
        with group.in_turn("open"):
            writer = PartWriter(out, metadata, row_group=ROW_GROUP, resume=resume)
        for i, block in group.share(list(enumerate(blocks))):
            if not writer.done(i):
                writer.write(i, block.compute())
            bar.update(block.size)
            group.check()
        group.wait("written")
        path = writer.finish(n_parts=len(blocks)) if group.leads else out
        group.wait("finished")
        return RelationTable(metadata, path)
