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

CHUNKED, FAISS, GEMM, NARROW_GEMM = "torch chunked + 2 x topk", "faiss.knn", "gemm alone", "gemm alone bf16"
PLAIN, STATISTICS, HISTOGRAM = "ours, float32", "ours, statistics", "ours, 100-bin histogram"


class Goal(NamedTuple):
    """One of our times, at most so many times a peer's of the same run."""

    task: str
    peer: str
    at_most: float


class Measurement(NamedTuple):
    """One case of `bench.topk`: the inputs, what is timed on them, and what is wanted of the times."""

    case: Case
    goals: tuple[Goal, ...] = ()
    """Their tasks and peers are timed, beside "ours"."""
    dtypes: tuple[str, str] = ("float32", "float32")
    """Of F and W."""
    kind: str = "gaussian"
    also: tuple[str, ...] = ()
    """Tasks without a goal."""


def _on_cpu() -> dict[str, Measurement]:
    """What is measured on a CPU: a 4,096-feature block of GPT-2 small, 2,048 of Gemma-2-2B."""
    gpt2, gemma = Case("gpt2", 768, 50257, 4096), Case("gemma-2-2b", 2304, 256000, 2048)
    narrow = ("bfloat16", "bfloat16")

    def over_gemm(case: Case, k: int, bound: float, *more: Goal, dtypes: tuple[str, str] = ("float32", "float32"),
                  also: tuple[str, ...] = ()) -> Measurement:  # fmt: skip
        return Measurement(case._replace(k=k), (Goal("ours", NARROW_GEMM, bound), *more), dtypes, also=also)

    peers = Goal("ours", CHUNKED, 1 / 4), Goal("ours", FAISS, 1 / 5.5)
    passes = Goal(PLAIN, NARROW_GEMM, 2.4), Goal(STATISTICS, NARROW_GEMM, 2.9), Goal(HISTOGRAM, NARROW_GEMM, 4.5)
    found = {
        "gpt2": over_gemm(gpt2, 25, 1.35, *peers, also=(GEMM,)),
        "gpt2-k10": over_gemm(gpt2, 10, 1.25),
        "gpt2-k100": over_gemm(gpt2, 100, 2.0),
        "gpt2-bf16": over_gemm(gpt2, 25, 1.25, dtypes=narrow),
        "gpt2-mixed": over_gemm(gpt2, 25, 1.4, dtypes=("float32", "bfloat16")),
        "gpt2-passes": Measurement(gpt2, passes),
    }
    kinds = {"sorted": 0.4, "equal": 0.65, "heavy-tailed": 0.3, "dead": 0.3, "one outlier": 0.35}
    for kind, bound in kinds.items():
        found[f"gpt2-{kind.replace(' ', '-')}"] = Measurement(gpt2, (Goal("ours", CHUNKED, bound),), kind=kind)
    found["gemma-2-2b"] = over_gemm(gemma, 25, 1.2)
    found["gemma-2-2b-k100"] = over_gemm(gemma, 100, 1.35)
    found["gemma-2-2b-bf16"] = over_gemm(gemma, 25, 1.15, dtypes=narrow)
    return found


ON_CPU = _on_cpu()


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
