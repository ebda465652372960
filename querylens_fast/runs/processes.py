"""Ranks: several processes of one run, as `torchrun` starts them.

    torchrun --nproc_per_node=4 -m querylens_fast signatures sae_layer6 gpt2 --transport t.safetensors

A transport's sequences and a dictionary's blocks of features are dealt out to the processes; sums are added up over
them, and rank 0 puts the files together. Processes meet only at the end of such a step, so each looks after the others
while it works: every rank leaves a sign of life with the rendezvous each second, and one that is silent for `GRACE_S`
or says that it failed stops the others with a `RankStopped` that names it. What was written stays, and the same command
goes on from there, with as many processes as one likes.

On GPUs sums go over NCCL, each process on the device of its LOCAL_RANK; on CPUs over gloo.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

GRACE_S = 10.0
"""Seconds of silence after which a process counts as dead."""
BEAT_S = 1.0
POLL_S = 0.05
COLLECTIVE_POLL_S = 0.001
NOTICE_S = 20.0
"""Seconds after which a process says for whom it waits."""
_KEPT = "signatures that were written are kept, start the same command again to go on from there"

T = TypeVar("T")
logger = logging.getLogger(__name__)


class RankStopped(RuntimeError):
    """Another process of the run has died or failed; the message names its rank."""

    said = ""
    """What that process says itself, where it could."""


def said_elsewhere(error: BaseException) -> bool:
    """Has another process of the run on this machine said the same, so that it need not be said again?"""
    return getattr(error, "_said_elsewhere", False)


class Ranks:
    """One process of a run. This class is a run of one process, which shares with nobody and waits for nobody."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Is this the process that shows progress, prints, and puts files together?"""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: every ``size``-th, from its rank on."""
        return list(items[self.rank :: self.size])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place on each."""
        return tensor

    def check(self) -> None:
        """Raise `RankStopped` if another process has died or failed."""

    def agree(self, what: str, settings: dict[str, Any]) -> None:
        """Raise ValueError unless every process has these settings (JSON values)."""

    def wait(self, step: str) -> None:
        """Wait until every process has come to this step, raising `RankStopped` if one never will."""

    @contextmanager
    def in_turn(self, step: str) -> Iterator[None]:
        """One process after the other, by rank."""
        yield

    def device(self, device: str) -> str:
        """The device of this process: "cuda" becomes its own."""
        return device


