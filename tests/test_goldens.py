"""Parity: the nine presets against the reference's own answers, through the Python interface."""

import pytest
import torch
from golden_cases import CASES, assert_close, assert_same_row, golden

import querylens_fast as ql

TRANSPORTED = ("query_lens_value", "query_lens_key", "query_lens_value_approx", "query_lens_key_approx")
NINE = ("logit_lens_value", "logit_lens_key", *TRANSPORTED, "token_change", "zero_out", "tuned_lens")
# In float32 the reference's own tolerance for vectors and scores is 1e-3.
TOLERANCE = {"float64": 1e-5, "float32": 1e-3}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest):
    return golden(request.param)


@pytest.fixture(scope="module", params=["float64", "float32"])
def fitted(request: pytest.FixtureRequest, case):
    model = ql.load_model(case.model_path, dtype=request.param)
    tokens = ql.load_tokens(case.tokens_path, model=model)
    return model, tokens, ql.fit_transport(model, tokens, energy="exact", progress=False), TOLERANCE[request.param]


def options(case, fitted, preset: str, walked: bool = False) -> dict:
    _, tokens, transport, _ = fitted
    if preset in TRANSPORTED:
        return {"tokens": tokens} if walked else {"transport": transport, "tokens": tokens, "stats": "exact"}
    if preset == "tuned_lens":
        return {"tuned_lens": case.tuned_lens_path}
    return {"tokens": tokens} if preset in ("token_change", "zero_out") else {}


def test_the_sample_is_the_references(case, fitted) -> None:
    model, tokens, transport, tolerance = fitted
    assert torch.equal(tokens.valid_mask, tokens.ids != model.pad_token_id)
    assert_close(transport.centre, case.tensors["mean_embed"], "mean_embed", tolerance)


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize("preset", NINE)
def test_preset(case, fitted, preset: str, walked: bool) -> None:
    if walked and preset not in TRANSPORTED:
        pytest.skip("only transported presets can be walked")
    model, *_, tolerance = fitted
    given = options(case, fitted, preset, walked)
    for layer in case.layers:
        found = ql.signatures(
            ql.load_dictionary(case.sae_path(layer)),
            model,
            preset=preset,
            k=case.k,
            features=case.features,
            layers=preset.endswith("approx"),
            vectors=True,
            **given,
        )
        if f"{preset}.layer{layer}.vector" in case.tensors:
            for name, tensor in (
                ("vector", found.vectors),
                ("top_scores", found.top_scores),
                ("bottom_scores", found.bottom_scores),
            ):
                what = f"{case.name} {preset} layer {layer} {name}"
                assert_close(tensor, case.expected(preset, layer, name), what, tolerance)
            for row in found.rows():
                assert_same_row(row, case, preset, layer, row["feature"], tolerance)
        else:
            assert_ablation(case, found, preset, layer)


def assert_ablation(case, found: ql.Signatures, preset: str, layer: int) -> None:
    """The reference's rows have no scores here: each of its tokens must score, in our results, what its rank scores."""
    for i, feature in enumerate(case.features):
        expected = case.row(preset, layer, feature)
        for side in ("top", "bottom"):
            ours = getattr(found, f"{side}_scores")[i].double()
            ids = torch.tensor(expected[f"{side}_ids"])
            theirs = found.scores_at([feature], ids)[0].double()
            scale = float(ours.abs().max().clamp_min(1e-12))
            assert (ours - theirs).abs().max() / scale < 1e-4, (case.name, preset, layer, feature, side)


def test_rel_var_of_the_whole_dictionary(case, fitted) -> None:
    """The quadratic form gives, for every feature at once, the rel_var of the reference's loop."""
    model, _, transport, tolerance = fitted
    for preset in TRANSPORTED:
        for layer in case.layers:
            dictionary = ql.load_dictionary(case.sae_path(layer))
            found = ql.signatures(dictionary, model, preset=preset, transport=transport, k=1, stats="rel_var")
            assert len(found) == dictionary.n_features
            for feature in case.features:
                expected = case.row(preset, layer, feature)["stats"]["rel_var"]
                assert abs(float(found.stats["rel_var"][feature]) - expected) < tolerance


