"""pytest-benchmark suite of whole dictionaries: the embedded one, from its file to the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import querylens_fast as ql
from querylens_fast.demo.showcase import load_example


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example()


@pytest.mark.parametrize("preset", ["logit_lens_value", "query_lens_value", "query_lens_key"])
def test_signatures_to_parquet(benchmark: Any, example: Any, preset: str, tmp_path: Path) -> None:
    transport = ql.fit_transport(example.model, example.fit_tokens.head(4), orders=("full",), progress=False)
    names = iter(range(10**6))

    def run() -> None:
        out = tmp_path / f"{next(names)}.parquet"
        ql.signatures(
            example.dictionaries[0], example.model, preset=preset, transport=transport, out=out, progress=False
        )

    benchmark(run)


def test_downstream_features(benchmark: Any, example: Any) -> None:
    writer, reader = example.dictionaries[0], example.dictionaries[1]
    benchmark(lambda: ql.downstream(writer, example.model, targets=reader, k=32))
