"""Shapes of real models: what a dictionary of theirs is multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One streamed top-k."""

    name: str
    d: int
    """d_model."""
    V: int
    """Rows of the unembedding."""
    rows: int
    """Features scored in one measurement on a GPU; the CPU takes fewer."""
    k: int = 25


CASES = {
    case.name: case
    for case in (
        Case("gpt2", 768, 50257, 24576),
        Case("llama-3.2-1b", 2048, 128256, 16384),
        Case("qwen3-1.7b", 2048, 151936, 16384),
        Case("gemma-2-2b", 2304, 262144, 16384),
        Case("gemma-2-2b-k1", 2304, 262144, 16384, 1),
        Case("gemma-3-1b", 1152, 262144, 16384),
        Case("features-x-features", 2304, 1 << 20, 4096, 32),
    )
}
ODD = [(1, 1, 1, 1), (255, 507, 123, 25), (129, 768, 5003, 25), (33, 100, 50257, 256), (130, 2304, 30011, 64)]
"""n, d, V, k that fill no tile."""


def _gpt2_small() -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config())


MODEL_SHAPES: dict[str, Callable[[], Any]] = {"gpt2-small": _gpt2_small}
"""Whole models with random weights, as transformers makes them."""
