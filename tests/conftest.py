"""Fixtures: tiny real models of every supported architecture, saved to disk and loaded as a user would."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one core a worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that tests start
if not torch.cuda.is_available():
    # Triton decides when it is first imported whether its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_models import ARCHITECTURES, save_tiny_model

import querylens_fast as ql
from querylens_fast.demo.showcase import Example, load_example
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from bench.interpreter import widen_bfloat16

    widen_bfloat16()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; none is here"))


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    """A random model of each architecture in float64, from disk."""
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return ql.load_model(folder, dtype="float64")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory):
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def gpt2(gpt2_folder) -> ql.Model:
    return ql.load_model(gpt2_folder, dtype="float64")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a tiny model ("model") and results of it ("results"), for the server's tests; not to be changed."""
    from served_results import odd_model, write_results

    from querylens_fast.lens import parquet

    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP", 16)  # several in each file, as results of wide dictionaries have
        write_results(odd_model(save_tiny_model("gpt2", root / "model")), root / "results")
    return root


@pytest.fixture(scope="session")
def sample() -> ql.Tokens:
    """Five sequences with padding at the end of one and in the middle of another."""
    ids = torch.randint(3, 61, (5, 7), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 5:] = False
    valid[3, 2] = False
    return ql.Tokens(ids, valid)


@pytest.fixture(scope="session")
def served_model(served: Path) -> ql.Model:
    """The model of ``served``."""
    return ql.load_model(served / "model")


@pytest.fixture
def copied_results(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of ``served`` that a test may change; servers look for changes at every query."""
    from querylens_fast.queries import results

    monkeypatch.setattr(results, "LOOK_SECONDS", 0.0)
    return Path(shutil.copytree(served / "results", tmp_path / "copied"))


@pytest.fixture(scope="session")
def example() -> Example:
    """The demo's model and dictionaries."""
    return load_example()


@pytest.fixture(scope="session")
def demo_tokens(example: Example) -> ql.Tokens:
    """Held-out text, with padding at the end of one sequence."""
    held_out = example.held_out.head(24)
    valid = held_out.valid_mask.clone()
    valid[2, 40:] = False
    return ql.Tokens(held_out.ids, valid)


@pytest.fixture(scope="session")
def demo_sample(example: Example, demo_tokens: ql.Tokens) -> FeatureSample:
    """Of the dictionary of layer 1."""
    return feature_sample(example.dictionaries[1], example.model, demo_tokens, n_examples=5, progress=False)
