"""SIGKILL at every file operation, in the middle of writes, and at random moments; then the same call again."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.faults.child import in_child
from bench.faults.workload import Job, Workload, files_of, logged, resumed

CHANGING = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "fcntl.flock"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def at_operation(work: Callable[[], object], n: int, folder: Path, counted: Path | None = None) -> Callable[[], object]:
    """``work`` that is killed before its n-th file operation in ``folder`` (0: never; their number goes to a file).

    Operations: opening to write, renaming, deleting, making and removing folders, truncating, changing modes, locking
    (by audit events), and before and after each fsync. What libraries write themselves is `at_size`'s.
    """

    def child() -> None:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
                if str(arguments[0]).startswith(str(folder)):
                    step()
            elif event in CHANGING and (event == "fcntl.flock" or str(folder) in str(arguments[0])):
                step()

        fsync = os.fsync

        def slow_fsync(descriptor: int) -> None:
            step()
            fsync(descriptor)
            step()

        os.fsync = slow_fsync
        sys.addaudithook(audit)
        work()
        if counted is not None:
            counted.write_text(str(count))

    return child


def at_size(work: Callable[[], object], size: int) -> Callable[[], object]:
    """``work`` that the system kills in the write that makes a file longer than ``size`` bytes."""

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()

    return child


def run(workload: Workload, n_kills: int, seed: int = 0, jobs: Sequence[Job] | None = None) -> dict[str, Any]:
    """Kill ``n_kills`` runs (about) and finish each: counts and every problem."""
    generator = random.Random(seed)
    jobs = workload.jobs if jobs is None else jobs
    share = max(3, n_kills // len(jobs))
    found: dict[str, Any] = {"kills": 0, "at file operations": 0, "in writes": 0, "at random": 0, "problems": []}
    lost = leftovers = 0
    start = time.monotonic()
    for job in jobs:
        for kind, kill in _plan(workload, job, max(3, int(share * job.share)), generator):
            folder, log = _fresh(workload)
            out = folder / job.file
            work, after_s = kill(lambda job=job, out=out: job.write(out), folder)
            ended = in_child(logged(work, log), after_s=after_s)
            killed = ended.code in (-signal.SIGKILL, -signal.SIGXFSZ)
            if ended.code and not killed:
                found["problems"].append(f"{job.name}, {kind}: {ended.output[-600:]}")
            found["kills"] += killed
            found[kind] += killed
            _, problems = resumed(workload, job, out, log)
            lost += sum("computed again" in problem for problem in problems)
            leftovers += sum("left over" in problem for problem in problems)
            found["problems"] += [f"{job.name}, killed {kind} ({ended.code}): {problem}" for problem in problems]
    return {**found, "lost blocks": lost, "leftovers": leftovers, "seconds": round(time.monotonic() - start, 1)}


Kill = Callable[[Callable[[], object], Path], "tuple[Callable[[], object], float | None]"]


def _plan(workload: Workload, job: Job, share: int, generator: random.Random) -> list[tuple[str, Kill]]:
    """The kills of one job: half of them at file operations, all of these where there are so few."""
    folder, _ = _fresh(workload)
    counted = workload.folder / "operations"
    took = in_child(at_operation(lambda: job.write(folder / job.file), 0, folder, counted)).seconds
    n = int(counted.read_text())
    steps = range(1, n + 1) if n <= share * 3 // 5 else sorted(generator.sample(range(1, n + 1), share * 3 // 5))
    sizes = [len(data) for data in workload.expected(job).values()]
    torn = [generator.randrange(max(sizes)) for _ in range(max(1, (share - len(steps)) // 2))]
    late = [generator.uniform(0.01, took) for _ in range(max(1, share - len(steps) - len(torn)))]

    def operation(step: int) -> Kill:
        return lambda work, folder: (at_operation(work, step, folder), None)

    def size(n_bytes: int) -> Kill:
        return lambda work, folder: (at_size(work, n_bytes), None)

    def moment(after_s: float) -> Kill:
        return lambda work, folder: (work, after_s)

    return [
        *(("at file operations", operation(step)) for step in steps),
        *(("in writes", size(n_bytes)) for n_bytes in torn),
        *(("at random", moment(after_s)) for after_s in late),
    ]


def _fresh(workload: Workload) -> tuple[Path, Path]:
    """(An empty folder, a log beside it)."""
    folder, log = workload.folder / "killed", workload.folder / "written"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    folder.mkdir()
    return folder, log


__all__ = ["at_operation", "at_size", "files_of", "run"]
