"""Features in attention circuits against brute force in float64, from the checkpoints' own weights."""

from pathlib import Path

import pytest
import relations_oracle as oracle
import torch
from test_relations_flow import Largest
from tiny_models import D_MODEL, save_tiny_model

import querylens_fast as ql
from querylens_fast.relations.profiles import QUANTILES, strengths

LAYER, K = 2, 5


@pytest.fixture(scope="module", params=("gpt2", "gemma3", "qwen3"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return ql.load_model(folder, dtype="float64")


def dictionary(seed: int, n: int, layer: int, name: str) -> ql.Dictionary:
    values, keys = torch.randn(2, n, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ql.directions(values, keys=keys, layer=layer, name=name)


FEATURES, OTHERS, LATER = dictionary(1, 23, 1, "f"), dictionary(2, 19, 0, "g"), dictionary(3, 17, 2, "later")


@torch.no_grad()
def circuits(model: ql.Model, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(QK [D, D] with score fᵀ QK g, OV [D, D] that writes OV f), every scale included, of one query head."""
    config, layer = model.source.config, oracle.layer_of(model.source, LAYER)
    E = layer.q.shape[0] // layer.n_heads
    kv = head // (layer.n_heads // layer.n_kv_heads)
    eye = torch.eye(D_MODEL, dtype=torch.float64)
    seen = oracle.through(eye, layer.attention_gain, layer.centred).T
    q, k = layer.q[head * E : (head + 1) * E] @ seen, layer.k[kv * E : (kv + 1) * E] @ seen
    scale = E**-0.5
    if config.model_type == "gpt2":
        scale /= LAYER + 1
    else:
        attention = model.source.model.layers[LAYER].self_attn
        one = 1 if config.model_type == "gemma3_text" else 0
        q = q * (one + attention.q_norm.weight)[:, None]
        k = k * (one + attention.k_norm.weight)[:, None]
        scale = attention.scaling
    written = oracle.ov(layer, head) @ seen * layer.after_attention[:, None]
    return scale * q.T @ k, written


def scores_of(model: ql.Model, circuit: str, head: int) -> torch.Tensor:
    QK, OV = circuits(model, head)
    f = FEATURES.values(slice(None))
    return f @ QK @ OTHERS.values(slice(None)).T if circuit == "QK" else (OV @ f.T).T @ LATER.keys(slice(None)).T


@pytest.mark.parametrize("circuit, other", [("QK", OTHERS), ("OV", LATER)])
def test_pairs_by_brute_force(model: ql.Model, circuit: str, other: ql.Dictionary, tmp_path: Path) -> None:
    settings = {"layer": LAYER, "circuit": circuit, "other": other, "k": K, "progress": False}
    by_feature = ql.attention_pairs(FEATURES, model, per="feature", out=tmp_path / "f.parquet", **settings).pandas()
    by_head = ql.attention_pairs(FEATURES, model, out=tmp_path / "h.parquet", **settings).pandas()
    for head in range(4):
        scores = scores_of(model, circuit, head)
        for side, largest in (("top", True), ("bottom", False)):
            mine = by_feature[(by_feature["head"] == head) & (by_feature.side == side)]
            expected = scores.topk(K, largest=largest)
            assert torch.allclose(torch.tensor(mine.score.to_numpy()).view(-1, K), expected.values)
            assert torch.equal(torch.tensor(mine.target_id.to_numpy()).view(-1, K), expected.indices)
            assert list(mine.source_id[::K]) == list(range(23))
            mine = by_head[(by_head["head"] == head) & (by_head.side == side)]
            best = scores.flatten().topk(K, largest=largest)
            assert torch.allclose(torch.tensor(mine.score.to_numpy()), best.values)
            pairs = mine.source_id.to_numpy() * scores.shape[1] + mine.target_id.to_numpy()
            assert pairs.tolist() == best.indices.tolist() and list(mine["rank"]) == list(range(K))
    assert (by_head.circuit == circuit).all() and (by_head.attention_layer == LAYER).all()


def test_more_pairs_than_a_feature_has(model: ql.Model) -> None:
    """k beyond the other dictionary's width: still the best of all pairs."""
    frame = ql.attention_pairs(
        FEATURES, model, layer=LAYER, other=OTHERS, heads=[3], k=50, features=range(4, 9)
    ).pandas()
    scores = scores_of(model, "QK", 3)[4:9]
    assert torch.allclose(torch.tensor(frame[frame.side == "top"].score.to_numpy()), scores.flatten().topk(50).values)
    assert set(frame.source_id) <= set(range(4, 9)) and set(frame["head"]) == {3}


def test_scores_are_attention_logits(tmp_path: Path) -> None:
    """Without rotation, and with its stream as large as the norm makes it, a QK score is the attention's own logit."""
    model = ql.load_model(save_tiny_model("gpt2", tmp_path), dtype="float64")
    attention = model.blocks[LAYER].attention
    x = torch.randn(2, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = x - x.mean(-1, keepdim=True)
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    features = ql.directions(x, layer=1)
    frame = ql.attention_pairs(features, model, layer=LAYER, k=2, per="feature").pandas()
    normed = attention.norm(x) - attention.norm.bias  # type: ignore[union-attr]
    for head in range(4):
        rows = slice(head * 6, head * 6 + 6)
        logits = attention.scale * (normed @ attention.W_Q[rows].T) @ (normed @ attention.W_K[rows].T).T
        mine = frame[(frame["head"] == head) & (frame.side == "top")].sort_values(["source_id", "target_id"])
        # The norm's ε is what remains.
        assert torch.allclose(torch.tensor(mine.score.to_numpy()).view(2, 2), logits, rtol=1e-4)


def test_strengths_by_brute_force(model: ql.Model) -> None:
    values = FEATURES.values(slice(None)).clone()
    values[4] = 0
    found = strengths(model, LAYER, values)
    lengths = values.norm(dim=1).clamp_min(1e-300)
    for head in range(4):
        QK, OV = circuits(model, head)
        expected = torch.stack([(values @ QK).norm(dim=1), (values @ QK.T).norm(dim=1), (values @ OV.T).norm(dim=1)])
        assert torch.allclose(found[:, head], expected / lengths)


def test_profiles_by_brute_force(model: ql.Model, tmp_path: Path) -> None:
    semantic = ql.output_features(FEATURES, model, level=0.5, n_random=64)
    predicts = torch.tensor(semantic.pandas().predicts.to_numpy())
    assert 0 < predicts.sum() < len(predicts)
    frame = ql.attention_profiles(
        FEATURES, model, semantic=[semantic], out=tmp_path / "p.parquet", progress=False
    ).pandas()
    assert set(frame.attention_layer) == {2} and len(frame) == 3 * 4 * 2
    found = strengths(model, LAYER, FEATURES.values(slice(None))).double()
    for row in frame.itertuples():
        role = ["query", "key", "OV"].index(row.role)
        groups = found[role, row.head, predicts], found[role, row.head, ~predicts]
        own = groups[row.group == "other"]
        assert row.n == len(own) and abs(row.mean - float(own.mean())) < 1e-9
        names = ("q05", "q25", "q50", "q75", "q95")
        mine = torch.tensor([getattr(row, name) for name in names])
        assert torch.allclose(mine.double(), own.quantile(torch.tensor(QUANTILES, dtype=own.dtype)))
        wins = (groups[0][:, None] > groups[1]).double() + 0.5 * (groups[0][:, None] == groups[1]).double()
        assert abs(row.separation - float(wins.mean())) < 1e-12
    both = ql.attention_profiles([OTHERS, FEATURES], model)
    assert set(zip(both.pandas().source_layer, both.pandas().attention_layer, strict=True)) == {(0, 1), (0, 2), (1, 2)}


def test_no_semantic_features(model: ql.Model) -> None:
    never = {"kurtosis": 1e9, "string_similarity": 2.0, "embedding_similarity": 2.0}
    none = ql.output_features(FEATURES, model, thresholds=never)
    frame = ql.attention_profiles(FEATURES, model, semantic=[none]).pandas()
    empty = frame[frame.group == "semantic"]
    assert (empty.n == 0).all() and empty["mean"].isna().all() and frame.separation.isna().all()
    assert (frame[frame.group == "other"].n == 23).all()


def test_mistakes(model: ql.Model) -> None:
    with pytest.raises(ValueError, match="writes after the attention of layer 1 has read"):
        ql.attention_pairs(FEATURES, model, layer=1)
    with pytest.raises(ValueError, match="'later' writes after"):
        ql.attention_pairs(FEATURES, model, layer=2, other=LATER)
    with pytest.raises(ValueError, match="reads before the attention of layer 2 has written"):
        ql.attention_pairs(FEATURES, model, layer=2, circuit="OV", other=OTHERS)
    with pytest.raises(ValueError, match="pass other="):
        ql.attention_pairs(FEATURES, model, layer=2, circuit="OV")
    with pytest.raises(ValueError, match="heads 0 to 3"):
        ql.attention_pairs(FEATURES, model, layer=2, heads=[4])
    with pytest.raises(ValueError, match="has layers 0 to 2"):
        ql.attention_pairs(FEATURES, model, layer=3)
    with pytest.raises(ValueError, match="circuit, per are 'VO'"):
        ql.attention_pairs(FEATURES, model, layer=2, circuit="VO")  # type: ignore[arg-type]
    semantic = ql.output_features(OTHERS, model)
    with pytest.raises(ValueError, match="not output_features of 'f'"):
        ql.attention_profiles(FEATURES, model, semantic=[semantic])
    some = ql.output_features(FEATURES, model, features=[1, 2])
    with pytest.raises(ValueError, match="leaves features out"):
        ql.attention_profiles(FEATURES, model, semantic=[some])
    with pytest.raises(ValueError, match="no attention layer asked for"):
        ql.attention_profiles(LATER, model)
    with pytest.raises(ValueError, match="layer is 7, but model"):
        ql.attention_profiles(FEATURES, model, layers=[7])


def test_attention_without_single_weights(tmp_path: Path) -> None:
    model = ql.load_model(save_tiny_model("gpt2", tmp_path), linearisation="autodiff")
    for refused in (
        lambda: ql.attention_pairs(FEATURES, model, layer=2),
        lambda: ql.attention_profiles(FEATURES, model),
        lambda: ql.downstream(FEATURES, model, targets="blocks.2.attn.W_Q"),
    ):
        with pytest.raises(ql.UnsupportedModelError, match="no single W_Q"):
            refused()


def test_no_matrix_of_features_by_features(model: ql.Model) -> None:
    n = 12_000
    many = ql.directions(torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(0)), layer=1)
    with Largest() as largest:
        for per in ("head", "feature"):
            ql.attention_pairs(many, model, layer=2, heads=[1], k=8, per=per)
    assert 0 < largest.bytes <= 1 << 27 < 4 * n * n / 4
