"""Whole runs: golden rows through the command line's entry, resuming, and configurations."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from golden_cases import CASES, GoldenCase, assert_close, assert_same_row, golden
from omegaconf import OmegaConf
from safetensors.torch import load_file

from querylens_fast.analysis.common import BASELINE_REGISTRY, resolve_baseline
from querylens_fast.analysis.configuration import CONFIGS, KEYS, compose, config_names
from querylens_fast.analysis.run import main, run
from querylens_fast.dictionaries.feature_lists import Feature, save_features_json
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.dictionaries.rows import MemoryRows
from querylens_fast.lens.compute import signatures
from querylens_fast.lens.storage import read_jsonl
from querylens_fast.models.load import load_model
from querylens_fast.models.tokens import load_tokens
from querylens_fast.transport.fit import fit_transport

NAMES = [
    "gemma3-1b", "gemma3-270m", "gemma3-4b", "gpt2-small", "qwen3-0.6b", "qwen3-1.7b", "qwen3-1.7b-base", "qwen3-4b"
]  # fmt: skip


def feature_list(case: GoldenCase) -> list[Feature]:
    """Every golden feature, out of order, its dictionary given as a local folder."""
    return [
        Feature(case.name, feature, str(layer), "res", sae_release=str(case.sae_path(layer)), size="96")
        for feature in reversed(case.features)
        for layer in case.layers
    ]


def overrides(case: GoldenCase, **more: Any) -> list[str]:
    given = {
        "model": case.model_path,
        "tokens": case.tokens_path,
        "params_path": case.tuned_lens_path,
        "k": case.k,
        "dtype": "float64",
        "device": "cpu",
        **more,
    }
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: Any) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("baseline", list(BASELINE_REGISTRY))
@pytest.mark.parametrize("name", CASES)
def test_goldens(tmp_path: Path, name: str, baseline: str) -> None:
    """Every golden feature through a feature list; rows in the reference's order."""
    case = golden(name)
    listed = tmp_path / "sample.pkl"
    listed.write_bytes(pickle.dumps(feature_list(case)))
    out = run("gpt2-small", overrides(case, baseline=baseline, features_pkl=listed))
    assert out == Path("experiments/sample") / baseline / "feature_analysis.jsonl"
    rows = read_jsonl(out)
    assert [row["feature_index"] for row in rows] == list(range(len(rows)))
    expected = [(layer, feature) for layer in case.layers for feature in case.features]
    assert len(rows) == len(expected)
    for row, (layer, feature) in zip(rows, expected, strict=True):
        assert row["feature_str"] == f"Feature res-96/{layer}/{feature}"
        assert {k: row[k] for k in ("feature_vector", "stream_transition", "readout")} == BASELINE_REGISTRY[baseline]
        assert row["baseline"] == baseline
        assert_same_row(row, case, baseline, layer, feature)
    needs_tokens = "query_lens" in baseline or baseline in ("token_change", "zero_out")
    assert out.with_name("tokens.safetensors").is_file() == needs_tokens
    saved = OmegaConf.load(out.with_name("config.yaml"))
    assert resolve_baseline(saved) == resolve_baseline({"baseline": baseline})


@pytest.mark.parametrize("name", CASES)
def test_whole_dictionaries(name: str) -> None:
    """All layers of a templated dictionary, through a transport fitted for the run, into Parquet and JSONL."""
    case = golden(name)
    source = str(case.sae_path(0)).replace("layer0", "layer{layer}")
    given = {"dictionary": source, "layer": case.layers, "baseline": "query_lens_key_approx"}
    out = run("base", overrides(case, **given, format="parquet"))
    assert out == Path(f"experiments/sae_layerlayers-layer{','.join(map(str, case.layers))}") / (
        "query_lens_key_approx/feature_analysis.parquet"
    )

    rows = pq.read_table(out).to_pylist()
    assert len(rows) == case.config["d_sae"] * len(case.layers)
    lines = read_jsonl(run("base", overrides(case, **given)))
    assert [r["top_ids"] for r in lines] == [r["top_ids"] for r in rows]
    for line in lines:
        if line["feature"] in case.features:
            expected = case.row("query_lens_key_approx", line["layer"], line["feature"])
            assert_same_row(
                {**line, "stats": expected["stats"]}, case, "query_lens_key_approx", line["layer"], line["feature"]
            )


