"""Output features against brute force on whole rows of logits, strings and embeddings."""

import math
from itertools import combinations
from pathlib import Path

import pytest
import relations_oracle as oracle
import torch
from test_relations_flow import Largest
from tiny_models import D_MODEL, VOCAB, save_tiny_model

import querylens_fast as ql
from querylens_fast.relations.output_features import MEASURES, random_directions

K = 4


@pytest.fixture(scope="module", params=("gpt2", "gemma3", "qwen3"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return ql.load_model(folder, dtype="float64")


@pytest.fixture(scope="module")
def features() -> ql.Dictionary:
    return ql.directions(torch.randn(29, D_MODEL, generator=torch.Generator().manual_seed(1)).double(), layer=1)


def dice(a: str, b: str) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two words' sets of bigrams."""
    first, second = ({w[i : i + 2] for i in range(max(1, len(w) - 1))} for w in (a.strip().lower(), b.strip().lower()))
    return 2 * len(first & second) / (len(first) + len(second))


@torch.no_grad()
def expected(model: ql.Model, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every measure, row by row."""
    logits = oracle.final_logits(model.source, values)
    centred = logits - logits.mean(1, keepdim=True)
    moments = {p: centred.pow(p).mean(1) for p in (2, 3, 4)}
    log_p = logits.log_softmax(1)
    top = logits.topk(K)
    embedded = oracle.embeddings(model.source)
    embedded = embedded - embedded.mean(0)
    strings, cosines = [], []
    for ids in top.indices.tolist():
        pairs = list(combinations(ids, 2))
        texts = model.str_tokens(range(VOCAB))
        strings.append(sum(dice(texts[a], texts[b]) for a, b in pairs) / len(pairs))
        angles = [torch.cosine_similarity(embedded[a], embedded[b], dim=0) for a, b in pairs]
        cosines.append(float(sum(angles)) / len(pairs))
    return {
        "mean": logits.mean(1),
        "deviation": moments[2].sqrt(),
        "skewness": moments[3] / moments[2] ** 1.5,
        "kurtosis": moments[4] / moments[2] ** 2 - 3,
        "entropy": -(log_p.exp() * log_p).sum(1),
        "top_score": top.values[:, 0],
        "top_mass": log_p.exp().gather(1, top.indices).sum(1),
        "string_similarity": torch.tensor(strings),
        "embedding_similarity": torch.tensor(cosines),
    }


def test_by_brute_force(model: ql.Model, features: ql.Dictionary, tmp_path: Path) -> None:
    given = {"kurtosis": -0.3, "string_similarity": 0.4, "embedding_similarity": -0.05}
    found = ql.output_features(features, model, k=K, thresholds=given, out=tmp_path / "o.parquet", progress=False)
    frame = found.pandas()
    measures = expected(model, features.values(slice(None)))
    for name, values in measures.items():
        assert torch.allclose(torch.tensor(frame[name].to_numpy()), values.double(), atol=1e-6), name
    beyond = {name: measures[name] > given[name] for name in MEASURES}
    predicts = beyond["kurtosis"] & (beyond["string_similarity"] | beyond["embedding_similarity"])
    assert frame.predicts.tolist() == predicts.tolist() and 0 < predicts.sum() < len(predicts)
    assert found.metadata["thresholds"] == given
    logits = oracle.final_logits(model.source, features.values(slice(None)))
    for text, ids in zip(frame.tokens, logits.topk(K).indices.tolist(), strict=True):
        assert text == " ".join(map(repr, model.str_tokens(ids)))


def test_thresholds_are_those_of_chance(model: ql.Model, features: ql.Dictionary) -> None:
    found = ql.output_features(features, model, k=K, level=0.9, n_random=200, seed=3)
    chance = expected(model, random_directions(features, 200, 3).values(slice(None)).double())
    for name in MEASURES:
        assert math.isclose(
            found.metadata["thresholds"][name], float(chance[name].double().quantile(0.9)), abs_tol=1e-6
        )
    again = ql.output_features(features, model, k=K, level=0.9, n_random=200, seed=3)
    assert again.metadata == found.metadata and again.table().equals(found.table())


def test_transported(model: ql.Model, features: ql.Dictionary, sample: ql.Tokens) -> None:
    transport = ql.fit_transport(model, sample, progress=False)
    found = ql.output_features(features, model, preset="query_lens_value", transport=transport, k=K)
    moved = transport.apply(features.values(slice(None)), "value", "full", features.point("value"))
    assert torch.allclose(torch.tensor(found.pandas()["kurtosis"].to_numpy()), expected(model, moved)["kurtosis"])


def test_mistakes(model: ql.Model, features: ql.Dictionary) -> None:
    with pytest.raises(ValueError, match="does not read out a value vector"):
        ql.output_features(features, model, preset="logit_lens_key")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ql.output_features(features, model, k=1)
    with pytest.raises(ValueError, match="thresholds are of entropy"):
        ql.output_features(features, model, thresholds={"entropy": 1.0})
    with pytest.raises(ValueError, match="level, n_random are 1.5"):
        ql.output_features(features, model, level=1.5)


def test_nothing_of_features_by_vocabulary(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    n, V = 8000, 30_000
    model = ql.load_model(save_tiny_model("gpt2", tmp_path))
    model.W_E = model.W_U = torch.randn(V, D_MODEL, generator=generator)
    model.b_U = None
    dictionary = ql.directions(torch.randn(n, D_MODEL, generator=generator), layer=1)
    with Largest() as largest:
        assert len(ql.output_features(dictionary, model)) == n
    assert 0 < largest.bytes <= 1 << 27 < 4 * n * V / 4
