"""Indexes made in the background, by a process of their own at low priority, while the server answers without them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from querylens_fast.queries.files import Stamp
from querylens_fast.queries.results import Results

logger = logging.getLogger(__name__)
SECONDS = 2.0
"""Between looks for results without an index, and before the first."""


class Indexer:
    """Starts `queries.build` for results that have no index; at most once for each state of a file."""

    def __init__(self, results: Results) -> None:
        """Take the results. `start` begins."""
        self.results = results
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="indexer", daemon=True)
        self._tried: set[tuple[Path, Stamp]] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, with the process that builds: it goes on from there another time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10 * SECONDS)  # Python aborts where a thread of it computes when it ends
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _run(self) -> None:
        while not self._stop.wait(SECONDS):
            try:
                self._look()
            except Exception:  # the server answers without indexes, too
                logger.exception("results could not be indexed")

    def _look(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        wanted = {m.file.path: m.file.stamp for m in self.results.unindexed()}
        new = [path for path, stamp in wanted.items() if (path, stamp) not in self._tried]
        self._tried |= {(path, wanted[path]) for path in new}
        if new and not self._stop.is_set():
            code = "import sys; from querylens_fast.queries.build import main; main(sys.argv[1:])"
            command = [sys.executable, "-c", code, *map(str, new)]
            package = str(Path(__file__).parents[2])
            paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
            variables = {**os.environ, "PYTHONPATH": paths}
            # A session of its own: Ctrl-C in a terminal goes to the server alone, which ends this process too.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=variables, start_new_session=True)