def test_adaptive_takes_the_transition_its_rule_names(case, fitted) -> None:
    model, _, transport, _ = fitted
    layer = case.layers[0]
    dictionary = ql.load_dictionary(case.sae_path(layer))
    spread = {
        order: ql.signatures(dictionary, model, preset=preset, transport=transport, k=1).stats["rel_var"]
        for order, preset in (("first_order", "query_lens_value_approx"), ("full", "query_lens_value"))
    }
    threshold = float(spread["full"].median())
    options = {"preset": "query_lens_value_adaptive", "transport": transport, "k": 5, "vectors": True}
    found = ql.signatures(dictionary, model, adaptive_threshold=threshold, **options)
    sources = {
        "identity": ql.signatures(dictionary, model, preset="logit_lens_value", k=5, vectors=True),
        "first_order": ql.signatures(
            dictionary, model, preset="query_lens_value_approx", transport=transport, k=5, vectors=True
        ),
        "full": ql.signatures(dictionary, model, preset="query_lens_value", transport=transport, k=5, vectors=True),
    }
    for i, choice in enumerate(found.choices or []):
        full, first = float(spread["full"][i]), float(spread["first_order"][i])
        assert choice == ("full" if full <= threshold else "first_order" if first <= threshold else "identity")
        assert_close(found.vectors[i], sources[choice].vectors[i])
    assert len(set(found.choices or [])) >= 2


def test_adaptive_mixes_by_the_relative_variance(case, fitted) -> None:
    """Without a threshold: (1 − r/2) M v + r/2 v, r the relative variance of the full transport."""
    model, _, transport, _ = fitted
    dictionary = ql.load_dictionary(case.sae_path(case.layers[0]))
    options = {"transport": transport, "k": 5, "vectors": True}
    found = ql.signatures(dictionary, model, preset="query_lens_value_adaptive", **options)
    full = ql.signatures(dictionary, model, preset="query_lens_value", **options)
    weight = full.stats["rel_var"][:, None] / 2
    own = dictionary.values(slice(None)).to(full.vectors)
    assert found.vectors is not None and full.vectors is not None
    assert torch.allclose(found.vectors, (1 - weight) * full.vectors + weight * own, rtol=1e-5, atol=1e-7)
    assert float(weight.max()) > 0.01


def test_any_three_components_combine(case, fitted) -> None:
    model, _, transport, _ = fitted
    dictionary = ql.load_dictionary(case.sae_path(case.layers[0]))
    for vector in ("value", "key"):
        for transition in ("identity", "first_order", "full"):
            for readout in ("unembed", "embed", "embed_cosine_centered"):
                given = None if transition == "identity" else transport
                found = ql.signatures(
                    dictionary, model, preset=(vector, transition, readout), transport=given, k=3, features="0:4"
                )
                assert found.preset == f"{vector}_{transition}_{readout}"
                assert ql.find_preset(found.preset) == found.source.lens
                assert torch.isfinite(found.top_scores).all()


@pytest.mark.parametrize("preset", ["token_change", "zero_out"])
def test_a_readout_given_with_an_ablation_does_nothing(case, fitted, preset: str) -> None:
    model, tokens, *_ = fitted
    given = {"tokens": tokens, "k": 3, "features": case.features}
    dictionary = ql.load_dictionary(case.sae_path(case.layers[1]))
    plain = ql.signatures(dictionary, model, preset=preset, **given)
    for composed in (("value", preset, "unembed"), f"value_{preset}_embed"):
        found = ql.signatures(dictionary, model, preset=composed, **given)
        assert torch.equal(found.top_scores, plain.top_scores) and torch.equal(found.top_ids, plain.top_ids)
    with pytest.raises(ValueError, match="ends in logits"):
        ql.Preset("wrong", "value", preset, "unembed")