@pytest.mark.parametrize("stats", ["rel_var", "exact", "none", "null"])
def test_ids_with_a_transport_file(tmp_path: Path, stats: str) -> None:
    case = golden(CASES[1])
    model = load_model(case.model_path, dtype="float64")
    tokens = load_tokens(case.tokens_path, model=model)
    path = fit_transport(model, tokens, energy="exact", progress=False).save(tmp_path / "t.safetensors")
    given = {"dictionary": case.sae_path(1), "transport": path, "stats": stats, "features": case.features}
    rows = read_jsonl(run("base", overrides(case, **given, baseline="query_lens_value")))
    assert [row["feature"] for row in rows] == case.features
    for row, feature in zip(rows, case.features, strict=True):
        expected = case.row("query_lens_value", 1, feature)
        found = row.pop("stats", None)
        assert_same_row({**row, "stats": expected["stats"]}, case, "query_lens_value", 1, feature)
        if stats == "none":
            assert found is None
        else:
            assert_close(found["rel_var"], expected["stats"]["rel_var"], "rel_var")
            assert ("EV_mu" in found) == (stats != "rel_var")
    with pytest.raises(ValueError, match="fitted with submodule=both, but this call has submodule=attn"):
        run("base", overrides(case, **given, baseline="query_lens_value", submodule="attn"))


def test_neurons_ranges_and_id_files(tmp_path: Path) -> None:
    case = golden("gpt2-standard-sae")
    ids = tmp_path / "ids.json"
    ids.write_text("[5, 2]")
    neurons = {"dictionary": "neurons", "layer": 1, "baseline": "query_lens_value", "layers": "false"}
    by_file = read_jsonl(run("base", overrides(case, **neurons, features=ids, output_filename="a.jsonl")))
    assert [row["feature"] for row in by_file] == [5, 2] and by_file[0]["feature_str"].startswith("Feature neurons-")
    by_range = read_jsonl(run("base", overrides(case, **neurons, features="2:6", output_filename="b.jsonl")))
    assert [row["feature"] for row in by_range] == [2, 3, 4, 5]
    assert by_range[3]["top_ids"] == by_file[0]["top_ids"]
    listed = save_features_json([Feature("m", 5, 1, "mlp")], tmp_path / "list.json")
    by_list = read_jsonl(run("base", overrides(case, baseline="query_lens_value", features=listed)))
    assert by_list[0]["top_ids"] == by_file[0]["top_ids"] and by_list[0]["feature_str"] == "Feature mlp-/1/5"
    adaptive = {**neurons, "baseline": "query_lens_value_adaptive", "features": "0:3"}
    rows = read_jsonl(run("base", overrides(case, **adaptive)))
    assert {row["transition"] for row in rows} == {"shrunk"}


def test_submodules_and_norms_reach_the_walk() -> None:
    """`submodule` and `use_jvp_layer_norm` change the result, the same by walking and by a transport."""
    case = golden("gpt2-standard-sae")
    given = {"dictionary": case.sae_path(1), "baseline": "query_lens_value", "features": [0]}
    found = {}
    for submodule in ("both", "attn", "mlp"):
        for norms in ("true", "false"):
            more = {"submodule": submodule, "use_jvp_layer_norm": norms}
            walked = read_jsonl(
                run("base", overrides(case, **given, **more, output_filename=f"{submodule}{norms}.jsonl"))
            )
            model = load_model(case.model_path, dtype="float64")
            tokens = load_tokens(case.tokens_path, model=model)
            transport = fit_transport(
                model, tokens, submodule=submodule, through_norms=norms == "true", progress=False  # type: ignore[arg-type]
            )  # fmt: skip
            fitted = signatures(
                load_dictionary(case.sae_path(1)), model, preset="query_lens_value", transport=transport, features=[0],
                k=case.k,
            )  # fmt: skip
            assert_close(walked[0]["top_scores"], fitted.top_scores[0], f"{submodule} {norms}")
            found[submodule, norms] = tuple(walked[0]["top_scores"])
    assert len(set(found.values())) == 6


