"""Disks that are full: the error names the file, what was written stays, and with room the same call goes on."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.faults.child import RAISED, in_child
from bench.faults.workload import Job, Workload, logged, resumed

PAGE = 4096


def run(workload: Workload, n_disks: int, seed: int = 0, jobs: Sequence[Job] | None = None) -> dict[str, Any]:
    """Fill ``n_disks`` disks (about), at sizes over the whole run of each job, and finish each: counts and problems."""
    found: dict[str, Any] = {"full disks": 0, "by": {}, "problems": []}
    jobs, folder = workload.jobs if jobs is None else jobs, workload.folder / "disk"
    start, share = time.monotonic(), max(1, -(-n_disks // len(jobs)))
    mounted = _can_mount(folder)
    for job in jobs:
        sizes = [(_tmpfs, size) for size in _sizes(workload, job, -(-share // 2))] if mounted else []
        sizes += [(_limit, size) for size in _lengths(workload, job, share - len(sizes))]
        for kind, size in sizes:
            with kind(folder, size) as (limited, relieve):
                out, log = folder / job.file, workload.folder / "written"
                log.unlink(missing_ok=True)
                ended = in_child(limited(logged(lambda job=job, out=out: job.write(out), log)))
                if not ended.code:
                    continue  # there was room
                found["full disks"] += 1
                found["by"][kind.__name__[1:]] = found["by"].get(kind.__name__[1:], 0) + 1
                said = ended.output.strip().splitlines()[-1] if ended.output.strip() else ""
                if ended.code != RAISED or "OSError" not in said or not any(e in said for e in _SAID):
                    found["problems"].append(f"{job.name}, {size} bytes: exit {ended.code}, {ended.output[:900]}")
                relieve()
                _, problems = resumed(workload, job, out, log)
                found["problems"] += [f"{job.name}, {size} bytes: {problem}" for problem in problems]
    return {**found, "seconds": round(time.monotonic() - start, 1)}


_SAID = ("No space left on device", "File too large")
Limited = Callable[[Callable[[], object]], Callable[[], object]]


def _sizes(workload: Workload, job: Job, n: int) -> list[int]:
    """Whole pages from none to what the job needs in the end."""
    total = sum(-(-len(data) // PAGE) + 1 for data in workload.expected(job).values())
    return sorted({PAGE * max(1, round(total * (i + 0.5) / n)) for i in range(n)})


def _lengths(workload: Workload, job: Job, n: int) -> list[int]:
    """Lengths in bytes from none to that of the job's longest file."""
    longest = max(map(len, workload.expected(job).values()))
    return sorted({int(longest * (i + 0.5) / n) for i in range(n)})


def _can_mount(folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


@contextmanager
def _tmpfs(folder: Path, size: int) -> Iterator[tuple[Limited, Callable[[], object]]]:
    """A file system of ``size`` bytes (mounting one needs root)."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield (
            lambda work: work,
            lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True),
        )
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def _limit(folder: Path, size: int) -> Iterator[tuple[Limited, Callable[[], object]]]:
    """No file longer than ``size`` bytes; stands for a disk that is full at any byte."""

    def limited(work: Callable[[], object]) -> Callable[[], object]:
        def child() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
            try:
                work()
            finally:  # what it says goes into a file, too
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        return child

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield limited, lambda: None
