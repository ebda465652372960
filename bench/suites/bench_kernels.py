"""pytest-benchmark suite of the streamed top-k: ``python -m pytest bench/suites --benchmark-only``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import Case
from bench.topk import KINDS, inputs, torch_topk
from querylens_fast.topk.api import streamed_topk

CASE = Case("suite", 256, 16384, 1024)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_exact(benchmark: Any, kind: str) -> None:
    F, W = inputs(CASE, CASE.rows, torch.float32, DEVICE, kind)
    benchmark(lambda: streamed_topk(F, W, CASE.k))


@pytest.mark.parametrize("precision", ["exact", "float32", "bf16"])
def test_precision(benchmark: Any, precision: str) -> None:
    F, W = inputs(CASE, CASE.rows, torch.float32, DEVICE)
    benchmark(lambda: streamed_topk(F, W, CASE.k, precision=precision))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_statistics(benchmark: Any, precision: str) -> None:
    F, W = inputs(CASE, CASE.rows, torch.float32, DEVICE)
    benchmark(lambda: streamed_topk(F, W, CASE.k, precision=precision, statistics=True))


def test_chunked_torch(benchmark: Any) -> None:
    F, W = inputs(CASE, CASE.rows, torch.float32, DEVICE)
    benchmark(lambda: torch_topk(F, W, CASE.k))
