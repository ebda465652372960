"""Feature samples and contexts on the embedded model, against plain loops."""

from pathlib import Path

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo.showcase import Example
from querylens_fast.evaluation.contexts import feature_list
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample, load_feature_sample
from querylens_fast.lens.ablations import activations

FEATURES = torch.tensor([3, 40, 700, 1500])


def test_activity_by_a_plain_loop(example: Example, demo_tokens: ql.Tokens, demo_sample: FeatureSample) -> None:
    acts = activations(example.model, example.dictionaries[1], demo_tokens.ids) * demo_tokens.valid_mask[..., None]
    assert torch.equal(demo_sample.n_active, (acts > 0).sum((0, 1)))
    assert torch.allclose(demo_sample.density, (acts > 0).float().sum((0, 1)) / demo_tokens.n_valid)
    assert torch.allclose(demo_sample.maximum, acts.amax((0, 1)))
    means = acts.sum((0, 1)) / (acts > 0).sum((0, 1)).clamp_min(1)
    assert torch.allclose(demo_sample.mean, means, atol=1e-5)
    for feature in FEATURES.tolist():
        own = acts[:, :, feature]
        peaks = own.amax(1)
        order = [i for i in peaks.argsort(descending=True, stable=True).tolist() if peaks[i] > 0][:5]
        found = demo_sample.sequences[feature]
        assert found[found >= 0].tolist() == order
        for place, sequence in enumerate(order):
            position = int(demo_sample.positions[feature, place])
            assert own[sequence, position] == peaks[sequence] == demo_sample.values[feature, place]
            assert demo_sample.tokens[feature, place] == demo_tokens.ids[sequence, position]
        counted: dict[int, int] = {}
        for sequence, position in (own > 0).nonzero().tolist():
            token = int(demo_tokens.ids[sequence, position])
            counted[token] = counted.get(token, 0) + 1
        assert dict(demo_sample.top_tokens(feature, 10_000)) == counted


def test_little_memory_gives_the_same_sample(
    example: Example, demo_tokens: ql.Tokens, demo_sample: FeatureSample
) -> None:
    """A few positions at a time, as wide dictionaries need it."""
    few = ql.Tokens(demo_tokens.ids[:6], demo_tokens.valid_mask[:6])
    arguments = {"n_examples": 3, "progress": False}
    gib = 24 * 2048 * 20 / 2**30
    whole, parts = (
        feature_sample(example.dictionaries[1], example.model, few, max_memory_gib=memory, **arguments)
        for memory in (2.0, gib)
    )
    assert torch.equal(whole.positions, parts.positions) and torch.equal(whole.n_active, parts.n_active)
    assert torch.allclose(whole.values, parts.values, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(whole.pairs, parts.pairs, strict=True))


def test_own_text(example: Example) -> None:
    texts = ["def parse(self): return None", "import os\nimport sys"]
    found = feature_sample(example.dictionaries[0], example.model, texts, n_examples=1, progress=False)
    lengths = [len(example.model.tokenizer(text)["input_ids"]) for text in texts]
    assert found.metadata["n_valid"] == sum(lengths) and found.metadata["n_sequences"] == 2
    assert int(found.n_sequences.max()) == 2


def test_a_sample_is_read_back(demo_sample: FeatureSample, tmp_path: Path) -> None:
    path = demo_sample.save(tmp_path / "sample.parquet")
    again = load_feature_sample(path)
    assert again.metadata == demo_sample.metadata
    for name in ("n_active", "mean", "maximum", "n_sequences", "values", "sequences", "positions", "tokens"):
        assert torch.equal(getattr(again, name), getattr(demo_sample, name)), name
    assert all(torch.equal(a, b) for a, b in zip(again.pairs, demo_sample.pairs, strict=True))
    with pytest.raises(FileNotFoundError, match="make one with feature_sample"):
        load_feature_sample(tmp_path / "none.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no feature sample of this package, or damaged"):
        load_feature_sample(path)


def test_chosen_features(demo_sample: FeatureSample) -> None:
    chosen = demo_sample.choose(30, min_examples=4, seed=1)
    assert len(chosen) == 30 and bool((demo_sample.n_sequences[chosen] >= 4).all())
    assert torch.equal(chosen, demo_sample.choose(30, min_examples=4, seed=1))
    assert not torch.equal(chosen, demo_sample.choose(30, min_examples=4, seed=2))
    with pytest.raises(ValueError, match="no feature of .* is active in 1000 sequences"):
        demo_sample.choose(min_examples=1000)


def test_contexts_are_the_references_lists(
    example: Example, demo_tokens: ql.Tokens, demo_sample: FeatureSample, tmp_path: Path
) -> None:
    from querylens_fast.dictionaries.feature_lists import load_features, save_features_json

    chosen = demo_sample.choose(3, min_examples=4)
    features = feature_list(demo_sample, example.dictionaries[1], example.model, demo_tokens, chosen)
    assert [f.feature for f in features] == chosen.tolist()
    assert load_features(save_features_json(features, tmp_path / "features.json")) == features
    for feature in features:
        for place, activation in enumerate(feature.activations or []):
            peak = activation.max_value_token_index
            assert peak is not None
            assert activation.get_values()[peak] == activation.max_value
            assert activation.max_value == pytest.approx(float(demo_sample.values[feature.feature, place]), rel=1e-5)
    other = ql.Tokens(demo_tokens.ids + 1, demo_tokens.valid_mask)
    with pytest.raises(ValueError, match="made with another tokens"):
        feature_list(demo_sample, example.dictionaries[1], example.model, other, chosen)
