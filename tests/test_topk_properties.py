"""Properties of the streamed top-k over shapes, dtypes, k and adversarial inputs that hypothesis draws.

Inputs are small whole numbers (and infinities and NaN), so scores are exact in float32 and the comparison is equality.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from querylens_fast.topk import bf16_candidates, torch_backend
from querylens_fast.topk import triton_backend as fused
from querylens_fast.topk.api import streamed_topk
from querylens_fast.topk.request import Epilogue, Request, Side

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
fewer = settings(quick, max_examples=25)

Problem = tuple[torch.Tensor, torch.Tensor, int, Epilogue]


@st.composite
def problems(draw: st.DrawFn, min_columns: int = 1) -> Problem:
    """F, W, k and an epilogue; odd shapes, ties everywhere, some inputs adversarial."""
    n, d = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    V = draw(st.one_of(st.integers(min_columns, 80), st.sampled_from([127, 128, 129, 255, 513, 1000, 1537])))
    V = max(V, min_columns)
    k = draw(st.integers(1, min(V, draw(st.sampled_from([1, 8, 64, 256])))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    F, W = integers(n, d), integers(V, d)
    match draw(st.sampled_from(["ties", "ties", "equal", "dead", "sorted", "nan", "inf", "one hot"])):
        case "equal":
            W[:] = W[:1].clone()
        case "dead":
            F[::2] = 0
        case "sorted":
            W[:] = torch.arange(V)[:, None].float()
        case "nan":
            W[torch.rand(V, generator=generator) < draw(st.sampled_from([0.02, 0.6]))] = math.nan
        case "inf":
            W[torch.rand(V, d, generator=generator) < 0.05] = draw(st.sampled_from([math.inf, -math.inf]))
        case "one hot":
            W[:] = 0
            W[draw(st.integers(0, V - 1))] = 1
    bias = integers(V) if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        rare = torch.rand(V, generator=generator) < 0.2
        bias[rare] = draw(st.sampled_from([math.inf, -math.inf, math.nan]))
    scale = integers(V) if draw(st.booleans()) else None
    offset = integers(n) if draw(st.booleans()) else None
    return F, W, k, Epilogue(bias, scale, offset)


def check(sides: tuple[Side | None, Side | None], problem: Problem) -> None:
    F, W, k, epilogue = problem
    S = oracle.scores(F, W, *epilogue)
    for side, largest in zip(sides, (True, False), strict=True):
        assert side is not None
        expected, order = oracle.topk(S, k, largest)
        assert torch.equal(side.ids.cpu(), order)
        torch.testing.assert_close(side.scores.cpu().double(), expected, rtol=0, atol=0, equal_nan=True)


def poisoned(function: Callable[[], tuple[Side | None, Side | None]]) -> tuple[Side | None, Side | None]:
    """Run with every fresh float buffer full of NaN and every fresh integer buffer full of its largest value."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        return function()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


@quick
@given(problems(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_torch_backend_equals_a_stable_sort(problem: Problem, dtype: torch.dtype) -> None:
    F, W, k, (bias, scale, offset) = problem
    F, W = F.to(dtype), W.to(dtype)
    r = streamed_topk(F, W, k, bias=bias, scale=scale, offset=offset, backend="torch")
    # The oracle gets what the dtype keeps of the inputs: bfloat16 has no 257.
    rounded = (F.double(), W.double(), k, problem[3])
    check((Side(r.top_scores, r.top_ids), Side(r.bottom_scores, r.bottom_ids)), rounded)


@quick
@given(problems(), st.sampled_from([1, 2, 5, 100]), st.sampled_from([None, 4096, 1 << 15]))
def test_tile_size_changes_nothing(problem: Problem, rows: int, max_bytes: int | None) -> None:
    F, W, k, epilogue = problem
    check(
        poisoned(lambda: torch_backend.topk(Request(F, W, k, epilogue, block_rows=rows, max_bytes=max_bytes))[:2]),
        problem,
    )


@quick
@given(problems(min_columns=64), st.sampled_from([None, 1, 4]))
def test_bfloat16_candidates_equal_a_stable_sort(problem: Problem, rows: int | None) -> None:
    F, W, k, epilogue = problem
    found = poisoned(lambda: bf16_candidates.topk(Request(F, W, k, epilogue, block_rows=rows))[:2])
    check(found, problem)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@fewer
@given(
    problems(),
    st.sampled_from([None, 1, 4]),
    st.sampled_from([None, torch.float16]),
    st.sampled_from(["fused", "gemm"]),
)
def test_kernel_equals_a_stable_sort(
    problem: Problem, rows: int | None, dtype: torch.dtype | None, method: str
) -> None:
    F, W, k, epilogue = problem
    moved = Epilogue(*(None if v is None else v.to(DEVICE) for v in epilogue))
    request = Request(F.to(DEVICE), W.to(DEVICE), k, moved, block_rows=rows, method=method)
    check(poisoned(lambda: fused.topk(request, dtype)[:2]), problem)


@fewer
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_permuting_the_vocabulary_permutes_the_ids(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    F = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    W = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    order = torch.randperm(300, generator=generator)
    plain, permuted = streamed_topk(F, W, k), streamed_topk(F, W[order], k)
    assert torch.equal(order[permuted.top_ids], plain.top_ids)
    assert torch.equal(order[permuted.bottom_ids], plain.bottom_ids)


@fewer
@given(problems())
def test_bottom_is_the_top_of_the_negative(problem: Problem) -> None:
    F, W, k, (bias, scale, offset) = problem
    r = streamed_topk(F, W, k, bias=bias, scale=scale, offset=offset)
    minus = streamed_topk(
        -F, W, k, bias=None if bias is None else -bias, scale=scale, offset=None if offset is None else -offset
    )
    assert torch.equal(r.bottom_ids, minus.top_ids) and torch.equal(r.top_ids, minus.bottom_ids)
