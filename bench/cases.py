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


def _gemma3_1b() -> Any:
    import transformers

    config = transformers.Gemma3TextConfig(
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        sliding_window=512,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


MODEL_SHAPES: dict[str, Callable[[], Any]] = {"gpt2-small": _gpt2_small, "gemma3-1b": _gemma3_1b}
"""Whole models with random weights, as transformers makes them."""


def _small_gpt2() -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=97, n_positions=32)
    )


def _small_gemma3() -> Any:
    import transformers

    config = transformers.Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=97,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


SMALL_SHAPES: dict[str, Callable[[], Any]] = {"gpt2-small": _small_gpt2, "gemma3-1b": _small_gemma3}
"""The same architectures, small enough for a check of the benchmark itself."""
