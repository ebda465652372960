"""Files and calls of other tools: Neuronpedia, circuit-tracer, SAEDashboard, SAELens and delphi.

One module a tool, each imported when it is asked for. None of them imports the tool: files are written by the tool's
format, and the calls under sae-lens's names work on tensors.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = ("attribution_graph", "circuit_tracer", "delphi", "neuronpedia", "sae_lens", "saedashboard")


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; tools: {', '.join(MODULES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
