"""The commands that test signatures, on the embedded model: sample, steer, judge, evaluate report."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.demo import ASSETS
from querylens_fast.dictionaries.feature_lists import load_features

SAE, MODEL = str(ASSETS / "sae_layer1"), str(ASSETS / "model")


def run(*args: str) -> str:
    found = CliRunner().invoke(app, list(args))
    assert found.exit_code == 0, found.output
    return found.stdout


def refused(*args: str) -> str:
    found = CliRunner().invoke(app, list(args))
    assert found.exit_code == 2
    return found.output + found.stderr


def test_sample(tmp_path: Path) -> None:
    tokens = tmp_path / "text.safetensors"
    ql.load_tokens(ASSETS / "tokens.safetensors").head(8).save(tokens)
    out, lists = tmp_path / "sample.parquet", tmp_path / "features.json"
    args = ["--n-examples", "3", "--lists", str(lists), "--features", "2", "--min-examples", "4"]
    assert "features are active" in run("sample", SAE, MODEL, str(tokens), "--out", str(out), *args)
    assert ql.load_feature_sample(out).density.max() > 0
    assert [len(f.activations or []) for f in load_features(lists)] == [3, 3]


def test_steer() -> None:
    output = run("steer", SAE, MODEL, "3", "--strength", "8", "--prompt", "def f(", "--n-tokens", "3")
    assert output.count("def f(") == 2
    assert "2048" in refused("steer", SAE, MODEL, "2048", "--strength", "8", "--prompt", "def f(")


def test_judge(tmp_path: Path) -> None:
    result, requests, answers, out = (
        tmp_path / n for n in ("s.parquet", "requests.jsonl", "answers.jsonl", "judged.parquet")
    )
    model = ql.load_model(MODEL)
    ql.signatures(SAE, model, preset="logit_lens_value", features=range(40), out=result, progress=False)
    assert "7 token lists" in run("judge", str(result), "--requests", str(requests), "--features", "7")
    lines = [json.loads(line) for line in requests.read_text(encoding="utf-8").splitlines()]
    content = json.dumps({"Score": 6, "Summary": "a theme", "Explanation": "why"})
    with answers.open("w", encoding="utf-8") as file:
        for line in lines[1:]:
            body = {"choices": [{"message": {"content": content}}]}
            file.write(json.dumps({"custom_id": line["custom_id"], "response": {"body": body}}) + "\n")
    args = ["judge", str(result), "--answers", str(answers), "--features", "7", "--out", str(out)]
    said = run(*args)
    assert "logit_lens_value: mean 6.00 of 6 token lists" in said and "6 of 7 token lists judged" in said
    table = ql.read_table(out)
    scores = table.table(["interpretability"])["interpretability"].to_pylist()
    assert scores.count(6.0) == 6 and scores.count(None) == 1
    assert table.metadata["judge"] == "gpt-5-nano" and len(table.metadata["prompt"]) == 16
    assert run(*args) == said  # again, as after Ctrl-C
    with answers.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"custom_id": lines[0]["custom_id"], "response": {"body": body}}) + "\n")
    assert "answers" in refused(*args)
    assert "--requests" in refused("judge", str(result))
    other = tmp_path / "other.parquet"
    ql.signatures(SAE, model, preset="logit_lens_key", features=range(40, 44), out=other, progress=False)
    assert "has an answer" in refused("judge", str(other), "--answers", str(answers))


@pytest.mark.parametrize("args", [["--tokens", "x"], [MODEL, "--tokens", "x"], [MODEL, SAE], ["--k", "5,x"]])
@pytest.mark.parametrize("command", ["scores", "report"])
def test_arguments(command: str, args: list[str], tmp_path: Path) -> None:
    assert "expected" in (said := refused("evaluate", command, *args, "--out", str(tmp_path / "out"))) or (
        "dictionaries" in said
    )
    assert not (tmp_path / "out").exists()


def scoring(folder: Path, out: Path) -> list[str]:
    """A command that scores few features of one dictionary."""
    tokens = folder / "text.safetensors"
    whole = ql.load_tokens(ASSETS / "tokens.safetensors")
    ql.Tokens(whole.ids[16:56, :32].contiguous(), whole.valid_mask[16:56, :32].contiguous()).save(tokens)
    (folder / "prefixes.txt").write_text("def f(\nimport os\nreturn self\n")
    args = ["evaluate", "scores", MODEL, SAE, "--tokens", str(tokens), "--out", str(out), "--k", "5,25"]
    args += ["--methods", "logit_lens_key,query_lens_key,token_change@5", "--n-features", "4", "--min-examples", "5"]
    return [*args, "--fit-sequences", "4", "--prefixes", str(folder / "prefixes.txt")]


@pytest.mark.slow
def test_scores_over_two_processes(tmp_path: Path) -> None:
    """The rows of one process; the transport, a sum over processes, may differ in the last bits and so near-ties."""
    from test_ranks import torchrun

    done = torchrun(scoring(tmp_path, tmp_path / "two"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("24 rows") == 1
    run(*scoring(tmp_path, tmp_path / "one"))
    one, two = (pq.read_table(tmp_path / n / "scores.parquet").to_pandas() for n in ("one", "two"))
    assert (one[["method", "source_id", "k"]] == two[["method", "source_id", "k"]]).all(None)
    assert (one.output_score - two.output_score).abs().max() <= 0.1


@pytest.mark.slow
def test_input_score_over_two_processes(tmp_path: Path) -> None:
    """One table, and the means of one process but for what the order of a sum makes of near-ties."""
    from test_ranks import torchrun

    files = {"--model": "model", "--dictionary": "sae_layer2", "--tokens": "tokens.safetensors"}
    args = ["evaluate", "input", *(word for flag, name in files.items() for word in (flag, str(ASSETS / name)))]
    args += ["--presets", "logit_lens_key,query_lens_key_approx", "--examples", "5", "--min-examples", "5", "--out"]
    done = torchrun([*args, str(tmp_path / "two.json")], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Input score") == 1
    run(*args, str(tmp_path / "one.json"))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [row["mean"] for row in one] == pytest.approx([row["mean"] for row in two], abs=2e-3)


def test_scores(tmp_path: Path) -> None:
    """One Parquet row a feature, method and k; a second call computes nothing again; what is gained is shown."""
    out = tmp_path / "out"
    args = scoring(tmp_path, out)
    said = run(*args)
    assert "of 4 features pass input_score under query_lens_key and not under logit_lens_key" in said
    assert "pass coherent under query_lens_key" in said
    frame = pq.read_table(out / "scores.parquet").to_pandas()
    assert len(frame) == 4 * 3 * 2 and frame.output_score.notna().all()
    assert (frame.top_ids.map(len) == frame.k).all()
    requests = tmp_path / "requests.jsonl"
    assert "6 token lists" in run("judge", str(out / "scores.parquet"), "--requests", str(requests), "--features", "2")
    before = (out / "scores.parquet").read_bytes()
    assert run(*args) == said and (out / "scores.parquet").read_bytes() == before
    assert "other" in refused(*args, "--seed", "1")


def test_what_a_method_lacks_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    transport, out = tmp_path / "transport.safetensors", tmp_path / "out"
    model = ql.load_model(MODEL)
    ql.fit_transport(model, torch.arange(8)[None], sides=("value",), orders=("full",), progress=False).save(transport)
    common = ["--tokens", str(ASSETS / "tokens.safetensors"), "--out", str(out), "--transport", str(transport)]
    for given, said in (
        (["--methods", "logit_lens_value,tuned_lens"], "needs tuned_lens="),
        (["--methods", "logit_lens_value,query_lens_value_adaptive"], "needs energies"),
        (["--methods", "logit_lens_value,query_lens_key"], "fit it with sides and orders to match"),
        (["--methods", "logit_lens_value", "--k", "0"], "k is 0"),
        (["--methods", "logit_lens_value", "--k", "999999"], "k is 999999"),
    ):
        assert said in refused("evaluate", "scores", MODEL, SAE, *common, *given)
    assert not list(out.glob("sample*"))
