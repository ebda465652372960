"""export and annotate-graph on the command line, and published Jacobian lenses by path and by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.demo import ASSETS
from querylens_fast.integrations.circuit_tracer import cantor

MODEL = ASSETS / "model"


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output + (result.stderr if result.stderr_bytes else "")


def test_export_neuronpedia(tmp_path) -> None:
    call(
        "export", ASSETS / "sae_layer1", "--format", "neuronpedia", "--model", MODEL, "--out", tmp_path, "--model-id",
        "tiny", "--source-set", "ql-res", "--features", "0:5", "--no-vectors", "--neighbours", 2,
    )  # fmt: skip
    folder = tmp_path / "tiny" / "1-ql-res"
    rows = gzip.decompress((folder / "features" / "batch-0.jsonl.gz").read_bytes()).splitlines()
    assert len(rows) == 5 and len(json.loads(rows[4])["topkCosSimIndices"]) == 3
    assert (folder / "import.sql").is_file()


def test_export_saedashboard_and_delphi(model, tmp_path) -> None:
    shared = ("--model", MODEL, "--features", "0:3")
    call("export", ASSETS / "sae_layer1", "--format", "saedashboard", "--out", tmp_path / "s", *shared)
    assert len(json.loads((tmp_path / "s" / "batch-0.json").read_text())["features"]) == 3
    call("export", ASSETS / "sae_layer1", "--format", "saedashboard", "--columnar", "--out", tmp_path / "c", *shared)
    assert (tmp_path / "c" / "feature_batch_0" / "logits_tables.parquet").is_file()
    result = tmp_path / "r.parquet"
    ql.signatures(ASSETS / "sae_layer1", model, preset="logit_lens_value", features=[4], out=result, progress=False)
    call("export", result, "--format", "delphi", "--model", MODEL, "--out", tmp_path / "d", "--hookpoint", "layers.1")
    assert (tmp_path / "d" / "explanations" / "layers.1_latent4.txt").is_file()


def test_export_circuit_tracer_and_annotate_graph(model, tmp_path) -> None:
    result = tmp_path / "layer0.parquet"
    ql.signatures(ASSETS / "sae_layer0", model, preset="logit_lens_value", k=3, out=result, progress=False)
    call(
        "export", result, "--format", "circuit-tracer", "--model", MODEL, "--out", tmp_path / "features",
        "--transcoder-id", "demo",
    )  # fmt: skip
    index = json.loads(gzip.decompress((tmp_path / "features" / "index.json.gz").read_bytes()))
    assert len(index) == 1 and len(index[0]["offsets"]) == 2049
    node = {"node_id": "0_7_1", "feature": cantor(0, 7), "layer": "0", "feature_type": "cross layer transcoder"}
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"nodes": [node], "links": []}))
    assert "1 feature nodes labelled" in call("annotate-graph", graph, "--model", MODEL, "--values", result)
    assert json.loads(graph.read_text())["nodes"][0]["top_logit_effects"] == ql.show(result, 7)[0]["top_tokens"]


def test_mistakes_are_one_line_and_nothing_is_written(tmp_path) -> None:
    shared = ("--model", MODEL, "--out", tmp_path / "x")
    for arguments, message in (
        (("--format", "html"), "format is 'html'"),
        (("--format", "neuronpedia"), "needs --model-id"),
        (("--format", "circuit-tracer"), "needs --transcoder-id"),
        (("--format", "delphi"), "needs --hookpoint"),
    ):
        assert message in call("export", ASSETS / "sae_layer0", *arguments, *shared, code=2)
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def model() -> ql.Model:
    return ql.load_model(MODEL)


@pytest.fixture(scope="module")
def lens_file(model: ql.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    d = model.d_model
    J = {layer: torch.eye(d) + 0.1 * torch.randn(d, d, generator=generator) for layer in range(model.n_layers - 1)}
    path = tmp_path_factory.mktemp("lens") / "lens.pt"
    torch.save({"J": J, "n_prompts": 3, "source_layers": sorted(J), "d_model": d}, path)
    return path


def test_a_published_lens_is_taken_by_path_and_by_name(model, lens_file, tmp_path, monkeypatch) -> None:
    pytest.importorskip("transformer_lens")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    from querylens_fast.transport.published import _registry

    registry = _registry()
    assert registry is not None
    cache, commit = tmp_path / "models--neuronpedia--jacobian-lens", registry.get("revision", "0" * 40)
    held = cache / "snapshots" / commit / registry["gpt2-small"]["filename"]
    held.parent.mkdir(parents=True)
    if "revision" not in registry:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)
    held.write_bytes(lens_file.read_bytes())
    wanted = ql.signatures(
        ASSETS / "sae_layer1", model, transport=ql.import_jacobian_lens(lens_file, model), features="0:8", k=5
    )
    for transport in (str(lens_file), "gpt2-small", registry["gpt2-small"]["aliases"][0]):
        found = ql.signatures(ASSETS / "sae_layer1", model, transport=transport, features="0:8", k=5)
        assert torch.equal(found.top_ids, wanted.top_ids)
    with pytest.raises(FileNotFoundError, match="no published Jacobian lens; known are"):
        ql.signatures(ASSETS / "sae_layer1", model, transport="nobody's model", features="0:8")
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        ql.signatures(ASSETS / "sae_layer1", model, transport="gemma-2-2b", features="0:8")


@pytest.mark.parametrize(
    ("format", "option", "said"),
    [
        ("circuit-tracer", ("--features", "0:3"), "--features has no meaning for --format circuit-tracer"),
        ("delphi", ("--sample", "x.parquet"), "--sample has no meaning for --format delphi"),
        ("saedashboard", ("--release", "x"), "--release has no meaning for --format saedashboard"),
        ("saedashboard", ("--features", "3:1"), "features='3:1' chooses 0 features"),
        ("saedashboard", ("--features", "1,1"), "features='1,1' chooses 2 features; expected at least one, and each"),
    ],
)
def test_export_options_without_effect(tmp_path, format: str, option: tuple[str, str], said: str) -> None:
    names = ("--transcoder-id", "x") if format == "circuit-tracer" else ()
    names = ("--hookpoint", "x") if format == "delphi" else names
    out = tmp_path / "out"
    shared = ("--format", format, "--model", MODEL, "--out", out, *names)
    assert said in call("export", ASSETS / "sae_layer1", *shared, *option, code=2)
    assert not out.exists()
