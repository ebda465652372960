"""Scores are not gone on with when what they were computed from has changed under the same name."""

from pathlib import Path

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo.showcase import Example, load_example
from querylens_fast.evaluation.evaluate import EvaluationOptions
from querylens_fast.evaluation.feature_sample import feature_sample
from querylens_fast.evaluation.methods import Context, find_methods
from querylens_fast.evaluation.scores import Case, score_methods


@pytest.fixture(scope="module")
def example() -> Example:
    return load_example()


def test_another_result_file_of_the_same_name(example: Example, tmp_path: Path) -> None:
    dictionary, features = example.dictionaries[1], torch.tensor([3, 40])
    sample = feature_sample(dictionary, example.model, example.held_out.head(2), progress=False)

    def scores(preset: str) -> None:
        path = tmp_path / preset / "layer1.parquet"
        path.parent.mkdir(exist_ok=True)
        ql.signatures(dictionary, example.model, preset=preset, k=5, features=features, out=path, progress=False)
        case, methods = Case(dictionary, "sae", features, sample), find_methods([path])
        out = tmp_path / "scores.parquet"
        score_methods([case], Context(example.model), methods, ks=(5,), coherence=False, out=out, progress=False)

    scores("logit_lens_value")
    scores("logit_lens_value")
    with pytest.raises(FileExistsError, match="different: files"):
        scores("logit_lens_key")


def test_a_tuned_lens_without_its_method() -> None:
    assert "tuned_lens" in EvaluationOptions(tuned_lens="params.pt").method_names
    with pytest.raises(ValueError, match="tuned_lens is given, but none of the methods"):
        EvaluationOptions(tuned_lens="params.pt", methods=["logit_lens_value"])


@pytest.mark.slow
def test_a_sample_with_fewer_examples(example: Example, tmp_path: Path) -> None:
    given = {"fit_sequences": 2, "n_features": 2, "positions": "none", "methods": ["logit_lens_value"], "k": [5]}
    tokens, more = example.held_out.head(6), {**given, "progress": False}
    ql.evaluate_signatures(example.model, example.dictionaries[:1], tokens, tmp_path, min_examples=2, **more)
    (tmp_path / "scores.parquet").unlink()
    with pytest.raises(FileExistsError, match="another number of examples"):
        ql.evaluate_signatures(example.model, example.dictionaries[:1], tokens, tmp_path, min_examples=21, **more)
