"""The command line, end to end, as a newcomer runs it."""

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from golden_cases import golden
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.demo import showcase
from querylens_fast.demo.showcase import PRESETS, load_example
from querylens_fast.evaluation.means import MeanScore, mean_scores
from querylens_fast.evaluation.methods import Context, find_methods, fit_for
from querylens_fast.evaluation.scores import Case, labels_of, score_methods

CASE = golden("gpt2-standard-sae")


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    return result.output + (result.stderr if result.stderr_bytes else "")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files; its transport is fitted on fewer sequences than a user's."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "FIT_SEQUENCES", 4)
        output = call("demo", "--out", folder)
    assert "10240 features × 4 signatures in" in output and str(folder) in output
    assert "Query:" in output and "sae_layer3" in output and "transcoder_layer1" in output
    return folder


def test_demo_files_are_what_the_interface_gives(demo_folder: Path) -> None:
    example = load_example()
    transport = ql.load_transport(demo_folder / "transport.safetensors")
    assert transport.metadata["tokens_digest"] == ql.load_tokens(demo_folder / "tokens.safetensors").digest
    assert len(list(demo_folder.glob("*.parquet"))) == len(example.dictionaries) * len(PRESETS)
    table = pq.read_table(demo_folder / "sae_layer2.query_lens_key.parquet")
    assert table.num_rows == 2048 and {"rel_var", "rel_var_se", "top_tokens", "bottom_ids"} <= set(table.column_names)
    found = ql.signatures(
        example.dictionaries[2], example.model, preset="query_lens_key", transport=transport, features=[7, 2000]
    )
    assert table["top_ids"].take([7, 2000]).to_pylist() == found.top_ids.tolist()
    assert table["top_tokens"].take([7]).to_pylist() == found.top_tokens[:1]


def test_a_demo_beside_one_of_an_earlier_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to a folder of its own, where it is found again; into the other one it is refused by name."""
    example = load_example()
    small = dataclasses.replace(
        example, dictionaries=example.dictionaries[:1], fit_tokens=example.fit_tokens.head(1),
        held_out=example.held_out.head(24),
    )  # fmt: skip
    monkeypatch.setattr(showcase, "load_example", lambda assets: small)
    monkeypatch.setattr(showcase, "QUARTILE_EXAMPLES", 5)
    monkeypatch.chdir(tmp_path)
    earlier = Path("querylens_demo") / "sae_layer0.logit_lens_key.parquet"
    ql.signatures(small.dictionaries[0], small.model, preset="logit_lens_key", out=earlier, progress=False)
    before = earlier.read_bytes()
    assert "holds results of an earlier version or with another k; these are in querylens_demo-2" in call("demo")
    result = Path("querylens_demo-2") / earlier.name
    made = result.stat()
    assert "these are in querylens_demo-2" in call("demo") and result.stat().st_mtime_ns == made.st_mtime_ns
    assert list(earlier.parent.iterdir()) == [earlier] and earlier.read_bytes() == before
    told = " ".join(refused("demo", "--out", earlier.parent).split())
    assert "of an earlier version or with another k: delete the folder or give another --out" in told
    assert "different: histogram" in told and list(earlier.parent.iterdir()) == [earlier]


def input_scores(
    sources: list[ql.Dictionary],
    model: ql.Model,
    held_out: ql.Tokens,
    fit: ql.Tokens,
    names: list[str],
    least: int,
) -> list[MeanScore]:
    """Means of the input score, with what the presets need fitted on ``fit``."""
    cases = []
    for dictionary, label in zip(sources, labels_of(sources), strict=True):
        sample = ql.feature_sample(dictionary, model, held_out, progress=False)
        cases.append(Case(dictionary, label, sample.choose(dictionary.n_features, least), sample))
    methods = find_methods(names)
    context = Context(model, fit_for(methods, model, fit))
    return mean_scores(score_methods(cases, context, methods, coherence=False))


def test_the_engine_names_what_activates_features() -> None:
    """The paper's finding on the input side: Query Lens keys hold the activating tokens far more often."""
    example, names = load_example(), ["logit_lens_key", "query_lens_key"]
    held_out, fit = example.held_out.head(64), example.fit_tokens.head(4)
    scores = input_scores(example.dictionaries[:2], example.model, held_out, fit, names, least=5)
    mean = {s.method: s.mean for s in scores if s.dictionary is None}
    assert mean["query_lens_key"] > 0.2 and mean["query_lens_key"] > 5 * mean["logit_lens_key"]
    for score in scores:
        assert score.low <= score.mean <= score.high and score.n_features > 500