def test_resumes_by_feature_index(tmp_path: Path) -> None:
    """A killed run's half-written row is dropped, whole ones are kept, another run's file is refused."""
    case = golden("qwen3-transcoder")
    listed = save_features_json(feature_list(case), tmp_path / "list.json")
    out = tmp_path / "result" / "rows.jsonl"
    given = {"baseline": "query_lens_key", "features": listed, "output_filename": out}
    assert run("base", overrides(case, **given)) == out
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:40])
    before = out.stat().st_ino
    run("base", overrides(case, **given))
    # A resumed block holds other features, and sums of another shape may round differently in their last bits.
    first, resumed = ([json.loads(line) for line in text.splitlines()] for text in (whole, out.read_text()))
    assert [r["top_ids"] for r in resumed] == [r["top_ids"] for r in first]
    assert [r["feature_str"] for r in resumed] == [r["feature_str"] for r in first]
    assert_close([r["top_scores"] for r in resumed], [r["top_scores"] for r in first], rtol=1e-12)
    assert out.stat().st_ino == before
    whole = out.read_text()
    for other in (
        {"k": 3},
        {"baseline": "query_lens_value"},
        {"submodule": "mlp"},
        {"features_pkl": listed, "features": "[0]", "dictionary": case.sae_path(0)},
    ):
        with pytest.raises(FileExistsError, match="another run"):
            run("base", overrides(case, **{**given, **other}))
    assert out.read_text() == whole


def test_main_takes_a_reference_configuration(tmp_path: Path) -> None:
    """A user's Hydra file for the reference, by folder and name; and `main` with what it composes to."""
    case = golden("gpt2-standard-sae")
    listed = tmp_path / "sample.pkl"
    listed.write_bytes(pickle.dumps(feature_list(case)[:2]))
    (tmp_path / "mine.yaml").write_text(
        f"# @package _global_\n\ndefaults:\n  - _self_\n  - override hydra/job_logging: disabled\n\n"
        f"features_pkl: {listed}\nmodel: {case.model_path}\nnum_samples: 4\nmax_length: 12\nseed: 1\nlogs_dir: base\n"
        "output_filename: rows.jsonl\nresid_device: cuda\nk: 5\nsubmodule: both\nuse_unembed_layer_norm: true\n"
        "use_jvp_layer_norm: true\nuse_vjp_layer_norm: true\ndtype: float32\naccumulation_steps: 1\nbaseline: null\n"
        "feature_vector: value\nstream_transition: identity\nreadout: unembed\nparams_path: null\n"
        "token_change_value: 10.0\n"
    )
    out = run("mine", ["k=4", "+seed=2"], config_path=tmp_path)
    assert out == Path("experiments/sample/base/rows.jsonl")
    assert [len(row["top_ids"]) for row in read_jsonl(out)] == [4, 4]
    assert read_jsonl(out)[0]["baseline"] == "value_identity_unembed"
    cfg = compose(tmp_path / "mine.yaml", ["output_filename=again.jsonl"])
    assert main(cfg) == 0 and main(OmegaConf.to_container(cfg)) == 0
    assert len(read_jsonl("experiments/sample/base/again.jsonl")) == 2


def test_the_package_has_the_reference_configurations() -> None:
    assert config_names() == NAMES
    for name in NAMES:
        cfg = compose(name, ["features=10:50", "features_pkl=null"])
        assert set(cfg) == set(KEYS) and cfg.features == "10:50"
        assert (cfg.num_samples, cfg.max_length, cfg.seed, cfg.k, cfg.dtype) == (1024, 32, 42, 25, "bfloat16")
        assert (cfg.feature_vector, cfg.stream_transition, cfg.readout) == ("value", "first_order", "unembed")
        assert cfg.params_path == f"tuned_lens/{name}/params.pt" and "{layer}" in cfg.sae_id
    assert compose("qwen3-4b").model == "Qwen/Qwen3-4B"
    assert set(OmegaConf.load(CONFIGS / "base.yaml")) == set(KEYS)


