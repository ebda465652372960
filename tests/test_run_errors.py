"""Runs that cannot be: an error that says what does not fit, before anything is written."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import golden
from safetensors.torch import save_file
from test_run import feature_list, overrides

from querylens_fast.analysis.run import run
from querylens_fast.dictionaries.feature_lists import Feature, save_features_json


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: Any) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["bigest=1"], "unknown key bigest; known are model, features_pkl"),
        (["k"], "no key=value"),
        (["k=many"], "key k"),
        (["k=0"], "k is 0"),
        (["k=1000"], "k is 1000; expected 1 to the vocabulary's"),
        (["baseline=query"], "unknown preset 'query'"),
        (["submodule=all"], "submodule is 'all'; expected both, attn, mlp"),
        (["stats=some"], "stats is 'some'"),
        (["format=csv"], "format is 'csv'"),
        (["dtype=int8"], "dtype is 'int8'"),
        (["stream_transition=tuned_lens", "params_path=null"], "needs params_path="),
        (["baseline=tuned_lens", "params_path=none.pt"], "'none.pt' does not exist"),
        (["features_pkl=none.pkl"], "'none.pkl' does not exist"),
        (["features_pkl=null"], "no features: pass features_pkl"),
        (["features=all", "dictionary=null"], "dictionary= must say of what"),
        (["dictionary=none"], "'none': no such file or folder"),
        (["dictionary={sae}", "features=[500]"], "feature 500 is not in"),
        (["dictionary={sae}", "layer=2"], "of layer 1 by its hook"),
        (["dictionary={sae}", "layer=[1,2]"], "needs a dictionary or sae_id with"),
        (["model=none/none"], "'none/none' could not be loaded"),
        (["tokens=none.safetensors"], "'none.safetensors' does not exist"),
        (["tokens=none.txt"], "'none.txt' does not exist"),
        (["tokens=null"], "needs tokens="),
        (["transport=none.safetensors"], "'none.safetensors' does not exist"),
    ],
)
def test_errors_write_nothing(tmp_path: Path, given: list[str], message: str) -> None:
    case = golden("gpt2-standard-sae")
    listed = save_features_json(feature_list(case), tmp_path / "list.json")
    given = [text.replace("{sae}", str(case.sae_path(1))) for text in given]
    base = overrides(case, features_pkl=listed)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("base", [*base, *given] if not given[0].startswith("dictionary") else [*base[:-1], *given])
    assert not list(Path.cwd().iterdir())


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch made",)


def test_a_pickle_that_imports_os_writes_and_runs_nothing(tmp_path: Path) -> None:
    case = golden("gpt2-standard-sae")
    listed = tmp_path / "evil.pkl"
    listed.write_bytes(pickle.dumps([feature_list(case)[0], Evil()]))
    with pytest.raises(ValueError, match=r"evil.pkl.* asks for \w+.system"):
        run("base", overrides(case, features_pkl=listed))
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"sae_release": "no-release", "sae_id": None}, "'no-release': no such file"),
        ({"sae_release": None, "sae_id": "x"}, "sae_id 'x' but no sae_release"),
        ({"layer": 2}, "of layer 1 by its hook"),
        ({"feature": 96}, "feature 96 is not in"),
        ({"size": 95}, "is of size 95, but .* has 96"),
    ],
)
def test_a_dictionary_that_does_not_fit_writes_nothing(tmp_path: Path, feature: dict[str, Any], message: str) -> None:
    case = golden("gpt2-standard-sae")
    good = {"model_id": "m", "feature": 1, "layer": 1, "type": "res", "sae_release": str(case.sae_path(1))}
    listed = save_features_json([Feature(**good), Feature(**{**good, **feature})], tmp_path / "list.json")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("base", overrides(case, features_pkl=listed))
    assert not list(Path.cwd().iterdir())


def test_more_errors_write_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    case = golden("gpt2-standard-sae")
    listed = save_features_json(feature_list(case), tmp_path / "list.json")
    given = overrides(case, features_pkl=listed)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(case.tokens_path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged or truncated"):
        run("base", [*given, f"tokens={damaged}"])
    outside = tmp_path / "outside.safetensors"
    save_file({"tokens": torch.full((1, 4), 10**6)}, str(outside))
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        run("base", [*given, f"tokens={outside}"])
    with pytest.raises(FileNotFoundError, match="no configuration 'gpt3'.*the package has gemma3-1b"):
        run("gpt3", given)
    (tmp_path / "looped.yaml").write_text("defaults: [looped]\nmodel: x\n")
    with pytest.raises(ValueError, match="includes itself"):
        run(tmp_path / "looped.yaml")
    (tmp_path / "typo.yaml").write_text("modle: x\n")
    with pytest.raises(ValueError, match=r"typo.yaml: unknown key modle"):
        run(tmp_path / "typo.yaml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT is not set"):
        run("base", given)
    assert not list(Path.cwd().iterdir())
