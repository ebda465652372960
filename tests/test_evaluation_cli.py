"""The commands that test signatures, on the embedded model: sample, steer, judge, evaluate report."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.demo import ASSETS

SAE, MODEL = str(ASSETS / "sae_layer1"), str(ASSETS / "model")


def run(*args: str) -> str:
    found = CliRunner().invoke(app, list(args))
    assert found.exit_code == 0, found.output
    return found.output


def refused(*args: str) -> str:
    found = CliRunner().invoke(app, list(args))
    assert found.exit_code == 2
    return found.output + found.stderr


def test_sample(tmp_path: Path) -> None:
    tokens = tmp_path / "text.safetensors"
    ql.load_tokens(ASSETS / "tokens.safetensors").head(8).save(tokens)
    out = tmp_path / "sample.parquet"
    assert "features are active" in run("sample", SAE, MODEL, str(tokens), "--out", str(out), "--n-examples", "3")
    assert ql.load_feature_sample(out).density.max() > 0


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
    assert "7 features" in run("judge", str(result), "--requests", str(requests), "--features", "7")
    lines = [json.loads(line) for line in requests.read_text(encoding="utf-8").splitlines()]
    content = json.dumps({"Score": 6, "Summary": "a theme", "Explanation": "why"})
    with answers.open("w", encoding="utf-8") as file:
        for line in lines[1:]:
            body = {"choices": [{"message": {"content": content}}]}
            file.write(json.dumps({"custom_id": line["custom_id"], "response": {"body": body}}) + "\n")
    args = ["judge", str(result), "--answers", str(answers), "--features", "7", "--out", str(out)]
    assert "6 of 7 features judged, mean score 6.00" in run(*args)
    scores = pq.read_table(out)["score"].to_pylist()
    assert scores.count(6.0) == 6 and scores.count(None) == 1
    assert "--requests" in refused("judge", str(result))
    other = tmp_path / "other.parquet"
    ql.signatures(SAE, model, preset="logit_lens_key", features=range(40, 44), out=other, progress=False)
    assert "has an answer" in refused("judge", str(other), "--answers", str(answers))


@pytest.mark.parametrize("args", [["--tokens", "x"], [MODEL, "--tokens", "x"], [MODEL, "--dictionary", SAE]])
def test_report_arguments(args: list[str], tmp_path: Path) -> None:
    assert "--dictionary" in refused("evaluate", "report", *args, "--out", str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()
