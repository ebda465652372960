"""pytest-benchmark suite of the transport on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest

import querylens_fast as ql
from querylens_fast.demo.showcase import load_example


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example()


@pytest.mark.parametrize("side", ["value", "key"])
@pytest.mark.parametrize("order", ["full", "first_order"])
def test_fit(benchmark: Any, example: Any, side: Any, order: Any) -> None:
    tokens = example.fit_tokens.head(8)
    benchmark(lambda: ql.fit_transport(example.model, tokens, sides=(side,), orders=(order,), progress=False))
