"""Numbers of the wrong kind are refused by name instead of being rounded, truncated or taken for another."""

import math
from collections.abc import Callable

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo.showcase import Example, load_example
from querylens_fast.evaluation.evaluate import EvaluationOptions
from querylens_fast.runs.arguments import finite_number, whole_number


@pytest.fixture(scope="module")
def example() -> Example:
    return load_example()


def test_whole_numbers() -> None:
    assert whole_number("k", torch.ones(3).numpy().shape[0]) == 3
    for value in (True, 1.0, 1.5, "3", None, [3], 0, -1, 1j, math.nan):
        with pytest.raises(ValueError, match="k is .*; expected a whole number of at least 1"):
            whole_number("k", value)


def test_finite_numbers() -> None:
    assert finite_number("x", 2, above=0) == 2.0
    for value in (True, "3", None, [3], 1j, math.nan, math.inf, 0, -1.0):
        with pytest.raises(ValueError, match="x is .*; expected a finite number above 0"):
            finite_number("x", value, above=0)


Call = Callable[[Example], object]


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("feature is 1.5", lambda e: ql.steer(e.model, e.dictionaries[0], 1.5, 2.0, "def")),  # type: ignore[arg-type]
        ("feature is True", lambda e: ql.steer(e.model, e.dictionaries[0], True, 2.0, "def")),
        ("strength is nan", lambda e: ql.steer(e.model, e.dictionaries[0], 1, math.nan, "def")),
        ("token_ids is", lambda e: ql.scores_at(e.dictionaries[0], e.model, [1], [1.5], preset="logit_lens_value")),  # type: ignore[list-item]
        ("token_ids is", lambda e: ql.scores_at(e.dictionaries[0], e.model, [1], [True], preset="logit_lens_value")),
        ("token_change_value is", lambda e: ql.signatures(e.dictionaries[0], e.model, token_change_value=1j)),  # type: ignore[arg-type]
        ("max_memory_gib is -1", lambda e: ql.feature_sample(e.dictionaries[0], e.model, ["x"], max_memory_gib=-1)),
        ("n_examples is True", lambda e: ql.feature_sample(e.dictionaries[0], e.model, ["x"], n_examples=True)),
        ("n_tokens is True", lambda e: ql.promoted_tokens(e.dictionaries[0], e.model, [1], n_tokens=True)),
        ("KL target", lambda e: ql.promoted_tokens(e.dictionaries[0], e.model, [1], kl_targets=[math.nan])),
        ("min_examples is 1.5", lambda e: EvaluationOptions(min_examples=1.5)),  # type: ignore[arg-type]
        ("fit_sequences is True", lambda e: EvaluationOptions(fit_sequences=True)),
    ],
)
def test_refused_by_name(example: Example, match: str, call: Call) -> None:
    with pytest.raises(ValueError, match=match):
        call(example)