def test_dictionaries_of_one_name_are_judged_by_their_own_tokens() -> None:
    """And the adaptive preset gets the transport that it needs."""
    example = load_example()
    two = [dataclasses.replace(d, name="model/hook") for d in example.dictionaries[1:3]]
    held_out, fit = example.held_out.head(24), example.held_out.head(2)
    names = ["query_lens_key", "query_lens_value_adaptive"]
    scores = input_scores(two, example.model, held_out, fit, names, least=1)
    assert [s.dictionary for s in scores] == ["model/hook (0)", "model/hook (1)", None] * 2
    alone = input_scores(two[:1], example.model, held_out, fit, names[:1], least=1)
    assert alone[0].mean == scores[0].mean != scores[1].mean


def test_evaluate_input_of_a_users_files(tmp_path: Path) -> None:
    output = call(
        "evaluate", "input", "--model", CASE.model_path, "--dictionary", CASE.sae_path(0), "--dictionary",
        CASE.sae_path(1), "--tokens", CASE.tokens_path, "--min-examples", 1, "--out", tmp_path / "scores.json",
    )  # fmt: skip
    assert "sae_layer1" in output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores) == 5 * 3 and {s["dictionary"] for s in scores} == {"sae_layer0", "sae_layer1", None}
    assert "its dictionaries" in refused("evaluate", "input", "--model", CASE.model_path)


def test_transport_signatures_and_resume(tmp_path: Path) -> None:
    fitted = tmp_path / "t.safetensors"
    output = call("transport", CASE.model_path, CASE.tokens_path, "--out", fitted, "--energy", "exact")
    assert str(fitted) in output and "over 90 tokens" in output
    out = tmp_path / "s.jsonl"
    arguments = ("signatures", CASE.sae_path(1), CASE.model_path, "--transport", fitted, "--out", out, "--k", 10)
    assert "96 signatures" in call(*arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    expected = CASE.row("query_lens_value", 1, 17)
    assert rows[17]["top_ids"] == expected["top_ids"]
    assert abs(rows[17]["stats"]["rel_var"] - expected["stats"]["rel_var"]) < 1e-3
    before = out.read_bytes()
    call(*arguments)
    assert out.read_bytes() == before


def test_topk_of_two_files(tmp_path: Path) -> None:
    a, b = torch.randn(5, 8), torch.randn(30, 8)
    save_file({"A": a, "B": b}, str(tmp_path / "m.safetensors"))
    spec = f"{tmp_path / 'm.safetensors'}:"
    call("topk", spec + "A", spec + "B", "--k", 3, "--out", tmp_path / "r.safetensors")
    found = load_file(str(tmp_path / "r.safetensors"))
    assert torch.allclose(found["top_scores"], (a @ b.T).topk(3).values)
    assert "no tensor 'C'" in refused("topk", spec + "C", spec + "B")
    assert "expected file.safetensors:name" in refused("topk", "x", "y")


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    for arguments, message in (
        (("signatures", tmp_path / "no", CASE.model_path, "--out", out), "no such file or folder"),
        (("signatures", CASE.sae_path(0), "nobody/nothing", "--out", out), "neither a readable local folder"),
        (("signatures", CASE.sae_path(0), CASE.model_path, "--out", out), "needs transport="),
        (("signatures", CASE.sae_path(0), CASE.model_path, "--out", out, "--preset", "x"), "unknown preset 'x'"),
        (("transport", CASE.model_path, tmp_path / "no.safetensors"), "does not exist"),
        (("transport", CASE.model_path, CASE.tokens_path, "--energy", "all"), "energy is"),
        (("convert-features", tmp_path / "no.pkl", tmp_path / "f.json"), "no.pkl"),
    ):
        output = refused(*arguments)
        assert "error:" in output and message in output.replace("\n", ""), output
        assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_benchmarks_start_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call("bench", "lens", "--help")
    refused("bench", "lens", "--no-such-option")
