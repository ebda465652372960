"""The embedded example: a small trained language model, its sparse dictionaries and a held-out token sample.

`assets/` holds the files; `python -m examples.demo_model.train` makes them from the standard library of the Python
that runs it.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
