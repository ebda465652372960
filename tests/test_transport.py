"""Transport: the matrices are the model's own averaged Jacobians, whatever the batching; energies; refusals."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import D_MODEL, LAYERS, VOCAB, save_tiny_model
from torch import Tensor

import querylens_fast as ql
from bench.brute_force import BruteForce
from querylens_fast.topk import products
from querylens_fast.transport.jacobians import Budget, Linearised
from querylens_fast.transport.per_feature import walk_features

POINTS = 2 * LAYERS + 1


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture(scope="module")
def unpadded() -> ql.Tokens:
    return ql.load_tokens(torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(7)))


def test_value_matrices_are_the_transformers_models_jacobian(tiny_model: ql.Model, unpadded: ql.Tokens) -> None:
    """Without padding, M v is the mean over positions of the chain rule through transformers' own forward pass."""
    transport = ql.fit_transport(tiny_model, unpadded, progress=False)
    v = torch.randn(D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    brute = BruteForce(copy.deepcopy(tiny_model.source), LAYERS, unpadded.ids, unpadded.valid_mask)
    for layer in range(LAYERS - 1):
        moved = transport.apply(v[None], "value", "full", 2 * layer + 2)[0]
        assert relative(moved, brute.value(layer, v)) < 1e-6


def test_matrices_agree_with_walks_at_every_point(tiny_model: ql.Model, sample: ql.Tokens) -> None:
    """Padding included: the fitted matrix moves a vector as its own walk does, both sides, both orders."""
    transport = ql.fit_transport(tiny_model, sample, progress=False)
    vectors = torch.randn(4, D_MODEL, dtype=torch.float64)
    for side in ("value", "key"):
        for order in ("full", "first_order"):
            for point in range(POINTS):
                walked = walk_features(tiny_model, sample, vectors, point, side, order)
                assert relative(transport.apply(vectors, side, order, point), walked.mean) < 1e-10


@pytest.mark.parametrize("onednn", [False, True])
def test_float32_is_float64_rounded(
    tiny_model: ql.Model, sample: ql.Tokens, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By either library, of which a processor takes the faster one."""
    if onednn and not products.onednn_is_float32():
        pytest.skip("oneDNN does not multiply float32 here")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    exact = ql.fit_transport(tiny_model, sample, orders=("full",), progress=False)
    narrow = ql.as_model(copy.deepcopy(tiny_model.source).float())
    found = ql.fit_transport(narrow, sample, orders=("full",), progress=False)
    for side in ("value", "key"):
        for point in range(POINTS):
            assert relative(found.matrix(side, "full", point).double(), exact.matrix(side, "full", point)) < 1e-5


def test_value_and_key_meet(tiny_model: ql.Model, unpadded: ql.Tokens) -> None:
    """Without padding both full sweeps cross the whole model: they are each other's transpose."""
    transport = ql.fit_transport(tiny_model, unpadded, orders=("full",), progress=False)
    through = transport.matrix("value", "full", 0)
    assert relative(transport.matrix("key", "full", POINTS - 1).mT, through) < 1e-12


@pytest.mark.parametrize("submodule", ["attn", "mlp"])
def test_submodule_and_norms(gpt2: ql.Model, sample: ql.Tokens, submodule: str) -> None:
    options = {"submodule": submodule, "through_norms": False}
    transport = ql.fit_transport(gpt2, sample, progress=False, **options)
    vectors = torch.randn(2, D_MODEL, dtype=torch.float64)
    walked = walk_features(gpt2, sample, vectors, 2, "value", "full", **options)
    assert relative(transport.apply(vectors, "value", "full", 2), walked.mean) < 1e-10
    plain = ql.fit_transport(gpt2, sample, progress=False)
    assert relative(transport.matrix("value", "full", 2), plain.matrix("value", "full", 2)) > 1e-2


def test_small_memory_gives_the_same_matrices(gpt2: ql.Model, sample: ql.Tokens) -> None:
    whole = ql.fit_transport(gpt2, sample, progress=False)
    plans = []
    original = Budget.plan

    def one_by_one(*args: object) -> Budget:
        plans.append(original(*args))
        return Budget(1, 5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "plan", one_by_one)
        small = ql.fit_transport(gpt2, sample, progress=False)
    assert plans
    for pair, matrices in whole.matrices.items():
        assert relative(small.matrices[pair], matrices) < 1e-12


def test_too_little_memory_says_how_much_is_needed(gpt2: ql.Model, sample: ql.Tokens) -> None:
    with pytest.raises(ValueError, match="max_memory_gib is 1e-06, but one sequence of 7 tokens needs"):
        ql.fit_transport(gpt2, sample, max_memory_gib=1e-6, progress=False)


def test_layer_terms_add_up(gpt2: ql.Model, sample: ql.Tokens) -> None:
    transport = ql.fit_transport(gpt2, sample, orders=("first_order",), progress=False)
    eye = torch.eye(D_MODEL, dtype=torch.float64)
    for side in ("value", "key"):
        for layer in range(LAYERS):
            for point in (2 * layer, 2 * layer + 1, 2 * layer + 2):
                terms = transport.layer_terms(side, point, layer)
                total = sum((eye if m is None else m) for _, m in terms)
                assert relative(total, transport.matrix(side, "first_order", point)) < 1e-12
    assert [k for k, _ in transport.layer_terms("value", 4, 1)] == [1, 2]
    assert [k for k, _ in transport.layer_terms("key", 4, 1)] == [2, 1, 0]


@pytest.mark.parametrize("order", ["full", "first_order"])
@pytest.mark.parametrize("side", ["value", "key"])
def test_exact_energies_give_each_features_rel_var(
    tiny_model: ql.Model, sample: ql.Tokens, side: str, order: str
) -> None:
    transport = ql.fit_transport(tiny_model, sample, energy="exact", progress=False)
    vectors = torch.randn(3, D_MODEL, dtype=torch.float64)
    for point in range(POINTS):
        found, error = transport.rel_var(vectors, side, order, point)
        expected = walk_features(tiny_model, sample, vectors, point, side, order).stats["rel_var"]
        assert (found - expected).abs().max() < 1e-9
        assert not error.any()


@pytest.mark.parametrize("order", ["full", "first_order"])
@pytest.mark.parametrize("side", ["value", "key"])
def test_probes_estimate_rel_var_within_their_error(gpt2: ql.Model, sample: ql.Tokens, side: str, order: str) -> None:
    exact = ql.fit_transport(gpt2, sample, energy="exact", progress=False)
    probed = ql.fit_transport(gpt2, sample, energy="probes", n_probes=256, progress=False)
    vectors = torch.randn(40, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for point in (1, 2, POINTS - 2):
        true, _ = exact.rel_var(vectors, side, order, point)
        found, error = probed.rel_var(vectors, side, order, point)
        deviation = (found - true) / error
        assert deviation.abs().median() < 1.5 and deviation.abs().max() < 8
        assert (found - true).abs().mean() < 0.1


def test_probes_do_not_depend_on_the_batching(gpt2: ql.Model, sample: ql.Tokens) -> None:
    one = ql.fit_transport(gpt2, sample, energy="probes", n_probes=8, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "plan", lambda *_: Budget(2, 3))
        two = ql.fit_transport(gpt2, sample, energy="probes", n_probes=8, progress=False)
    for pair, energies in one.energies.items():
        assert relative(two.energies[pair], energies) < 1e-12


def test_rel_var_needs_energies(gpt2: ql.Model, sample: ql.Tokens) -> None:
    transport = ql.fit_transport(gpt2, sample, progress=False)
    with pytest.raises(ValueError, match="energy='probes'"):
        transport.rel_var(torch.randn(1, D_MODEL), "value", "full", 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sides": ("output",)},
        {"orders": ()},
        {"energy": "some"},
        {"submodule": "all"},
        {"energy": "probes", "n_probes": 1},
    ],
)
def test_bad_arguments(gpt2: ql.Model, sample: ql.Tokens, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]} is"):
        ql.fit_transport(gpt2, sample, progress=False, **wrong)


def test_a_transport_of_another_model_is_refused(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    transport = ql.fit_transport(gpt2, sample, progress=False)
    other = ql.load_model(save_tiny_model("gpt2", tmp_path, seed=1), dtype="float64")
    with pytest.raises(ValueError, match="other weights"):
        ql.signatures(ql.neuron_dictionary(other, 1), other, transport=transport)
    transport.metadata["n_layers"] = "7"
    with pytest.raises(ValueError, match=r"\(7, 24\), but"):
        transport.check_model(gpt2)


def test_missing_sides_and_orders_are_named(gpt2: ql.Model, sample: ql.Tokens) -> None:
    transport = ql.fit_transport(gpt2, sample, sides=("value",), orders=("full",), progress=False)
    with pytest.raises(ValueError, match="holds value/full, not key/full"):
        ql.signatures(ql.neuron_dictionary(gpt2, 1), gpt2, preset="query_lens_key", transport=transport)
    with pytest.raises(ValueError, match="point 9 is outside"):
        transport.matrix("value", "full", 9)


def test_bfloat16_accumulates_in_float32(gpt2_folder: Path, gpt2: ql.Model, sample: ql.Tokens) -> None:
    """Error rule: ours against float64 is at most three times that of bf16 inputs themselves, plus 1e-5."""
    coarse = ql.load_model(gpt2_folder, dtype="bfloat16")
    found = ql.fit_transport(coarse, sample, progress=False)
    exact = ql.fit_transport(gpt2, sample, progress=False)
    vectors = torch.randn(16, D_MODEL, dtype=torch.float64)
    for point in range(POINTS):
        moved = found.apply(vectors, "value", "full", point).double()
        walked = walk_features(coarse, sample, vectors, point, "value", "full").mean.double()
        truth = exact.apply(vectors, "value", "full", point)
        assert found.matrices["value", "full"].dtype == torch.float32
        assert relative(moved, truth) <= 3 * relative(walked, truth) + 1e-5


def test_a_side_asked_for_twice_is_fitted_once(gpt2: ql.Model, sample: ql.Tokens) -> None:
    once = ql.fit_transport(gpt2, sample, sides=("value",), orders=("full",), progress=False)
    twice = ql.fit_transport(gpt2, sample, sides=("value", "value"), orders=("full", "full"), progress=False)
    assert torch.equal(once.matrices["value", "full"], twice.matrices["value", "full"])


def test_a_model_of_opaque_layers(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    """Points between attention and MLP, the first order and submodules are refused by name."""
    opaque = replace(gpt2, has_submodules=False)
    found = ql.fit_transport(opaque, sample, energy="probes", n_probes=2, groups=2, progress=False)
    found = ql.load_transport(found.save(tmp_path / "t.safetensors"))
    assert set(found.matrices) == {("value", "full"), ("key", "full")} and found.points == [0, 2, 4, 6]
    plain = ql.fit_transport(gpt2, sample, progress=False)
    assert relative(found.matrix("value", "full", 4), plain.matrix("value", "full", 4)) < 1e-12
    found.rel_var(torch.randn(2, D_MODEL), "value", "full", 6)
    with pytest.raises(ValueError, match="no matrix for resid_mid of layer 1"):
        found.matrix("value", "full", 3)
    with pytest.raises(ValueError, match="first_order"):
        ql.fit_transport(opaque, sample, orders=("first_order",), progress=False)
    with pytest.raises(ValueError, match="submodule='attn'"):
        ql.fit_transport(opaque, sample, submodule="attn", progress=False)
    with pytest.raises(ValueError, match="resid_mid of layer 0"):
        ql.fit_passage(opaque, sample, 1, progress=False)
    with pytest.raises(ValueError, match="resid_mid of layer 2"):
        walk_features(opaque, sample, torch.randn(1, D_MODEL), 5, "value", "full")
    with pytest.raises(ValueError, match="first_order"):
        walk_features(opaque, sample, torch.randn(1, D_MODEL), 2, "value", "first_order")


@pytest.mark.parametrize("side", ["value", "key"])
def test_first_order_passages_need_no_directions(tiny_model: ql.Model, sample: ql.Tokens, side: str) -> None:
    """Their closed form is the walk's answer, for every architecture, with padding."""
    found = ql.fit_passage(tiny_model, sample, 3, side=side, order="first_order", progress=False)
    v = torch.randn(2, D_MODEL, dtype=torch.float64)
    walked = walk_features(tiny_model, sample, v, 3, side, "first_order").mean
    assert relative(found.apply(v, POINTS - 1 if side == "value" else 0), walked) < 1e-10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linearised, "apply", lambda *_: pytest.fail("carried directions through a module"))
        ql.fit_transport(tiny_model, sample, orders=("first_order",), progress=False)