def test_the_packages_configurations_name_dictionaries_that_exist() -> None:
    """Every layer's release and id is one of sae-lens; Gemma's layers and L0 are the paper's."""
    directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory")
    releases = directory.get_pretrained_saes_directory()
    paper = {"gemma3-270m": [5, 9, 12, 15], "gemma3-1b": [7, 13, 17, 22], "gemma3-4b": [9, 17, 22, 29]}
    for name in NAMES:
        cfg = compose(name)
        known = releases[cfg.dictionary].saes_map
        assert cfg.layer == paper.get(name)
        for layer in cfg.layer or [0]:
            assert cfg.sae_id.replace("{layer}", str(layer)) in known
        if name in paper:
            for width in ("16k", "65k"):
                assert f"layer_{cfg.layer[-1]}_width_{width}_l0_medium" in known
                assert cfg.sae_id == "layer_{layer}_width_16k_l0_medium"


def test_a_pad_token_id_of_the_configuration(tmp_path: Path) -> None:
    """pad_token_id replaces the tokenizer's, as in the reference; the sample that is saved says so."""
    case = golden("gpt2-standard-sae")
    ids = load_file(str(case.tokens_path))["tokens"]
    pad = int(ids[0, 3])
    given = {"dictionary": case.sae_path(1), "features": [0], "baseline": "query_lens_value", "pad_token_id": pad}
    out = run("base", overrides(case, **given))
    saved = load_file(str(out.with_name("tokens.safetensors")))
    assert torch.equal(saved["valid_mask"], ids != pad)
    assert json.loads(out.read_text())["stats"]["N"] == float((ids != pad).sum())


def test_a_list_over_a_dictionary_that_is_in_memory(tmp_path: Path) -> None:
    """A compressed file cannot be read in slices: needed rows stay, the fingerprint is the whole file's."""
    case = golden("gpt2-standard-sae")
    weights = load_file(str(case.sae_path(1) / "sae_weights.safetensors"))
    path = tmp_path / "params.npz"
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in weights.items()}, threshold=np.zeros(96))
    listed = save_features_json(
        [Feature("m", i, 1, "res", sae_release=str(path)) for i in case.features], tmp_path / "list.json"
    )
    given = {"baseline": "query_lens_key", "features_pkl": listed, "output_filename": tmp_path / "rows.jsonl"}
    rows = read_jsonl(run("base", overrides(case, **given)))
    for row, feature in zip(rows, case.features, strict=True):
        assert_same_row(row, case, "query_lens_key", 1, feature)
    dictionary = load_dictionary(path, layer=1)
    assert isinstance(dictionary.key_rows, MemoryRows)
    record = json.loads((tmp_path / "rows.jsonl.run.json").read_text())
    assert record["dictionary_fingerprints"] == [dictionary.fingerprint]


def test_options_of_signatures_are_keys(tmp_path: Path) -> None:
    """Keys that the reference does not have reach the lens and the file."""
    case, out = golden("gpt2-standard-sae"), tmp_path / "rows.parquet"
    given = {"dictionary": case.sae_path(1), "baseline": "logit_lens_value", "output_filename": out, "features": "all"}
    keys = {"token_strings": "false", "block_rows": 40, "backend": "torch", "progress": "false"}
    assert run("base", overrides(case, **given, **keys)) == out
    table = pq.read_table(out)
    assert "top_tokens" not in table.column_names and table.num_rows == 96
    assert json.loads(table.schema.metadata[b"querylens_fast"])["block_rows"] == 40
    with pytest.raises(FileExistsError, match="another run .*block_rows"):
        run("base", overrides(case, **given, **{**keys, "block_rows": 50}))
    with pytest.raises(FileExistsError, match="exists already"):
        run("base", overrides(case, **given, **keys, resume="false"))
    with pytest.raises(ValueError, match="backend is 'cublas'"):
        run("base", overrides(case, **given, **{**keys, "backend": "cublas"}))