class _Joined(Ranks):
    """One of several processes, which meet through torch.distributed."""

    def __init__(self, rank: int, size: int, store: Any, grace_s: float) -> None:
        import torch.distributed as dist

        self.rank, self.size, self.grace_s = rank, size, grace_s
        self._others = [other for other in range(size) if other != rank]
        self._store = dist.PrefixStore("querylens_fast", store)
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stopped: RankStopped | None = None
        self._unanswered = False
        self._steps: dict[str, int] = {}
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, name="sign of life", daemon=True)
        self._watch.start()

    def sum_(self, tensor: Tensor) -> Tensor:
        import torch.distributed as dist

        self._together("sum", lambda: dist.all_reduce(tensor, async_op=True))
        return tensor

    def check(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def agree(self, what: str, settings: dict[str, Any]) -> None:
        self._ask(lambda: self._store.set(f"agree/{what}/{self.rank}", json.dumps(settings)))
        self.wait(f"agree/{what}")
        first = json.loads(self._ask(lambda: self._store.get(f"agree/{what}/0")))
        mine = json.loads(json.dumps(settings))
        changed = sorted(key for key in first.keys() | mine.keys() if first.get(key) != mine.get(key))
        if changed:
            raise ValueError(
                f"rank {self.rank} of {self.size} was started with other arguments than rank 0 for {what} "
                f"(different: {', '.join(changed)}); all processes have to make the same call"
            )
        # Nobody says anything else under this name before all have heard this.
        self.wait(f"agreed/{what}")

    def wait(self, step: str) -> None:
        self._steps[step] = self._steps.get(step, 0) + 1
        name = f"{step}/{self._steps[step]}"
        self._ask(lambda: self._store.set(f"{name}/{self.rank}", "here"))
        missing, said = self._others, time.monotonic()
        while missing:
            missing = [r for r in missing if not self._ask(lambda r=r: self._store.check([f"{name}/{r}"]))]
            if missing:
                self.check()
                time.sleep(POLL_S)
            if missing and time.monotonic() - said > NOTICE_S:
                said = time.monotonic()
                logger.warning("rank %d waits for ranks %s, which are alive, to come to %r", self.rank, missing, step)

    @contextmanager
    def in_turn(self, step: str) -> Iterator[None]:
        for turn in range(self.size):
            if turn == self.rank:
                yield
            self.wait(step)

    def device(self, device: str) -> str:
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}" if device == "cuda" else device

    def leave(self, error: BaseException | None) -> None:
        """Tell the others how this ended, and stop the signs of life."""
        if error is None:
            self.wait("end")
        else:
            with suppress(RankStopped):
                self._tell(error)
        self._over.set()
        self._watch.join(2 * BEAT_S)
        with suppress(RankStopped):
            self._go_last(self.grace_s if error is None else 3 * BEAT_S)

    def _tell(self, error: BaseException) -> None:
        """Let one process of each machine print an error, and the others know of it."""
        said = error.said if isinstance(error, RankStopped) else f"{type(error).__name__}: {error}"
        machine = f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', 0)}"
        key = f"said/{machine}/{hashlib.sha256((said or str(error)).encode()).hexdigest()}"
        first = self._ask(lambda: self._store.compare_set(key, "", str(self.rank))).decode()
        error._said_elsewhere = first != str(self.rank)  # type: ignore[attr-defined]
        if not isinstance(error, RankStopped):
            self._ask(lambda: self._store.set(f"failed/{self.rank}", said))
            self._ask(lambda: self._store.set("failed", "yes"))

    def _go_last(self, limit_s: float) -> None:
        """Rank 0, which may keep the rendezvous, stays until nobody needs it any more."""
        if not self.leads:
            self._ask(lambda: self._store.set(f"gone/{self.rank}", "gone"))
            return
        limit, gone = time.monotonic() + limit_s, [f"gone/{rank}" for rank in self._others]
        while not self._ask(lambda: self._store.check(gone)) and time.monotonic() < limit:
            time.sleep(POLL_S)

    def _keep_watch(self) -> None:
        """Leave a sign of life and look for those of the others each second, until one of them has stopped."""
        count = 0
        while not self._over.is_set() and self._stopped is None:
            count += 1
            try:
                self._ask(lambda count=count: self._store.set(f"alive/{self.rank}", str(count)))
                self._look_around()
            except RankStopped as stopped:
                self._stopped = stopped
                break
            self._over.wait(BEAT_S)
        if self._stopped is not None and not self._over.wait(NOTICE_S / 2):
            logger.error("%s; this process stops after its present step", self._stopped)

    def _look_around(self) -> None:
        """Raise RankStopped for a process that failed or gave no sign of life for the grace period."""
        if self._ask(lambda: self._store.check(["failed"])):
            for rank in self._others:
                if self._ask(lambda rank=rank: self._store.check([f"failed/{rank}"])):
                    said = self._ask(lambda rank=rank: self._store.get(f"failed/{rank}")).decode()
                    stopped = RankStopped(f"rank {rank} of {self.size} failed: {said}")
                    stopped.said = said
                    raise stopped
        now, there = time.monotonic(), [f"alive/{rank}" for rank in self._others]
        if self._ask(lambda: self._store.check(there)):
            beats = self._ask(lambda: self._store.multi_get(there))
        else:
            beats = [b""] * len(there)
        for rank, beat in zip(self._others, beats, strict=True):
            known = self._seen.get(rank)
            if known is None or known[0] != beat:
                self._seen[rank] = (beat, now)
            elif now - known[1] > self.grace_s:
                raise RankStopped(
                    f"rank {rank} of {self.size} has given no sign of life for {self.grace_s:.0f} s: it was killed or "
                    f"hangs; {_KEPT}"
                )

    def _together(self, step: str, begin: Callable[[], Any]) -> None:
        """Start a collective once every process is there, and wait for its end unless one of them stops."""
        self.wait(step)
        try:
            work = begin()
            while not work.is_completed():
                self.check()
                time.sleep(COLLECTIVE_POLL_S)
            work.wait()
        except RuntimeError as error:
            if isinstance(error, RankStopped):
                raise
            raise self._broken(step, error) from error

    def _broken(self, step: str, error: Exception) -> RankStopped:
        """Who broke a collective: the connection breaks at once, the reason shows a little later."""
        limit = time.monotonic() + self.grace_s + 2 * BEAT_S
        while time.monotonic() < limit and self._stopped is None:
            time.sleep(POLL_S)
        return self._stopped or RankStopped(f"{step} over {self.size} processes failed: {error}")

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The rendezvous's answer, in a thread of its own: a process that keeps it and hangs never answers."""
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except Exception as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            found, error = answers.get(timeout=0 if self._unanswered else self.grace_s)
        except queue.Empty:
            self._unanswered = True  # nor will it answer what is asked next
            found, error = None, TimeoutError(f"for {self.grace_s:.0f} s")
        if error is not None:
            raise RankStopped(
                f"rank 0 of {self.size}, which keeps the rendezvous, does not answer ({error}); {_KEPT}"
            ) from error
        return found


_current = Ranks()


def current() -> Ranks:
    """The run that this process has joined; a run of one process where it has joined none."""
    return _current


@contextmanager
def joined(grace_s: float = GRACE_S) -> Iterator[Ranks]:
    """Join the processes that `torchrun` has started (or anything that sets its variables); alone, or joined already,
    nothing happens.

    Inside, `fit_transport` and `signatures` with ``out=`` share their work. All processes have to make the same calls.

    Args:
        grace_s: Seconds of silence after which another process counts as dead.

    Raises:
        ValueError: WORLD_SIZE without RANK, MASTER_ADDR or MASTER_PORT.
        RankStopped: Later, from within: another process has died or failed.
    """
    global _current
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _current.size > 1:
        yield _current
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start the processes with torchrun")
    import torch
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    before, group = _current, _Joined(rank, size, store, grace_s)
    _current = group
    error: BaseException | None = None
    try:
        yield group
    except BaseException as raised:
        error = raised
        raise
    finally:
        _current = before
        try:
            group.leave(error)
        finally:
            if error is None:
                dist.destroy_process_group()
