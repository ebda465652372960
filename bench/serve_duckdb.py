"""The look-ups of a search page and of a feature page, in DuckDB and in the index of `querylens_fast.queries`."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

THREADS, ROWS = 16, 25
Lookups = dict[str, Callable[[int, list[int]], object]]
"""Functions of (a token, features)."""


def duckdb(result: Path) -> tuple[Path, Lookups]:
    """Rows with an index on the feature; postings sorted by token, then score."""
    import duckdb

    path, source = result.with_suffix(".duckdb"), f"read_parquet('{result}')"
    path.unlink(missing_ok=True)
    db = duckdb.connect(str(path), config={"memory_limit": "400MB", "threads": 1})
    columns = "feature::int as feature, top_ids, top_scores, bottom_ids, bottom_scores, rel_var, rel_var_se"
    db.execute(f"create table signatures as select {columns} from {source} order by feature")
    for end, order in (("top", "desc"), ("bottom", "asc")):
        unnested = f"unnest({end}_ids) as token, unnest({end}_scores) as score, feature::int as feature"
        ordered = f"order by token, score {order}, feature"
        db.execute(f"create table {end} as select * from (select {unnested} from {source}) {ordered}")
    db.execute("create index by_feature on signatures(feature)")
    db.execute("checkpoint")

    def ask(query: str, *values: object) -> list[Any]:
        return db.cursor().execute(query, values).fetchall()

    heads = "select feature, top_ids[1:8] from signatures where feature in "
    return path, {
        "token": lambda token, _: ask("select feature, score from top where token = ? limit 26", token),
        "25 rows": lambda _, ids: ask(f"{heads} ({','.join(map(str, ids))})"),
        "feature": lambda _, ids: ask("select * from signatures where feature = ?", ids[0]),
    }


def own(result: Path) -> tuple[Path, Lookups]:
    """The index that the server makes."""
    from querylens_fast.queries import build, files, index

    path = build.build_index(files.open_file(result))
    rows = index.Index(path)
    return path, {
        "token": lambda token, _: [part.tolist() for part in rows.postings(token, "top", limit=26)],
        "25 rows": lambda _, ids: [rows.ids(i, "top")[:8] for i in ids],
        "feature": lambda _, ids: rows.record(ids[0]),
    }


def compare(result: Path, n: int, tokens: Sequence[int]) -> dict[str, Any]:
    """Build time, memory and size of both, and times of their look-ups, each in a process of its own."""
    result.with_name(result.name + ".index").unlink(missing_ok=True)
    found = {}
    for make in (duckdb, own):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[make.__name__] = pool.submit(_measured, make, result, n, tokens).result()
    return found


def _measured(make: Callable[[Path], tuple[Path, Lookups]], result: Path, n: int, tokens: Sequence[int]) -> Any:
    start, draw = time.perf_counter(), random.Random(1)
    path, lookups = make(result)
    record: dict[str, Any] = {"build_s": time.perf_counter() - start, "mib": path.stat().st_size / 2**20}
    record["build_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, lookup in lookups.items():
        asked, used = [(token, draw.sample(range(n), ROWS)) for token in tokens], time.process_time()

        def timed(one: Any, lookup: Any = lookup) -> float:
            begin = time.perf_counter()
            lookup(*one)
            return 1000 * (time.perf_counter() - begin)

        with ThreadPoolExecutor(THREADS) as pool:
            times = sorted(pool.map(timed, asked))
        cpu = 1000 * (time.process_time() - used) / len(asked)
        record[name] = {"cpu_ms": cpu, "p50_ms": times[len(times) // 2], "p99_ms": times[int(0.99 * len(times))]}
    return record
