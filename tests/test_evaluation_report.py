"""The report on a small part of the demo: its files, its page, and that an interrupted one goes on."""

import json
import re
from pathlib import Path

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo.showcase import load_example
from querylens_fast.evaluation.report import Report, evaluation_report

OPTIONS = {
    "fit_sequences": 4,
    "n_features": 4,
    "min_examples": 5,
    "methods": (
        "logit_lens_value",
        "query_lens_value_approx",
        "query_lens_value",
        "query_lens_value_adaptive",
        "logit_lens_key",
        "query_lens_key",
    ),
    "k": (5, 25),
    "progress": False,
}


def dictionaries() -> list[ql.Dictionary]:
    """Of the first and the last layer."""
    return load_example().dictionaries[:4:3]


@pytest.fixture(scope="module")
def tokens() -> ql.Tokens:
    example = load_example()
    return ql.Tokens(example.held_out.ids[:40, :32], example.held_out.valid_mask[:40, :32])


@pytest.fixture(scope="module")
def prefixes() -> torch.Tensor:
    return load_example().held_out.ids[50:60, :5]


@pytest.fixture(scope="module")
def report(tokens: ql.Tokens, prefixes: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Report:
    example = load_example()
    folder = tmp_path_factory.mktemp("report")
    return evaluation_report(example.model, dictionaries(), tokens, folder, prefixes=prefixes, **OPTIONS)


def test_files_and_page(report: Report) -> None:
    names = {path.name for path in report.folder.iterdir()}
    assert names >= {"transport.safetensors", "sample-sae_layer0.parquet", "promoted-sae_layer3.parquet"}
    assert names >= {"scores.parquet", "report.html", "report.json", "figures"} and not any(
        "partial" in n for n in names
    )
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and not re.search(r'(src|href)="https?:', page)
    assert page.count("<svg") >= 5 and "Steered to" in page and "<mark" in page
    for mean in report.means:
        if mean.k == 25 and mean.score == "output_score":
            assert f"{mean.mean:.3f}" in page
    for found in ("only Query Lens", "Stability", 'class="peak"', "by group of layers"):
        assert found in page, found
    pictures = [path.stem for path in (report.folder / "figures").glob("*.svg")]
    assert sorted(pictures) == sorted(path.stem for path in (report.folder / "figures").glob("*.png"))


def test_numbers(report: Report) -> None:
    found = json.loads((report.folder / "report.json").read_text())
    frame = report.scores.pandas()
    for mean in found["means"]:
        own = frame[(frame.method == mean["method"]) & (frame.k == mean["k"])]
        if mean["dictionary"]:
            own = own[own.source == mean["dictionary"]]
            assert mean["mean"] == pytest.approx(own[mean["score"]].mean())
    for label, row in report.oracle.items():
        fixed = [row[m] for m in ("logit_lens_value", "query_lens_value_approx", "query_lens_value")]
        assert row["oracle"] >= max(fixed) - 1e-9, label
    assert {(row.dictionary, row.preset) for row in report.stability} == {
        (label, f"query_lens_{side}") for label in report.oracle for side in ("key", "value")
    }
    assert set(report.rel_var) == {"value/full", "value/first_order", "key/full", "key/first_order"}


def test_an_interrupted_report_goes_on(
    report: Report, tokens: ql.Tokens, prefixes: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scores lost, nothing else is computed again, and the same scores come out."""
    from querylens_fast.evaluation import evaluate as module
    from querylens_fast.evaluation import figures

    example = load_example()
    before = report.scores.pandas()
    (report.folder / "scores.parquet").unlink()
    monkeypatch.setattr(module, "fit_transport", None)
    monkeypatch.setattr(module, "feature_sample", None)
    monkeypatch.setattr(figures, "draw_figures", lambda *_: {})
    again = evaluation_report(example.model, dictionaries(), tokens, report.folder, prefixes=prefixes, **OPTIONS)
    assert again.scores.pandas().equals(before)
    other = ql.Tokens(tokens.ids.flip(0), tokens.valid_mask)
    with pytest.raises(FileExistsError, match="fitted on other tokens"):
        evaluation_report(example.model, dictionaries(), other, report.folder, **OPTIONS)


def test_mistakes(report: Report, tokens: ql.Tokens, tmp_path: Path) -> None:
    example = load_example()
    with pytest.raises(ValueError, match="dictionaries is an empty list"):
        evaluation_report(example.model, [], tokens, tmp_path)
    with pytest.raises(ValueError, match="fit_sequences is 40; expected 1 to 39"):
        evaluation_report(example.model, example.dictionaries[:1], tokens, tmp_path, fit_sequences=40)
    with pytest.raises(ValueError, match="active in 100000 sequences"):
        options = {**OPTIONS, "min_examples": 100_000, "transport": report.folder / "transport.safetensors"}
        evaluation_report(example.model, example.dictionaries[:1], tokens, tmp_path, **options)
