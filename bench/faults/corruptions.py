"""Files that changed since they were written: flipped bits, cut, zeroed, swapped, replaced, edited."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import querylens_fast as ql
from bench.faults.child import RAISED, in_child
from bench.faults.workload import Job, Workload, files_of
from querylens_fast.evaluation.feature_sample import load_feature_sample

Change = Callable[[bytes, random.Random], bytes]
CHANGES: dict[str, Change] = {
    "a bit flipped": lambda data, draw: _flipped(data, draw.randrange(8 * len(data))),
    "cut off": lambda data, draw: data[: draw.randrange(len(data))],
    "a block zeroed": lambda data, draw: _zeroed(data, draw.randrange(len(data)), 64),
    "bytes moved": lambda data, draw: _moved(data, draw.randrange(len(data) // 2), 16),
    "longer": lambda data, draw: data + bytes(draw.randrange(1, 64)),
}
"""What happens to a file's bytes; bits are flipped ten times as often as the rest."""
DRAWN = ["a bit flipped"] * 10 + [name for name in CHANGES if name != "a bit flipped"]


def run(workload: Workload, n: int, seed: int = 0) -> dict[str, Any]:
    """Damage files ``n`` times: those of finished results, which are read, and of stopped ones, which are resumed."""
    draw = random.Random(seed)
    found: dict[str, Any] = {"corruptions": 0, "by": {}, "harmless": 0, "problems": []}
    start = time.monotonic()
    readers = [(job, reader) for job, reader in _readers(workload)]
    for i in range(n * 3 // 4):
        job, read = readers[i % len(readers)]
        _count(found, *_finished(workload, job, read, draw))
    for i in range(n - n * 3 // 4):
        job = workload.job(("signatures, Parquet", "signatures, JSON lines", "a relation")[i % 3])
        _count(found, *_stopped(workload, job, draw))
    return {**found, "silent": len(found["problems"]), "seconds": round(time.monotonic() - start, 1)}


def _count(found: dict[str, Any], name: str, problem: str | None) -> None:
    found["corruptions"] += 1
    found["by"][name] = found["by"].get(name, 0) + 1
    if problem:
        found["problems"].append(f"{name}: {problem}")


def _readers(workload: Workload) -> list[tuple[Job, Callable[[Path], object]]]:
    """How a finished result of each job is read."""

    def rows(path: Path) -> object:
        return ql.search(path, 5), ql.show(path, 3)

    readers: dict[str, Callable[[Path], object]] = {
        "signatures, Parquet": rows,
        "signatures, JSON lines": rows,
        "a relation": lambda path: ql.read_table(path).table(),
        "a transport": ql.load_transport,
        "a token sample": ql.load_tokens,
        "a feature sample": load_feature_sample,
    }
    return [(workload.job(name), read) for name, read in readers.items()]


def _finished(
    workload: Workload, job: Job, read: Callable[[Path], object], draw: random.Random
) -> tuple[str, str | None]:
    """Damage one file of a finished result: `verify` and every reader have to notice, by an error that names it."""
    folder = _copy(workload, job)
    target = folder / draw.choice([name for name in files_of(folder)])
    before, name = target.read_bytes(), draw.choice(DRAWN)
    target.write_bytes(CHANGES[name](before, draw))
    what = f"{job.name}, {target.suffix}, {name}"
    if target.read_bytes() == before:
        target.write_bytes(_flipped(before, draw.randrange(8 * len(before))))
    path = folder / job.file

    def look() -> None:
        found = ql.verify(path)
        if not found or folder.name not in found[0]:
            raise AssertionError(f"verify says {found}")
        try:
            read(path)
        except ValueError as error:
            if folder.name not in str(error):
                raise AssertionError(f"the error does not name the file: {error}") from error
        else:
            if job.file.endswith((".safetensors", ".jsonl")):
                raise AssertionError("it is read as if nothing had happened")

    ended = in_child(look)
    return what, None if ended.code == 0 else f"exit {ended.code}: {ended.output.strip()[-500:]}"


def _stopped(workload: Workload, job: Job, draw: random.Random) -> tuple[str, str | None]:
    """Damage what a stopped run left, then run it again: the result is the unbroken run's, or an error names a file."""
    folder = workload.folder / "stopped"
    kept = workload.folder / "stopped_before" / job.name.replace(" ", "_")
    if not kept.exists():
        _stop(workload, job, kept)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    name = draw.choice([*CHANGES, *BETWEEN])
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    target = draw.choice(files)
    if name in CHANGES:
        target.write_bytes(CHANGES[name](target.read_bytes(), draw))
    else:
        BETWEEN[name](target, draw.choice(files))
    what = f"stopped: {job.name}, {'record' if target.suffix == '.json' else 'rows'}, {name}"
    ended = in_child(lambda: job.write(folder / job.file))
    if ended.code == RAISED and folder.name in ended.output.splitlines()[-1]:
        return what, None  # an error that names the file and what to do
    if ended.code:
        return what, f"exit {ended.code}: {ended.output.strip()[-500:]}"
    if files_of(folder) != workload.expected(job):
        return what, "the result is not the unbroken run's"
    return what, None


def _swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


BETWEEN: dict[str, Callable[[Path, Path], object]] = {
    "swapped with another": _swap,
    "replaced by another": lambda target, other: target.write_bytes(other.read_bytes()),
    "edited": lambda target, other: _edited(target),
    "deleted": lambda target, other: target.unlink(),
}


def _edited(path: Path) -> None:
    """Change a number in a file and write it again as a careful editor would."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        table = pq.read_table(path)
        place = table.column_names.index("feature" if "feature" in table.column_names else "source_id")
        pq.write_table(table.set_column(place, table.field(place), pa.array([7] * len(table))), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "k": 5}))
    else:
        lines = path.read_text().splitlines()
        row = json.loads(lines[0])
        row["top_scores"][0] += 1
        path.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")


def _stop(workload: Workload, job: Job, folder: Path) -> None:
    """What a run leaves that is stopped after its fourth block."""
    from querylens_fast.lens.jsonl import JsonlSink
    from querylens_fast.runs.part_writer import PartWriter

    folder.mkdir(parents=True)

    def work() -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        PartWriter.finish = JsonlSink.finish = stop  # type: ignore[assignment,method-assign]
        job.write(folder / job.file)

    in_child(work)
    for part in sorted(folder.rglob("part-*"))[4:]:
        part.unlink()
    for rows in folder.rglob("*.jsonl"):
        rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:40]))


def _copy(workload: Workload, job: Job) -> Path:
    folder = workload.folder / "corrupted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in workload.expected(job).items():
        (folder / name).write_bytes(data)
    return folder


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _zeroed(data: bytes, start: int, n: int) -> bytes:
    stop = min(start + n, len(data))
    return data[:start] + bytes(stop - start) + data[stop:]


def _moved(data: bytes, start: int, n: int) -> bytes:
    return data[:start] + data[start + n : start + 2 * n] + data[start : start + n] + data[start + 2 * n :]
