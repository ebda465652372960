"""A piece of work in a forked process: killed, starved or fed, without paying for the imports again."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import torch
from tqdm import tqdm

LIMIT_S = 20.0
POLL_S = 0.002
RAISED = 70
"""Exit code of work that raised an exception."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    code: int
    """Its exit code; -signal when it was killed."""
    output: str
    """stdout and stderr."""
    seconds: float
    grown_mib: float
    """Peak resident memory over what it began with."""
    hung: bool


def in_child(
    work: Callable[[], object],
    *,
    limit_s: float = LIMIT_S,
    answers: str = "",
    after_s: float | None = None,
    after_signal: int = signal.SIGKILL,
) -> Outcome:
    """Run ``work`` in a forked process whose output is kept.

    Args:
        work: Its SystemExit is the exit code, another exception is printed and gives `RAISED`.
        limit_s: It is killed after this, which counts as a hang.
        answers: What lies on its stdin.
        after_s: Send ``after_signal`` after this many seconds.
        after_signal: SIGKILL, or what the child may take notice of.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as stdin:
        stdin.write(answers.encode())
        stdin.seek(0)
        sys.stdout.flush(), sys.stderr.flush()
        start, begun = time.monotonic(), mmap.mmap(-1, 8)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the work takes notice of it
        child = os.fork()
        if child:
            signal.signal(signal.SIGINT, before)
        else:
            # Not the parent's: pages of mapped files are not copied by a fork.
            begun[:8] = _peak_kib().to_bytes(8, "little")
            _run(work, stdin, output, limit_s)
        code, usage, hung = None, None, False
        while code is None:
            ended, status, usage = os.wait4(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            spent = time.monotonic() - start
            if after_s is not None and spent > after_s:
                os.kill(child, after_signal)
                after_s = None
            if spent > limit_s:
                hung = True
                os.kill(child, signal.SIGKILL)
            time.sleep(POLL_S)
        seconds = time.monotonic() - start
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    grown = 0.0 if usage is None else max(0, usage.ru_maxrss - int.from_bytes(begun[:8], "little")) / 1024
    return Outcome(code, text, seconds, grown, hung)


def _run(work: Callable[[], object], stdin: IO[bytes], output: IO[bytes], limit_s: float) -> None:
    code = RAISED
    try:
        torch.set_num_threads(1)  # makes torch's pool anew: a thread of ours may not find that of before the fork
        tqdm.set_lock(threading.RLock())  # its own is shared by processes: a killed one would keep it
        faulthandler.dump_traceback_later(0.9 * limit_s, file=output)  # of a hang
        for stream, target in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(stream.fileno(), target)
        sys.stdout, sys.stderr = (open(target, "w", closefd=False) for target in (1, 2))
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(code)


def _peak_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
