"""The page where texts are tried, on the embedded model and one of its dictionaries."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

import querylens_fast as ql
from querylens_fast.demo import ASSETS
from querylens_fast.lens.ablations import activations
from querylens_fast.queries.results import open_results
from querylens_fast.serve import try_it
from querylens_fast.serve.app import create_app


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some features of the embedded dictionary of layer 1, as "sae_layer1"."""
    out = tmp_path_factory.mktemp("embedded") / "few.parquet"
    source, model = ql.load_dictionary(ASSETS / "sae_layer1"), ql.load_model(ASSETS / "model")
    ql.signatures(source, model, preset="logit_lens_value", k=5, features=range(9), out=out, progress=False)
    return out


@pytest.fixture(scope="module")
def trying(embedded: Path) -> Iterator[TestClient]:
    app = create_app(open_results(embedded), model=ASSETS / "model", run={"sae_layer1": ASSETS / "sae_layer1"})
    with TestClient(app, base_url="http://127.0.0.1") as made:
        yield made


def test_another_dictionary_or_model_than_the_results_is_refused(embedded: Path) -> None:
    results = open_results(embedded)
    for name, other, words in (
        ("sae_layer1", "sae_layer2", "is not the dictionary"),
        ("sae_layer9", "sae_layer1", "needs the name of one of them"),
    ):
        with pytest.raises(ValueError, match=words):
            create_app(results, model=ASSETS / "model", run={name: ASSETS / other})
    model = ql.load_model(ASSETS / "model")
    with torch.no_grad():
        next(model.source.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="is not the model"):
        create_app(
            results,
            model=ql.as_model(model.source, tokenizer=model.tokenizer),
            run={"sae_layer1": ASSETS / "sae_layer1"},
        )


def test_a_text_is_tried(trying: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    page = trying.get("/try", params={"dictionary": "sae_layer1", "text": "def parse(self):\n    return <b>"})
    assert page.status_code == 200 and "Features at each token" in page.text and "<b>\n" not in page.text
    tried: try_it.TryIt = trying.app.state.try_it  # type: ignore[attr-defined]
    firing = tried.firing("sae_layer1", "def parse(self")
    acts = activations_of(tried, "def parse(self")
    assert len(firing.tokens) == len(acts)
    for token, own in zip(firing.tokens, acts, strict=True):
        best = sorted(own.tolist(), reverse=True)[: len(token.features)]
        assert [v for _, v in token.features] == pytest.approx(best)
    assert max(f.maximum for f in firing.features) == pytest.approx(float(acts.max()))
    steered = {"dictionary": "sae_layer1", "prompt": "def f(", "feature": "656", "strength": "12", "n": "3"}
    page = trying.get("/try", params=steered)
    direct = ql.steer(tried.model, tried.dictionaries["sae_layer1"], 656, 12.0, "def f(", n_tokens=3)
    assert page.status_code == 200 and "With feature" in page.text
    assert tried.steer("sae_layer1", 656, 12.0, "def f(", 3) == direct
    for change, words in (
        ({"feature": "999999"}, "999999"),
        ({"n": "61"}, "expected 1 to 60"),
        ({"strength": "inf"}, "finite"),
        ({"strength": "strong"}, "expected a number"),
        ({"prompt": "x" * 2001}, "at most 2000"),
        ({"prompt": "x y " * 400}, "expected 1 to 256"),
    ):
        answer = trying.get("/try", params=steered | change)
        assert answer.status_code == 422 and words in answer.text and "Not computed" in answer.text
    assert trying.get("/try?dictionary=other&text=x").status_code == 404
    longest = trying.get("/try", params={"dictionary": "sae_layer1", "text": "日" * try_it.MAX_CHARACTERS})
    assert longest.status_code == 422 and "tokens; expected" in longest.text, "its address is not too long"
    monkeypatch.setattr(try_it, "MAX_SECONDS", -1.0)
    assert "took longer" in trying.get("/try", params=steered).text
    monkeypatch.setattr(try_it, "MAX_SECONDS", 0.0)
    with tried._lock:
        assert "computing for another page" in trying.get("/try", params=steered).text


def activations_of(tried: try_it.TryIt, text: str) -> torch.Tensor:
    ids = torch.tensor([tried.model.tokenizer(text)["input_ids"]])
    return activations(tried.model, tried.dictionaries["sae_layer1"], ids)[0]
