"""What digests cost: writing and reading the signatures of a million features with them and without.

    python -m bench.faults.cost [--features 1000000] [--repeat 5] [--out FILE.json]

Times are of the files alone (parts, their join, reading all of the result), not of computing what is in them, which
takes hundreds of times as long. Both ways take turns; the ratio is of the medians.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.machine import machine
from bench.record import save
from bench.timing import quantiles
from querylens_fast.lens.parquet import _OPTIONS, ROW_GROUP
from querylens_fast.runs import part_writer
from querylens_fast.runs.sealed_parquet import CheckedFile, opened

BLOCK, K, VOCABULARY = 1 << 14, 25, 50_257


def block(start: int, n: int) -> pa.Table:
    """Rows as `signatures` writes them: ids, scores and strings of both sides."""
    draw = torch.Generator().manual_seed(start)
    words = pa.array([f" w{i}" for i in range(VOCABULARY)])
    offsets = pa.array(range(0, n * K + 1, K), pa.int32())
    columns: dict[str, Any] = {
        "feature_index": pa.array(range(start, start + n)),
        "layer": pa.array([3] * n, pa.int32()),
    }
    columns["feature"] = columns["feature_index"]
    for side in ("top", "bottom"):
        ids = pa.array(torch.randint(VOCABULARY, (n * K,), generator=draw, dtype=torch.int32).numpy())
        scores = pa.array(torch.randn(n * K, generator=draw).numpy())
        for name, values in (("ids", ids), ("scores", scores), ("tokens", words.take(ids))):
            columns[f"{side}_{name}"] = pa.ListArray.from_arrays(offsets, values)
    return pa.table(columns)


@contextmanager
def without_digests() -> Iterator[None]:
    """Part files as pyarrow alone writes and reads them."""
    before = part_writer.write_sealed, part_writer.read_checked

    def write(
        path: Path, tables: Any, schema: pa.Schema, options: dict[str, Any], row_group: Any = None, part: bool = False
    ) -> int:
        rows = 0
        with pq.ParquetWriter(path, schema, **options) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), row_group_size=row_group)
                rows += table.num_rows
        return rows

    def read(path: Path) -> CheckedFile:
        return CheckedFile(path, path.read_bytes(), pq.read_metadata(path))

    part_writer.write_sealed, part_writer.read_checked = write, read
    try:
        yield
    finally:
        part_writer.write_sealed, part_writer.read_checked = before


def write(path: Path, tables: dict[int, pa.Table], n: int) -> None:
    writer = part_writer.PartWriter(path, {"what": "cost"}, parquet_options=_OPTIONS, row_group=ROW_GROUP)
    for start, table in tables.items():
        writer.write(start, table)
    writer.finish(n)


def read_plainly(path: Path) -> None:
    with pq.ParquetFile(path) as file:
        file.read()


def read_checked(path: Path) -> None:
    with opened(path) as file:
        file.read()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    kept = block(0, BLOCK)  # the same rows in each part: what is written is not what costs
    starts = range(0, options.features, BLOCK)
    tables = {start: kept.slice(0, min(BLOCK, options.features - start)) for start in starts}
    folder, times = Path(tempfile.mkdtemp(prefix="querylens-cost-")), {}

    def timed(name: str, run: Callable[[], object]) -> None:
        begun = time.perf_counter()
        run()
        times.setdefault(name, []).append(time.perf_counter() - begun)

    def sealed() -> None:
        write(folder / "sealed.parquet", tables, options.features)

    def plain() -> None:
        with without_digests():
            write(folder / "plain.parquet", tables, options.features)

    try:
        for turn in range(options.repeat):
            for path in folder.iterdir():
                path.unlink()
            both = [("write with digests", sealed), ("write without", plain)]
            for name, run in both if turn % 2 else reversed(both):
                timed(name, run)
            reading: list[tuple[str, Callable[[], object]]] = [
                ("read with digests", lambda: read_checked(folder / "sealed.parquet")),
                ("read without", lambda: read_plainly(folder / "plain.parquet")),
            ]
            read_plainly(folder / "plain.parquet")  # the first one of a process waits for its memory
            for name, run in (*reading, *reversed(reading)) if turn % 2 else (*reversed(reading), *reading):
                timed(name, run)
        mib = {path.stem: path.stat().st_size >> 20 for path in folder.iterdir()}
    finally:
        shutil.rmtree(folder)
    found = {name: quantiles([1000 * t for t in values]) for name, values in times.items()}
    medians = {name: values["p50_ms"] for name, values in found.items()}
    ratios = {do: medians[f"{do} with digests"] / medians[f"{do} without"] for do in ("write", "read")}
    print(f"{options.features} features, {mib} MiB; with digests ÷ without: {ratios}\n{found}")
    if options.out is not None:
        case = {"features": options.features, "k": K, "mib": mib, "times": found, "with digests / without": ratios}
        save(options.out, {"machine": machine(torch.device("cpu")), **case})


if __name__ == "__main__":
    main()
