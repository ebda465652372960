"""How long a query may take, and how it is stopped from outside."""

from __future__ import annotations

import threading
import time


class QueryStopped(RuntimeError):
    """The query took too long, or nobody waits for it any more."""


class Budget:
    """Time for one query; queries look at it between the steps that take long."""

    def __init__(self, seconds: float | None = None) -> None:
        """Start the clock; None: no limit."""
        self.seconds = seconds
        self._until = None if seconds is None else time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Make the next `check` raise, from any thread."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise QueryStopped where the time is up or the query was cancelled."""
        if self._cancelled.is_set():
            raise QueryStopped("the query was cancelled")
        if self._until is not None and time.monotonic() > self._until:
            raise QueryStopped(f"the query took longer than {self.seconds:g} s; ask for fewer dictionaries or features")


UNLIMITED = Budget()
