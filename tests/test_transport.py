"""Transport: the matrices are the model's own averaged Jacobians, whatever the batching; energies; files; refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from brute_force import hidden_to_final
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import D_MODEL, LAYERS, VOCAB, save_tiny_model
from torch import Tensor

import querylens_fast as ql
from querylens_fast.runs.sealed_tensors import SEAL_KEY
from querylens_fast.transport.fit import plan_batches
from querylens_fast.transport.growth import sequences_needed, top_tokens
from querylens_fast.transport.jacobians import Budget, Linearised
from querylens_fast.transport.per_feature import walk_features

POINTS = 2 * LAYERS + 1


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture(scope="module")
def unpadded() -> ql.Tokens:
    return ql.load_tokens(torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(7)))


def test_value_matrices_are_the_transformers_models_jacobian(tiny_model: ql.Model, unpadded: ql.Tokens) -> None:
    """Without padding, M v is the mean over positions of the chain rule through transformers' own modules.

    The routing of a mixture of experts counts as constant there too.
    """
    transport = ql.fit_transport(tiny_model, unpadded, progress=False)
    v = torch.randn(D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    states = tiny_model.source(unpadded.ids, output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):
        base = states[layer + 1]

        def onwards(hidden: Tensor, layer: int = layer) -> Tensor:
            return hidden_to_final(tiny_model.source, layer, hidden)

        expected = torch.func.jvp(onwards, (base,), (v.expand_as(base),))[1].mean((0, 1))
        assert relative(transport.apply(v[None], "value", "full", 2 * layer + 2)[0], expected) < 1e-6


def test_matrices_agree_with_walks_at_every_point(tiny_model: ql.Model, sample: ql.Tokens) -> None:
    """Padding included: the fitted matrix moves a vector as its own walk does, both sides, both orders."""
    transport = ql.fit_transport(tiny_model, sample, progress=False)
    vectors = torch.randn(4, D_MODEL, dtype=torch.float64)
    for side in ("value", "key"):
        for order in ("full", "first_order"):
            for point in range(POINTS):
                walked = walk_features(tiny_model, sample, vectors, point, side, order)
                assert relative(transport.apply(vectors, side, order, point), walked.mean) < 1e-10


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


def test_save_and_load(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    transport = ql.fit_transport(gpt2, sample, energy="probes", n_probes=4, progress=False)
    path = transport.save(tmp_path / "deep" / "t.safetensors")
    again = ql.load_transport(path)
    assert again.metadata == transport.metadata
    assert again.metadata["tokens_digest"] == sample.digest and again.n_valid == sample.n_valid == 32
    for pair in transport.matrices:
        assert torch.equal(again.matrices[pair], transport.matrices[pair])
        assert torch.equal(again.energies[pair], transport.energies[pair])
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_damaged_missing_and_foreign_files(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    path = ql.fit_transport(gpt2, sample, orders=("full",), progress=False).save(tmp_path / "t.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.load_transport(tmp_path / "none.safetensors")
    sample.save(tmp_path / "tokens.safetensors")
    with pytest.raises(ValueError, match="no transport"):
        ql.load_transport(tmp_path / "tokens.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged or truncated"):
        ql.load_transport(path)


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


@pytest.mark.parametrize("rows", [64, 1])
def test_groups_are_fits_of_their_own(gpt2: ql.Model, sample: ql.Tokens, rows: int, tmp_path: Path) -> None:
    """Padding included: a group alone, the fit without it, and the whole are fits of just those sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "plan", lambda *_: Budget(rows, 9))
        grouped = ql.fit_transport(gpt2, sample, groups=2, progress=False)
        batched = plan_batches(5, rows, 2, 1)
    members = torch.zeros(5, dtype=torch.bool)
    for batch in batched[::2]:
        members[batch] = True

    def fit_on(chosen: Tensor) -> ql.Transport:
        return ql.fit_transport(gpt2, ql.Tokens(sample.ids[chosen], sample.valid_mask[chosen]), progress=False)

    whole, first, second = ql.fit_transport(gpt2, sample, progress=False), fit_on(members), fit_on(~members)
    assert grouped.group_sizes == [first.n_valid, second.n_valid] and whole.n_groups == 1
    again = ql.load_transport(grouped.save(tmp_path / "t.safetensors"))
    for found in (grouped, again):
        for side, order in whole.matrices:
            for point in (0, 3, POINTS - 1):
                key = side, order, point
                assert relative(found.matrix(*key), whole.matrix(*key)) < 1e-12
                assert relative(found.group(0).matrix(*key), first.matrix(*key)) < 1e-12
                for one, without in zip((second, first), found.leave_one_out(*key), strict=True):
                    assert relative(without, one.matrix(*key)) < 1e-12
        centres = found.leave_one_out_centres()
        assert relative(centres[0], second.centre) < 1e-12 and relative(found.group(1).centre, second.centre) < 1e-12
    assert torch.equal(again.matrices["key", "full"], grouped.matrices["key", "full"])


def test_one_group_is_the_file_of_before(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    path = ql.fit_transport(gpt2, sample, energy="probes", n_probes=4, progress=False).save(tmp_path / "t.safetensors")
    with safe_open(path, "pt") as file:
        pairs = [f"{side}.{order}" for side in ("value", "key") for order in ("full", "first_order")]
        assert set(file.keys()) == {"centre", *(f"{kind}.{p}" for kind in ("matrix", "energy") for p in pairs)}
        names = """format model fingerprint frame_fingerprint behaviour
            convention linearisation routing dtype n_layers d_model n_valid n_sequences
            tokens tokens_digest submodule through_norms energy n_probes seed querylens_fast torch transformers
            querylens_fast.seal"""
        assert set(file.metadata()) == set(names.split())
    with pytest.raises(ValueError, match="keeps no groups of sequences: fit it with groups=8"):
        ql.load_transport(path).leave_one_out("value", "full", 2)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 100])
@pytest.mark.parametrize(("rows", "groups", "processes"), [(8, 1, 1), (8, 8, 1), (8, 2, 3), (1, 3, 2)])
def test_batches_cover_the_sample_in_rounds_of_the_groups(n: int, rows: int, groups: int, processes: int) -> None:
    found = plan_batches(n, rows, groups, processes)
    lengths = [s.stop - s.start for s in found]
    assert [s.start for s in found] == [sum(lengths[:i]) for i in range(len(found))] and sum(lengths) == n
    assert 1 <= min(lengths) and max(lengths) <= rows and max(lengths) - min(lengths) <= 1
    assert len(found) >= min(n, groups, processes) and (len(found) % groups == 0 or len(found) == n)


def test_the_sample_grows_until_top_tokens_stay(gpt2: ql.Model, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(3, VOCAB, (48, 7), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "plan", lambda *_: Budget(4, 24))
        grown = ql.fit_transport(gpt2, ids, until=0.5, k=5, progress=False)
        with caplog.at_level("WARNING"):
            short = ql.fit_transport(gpt2, ids, until=0.999, k=25, groups=4, orders=("full",), progress=False)
    n = int(grown.metadata["n_sequences"])
    assert 8 <= n < 48 and float(grown.metadata["jaccard"]) >= 0.5 and "sequences_needed" not in grown.metadata
    assert grown.groups == {} and grown.n_valid == 7 * n
    same = ql.fit_transport(gpt2, ids[:n], progress=False)
    for pair, matrices in same.matrices.items():
        assert relative(grown.matrices[pair], matrices) < 1e-12
    assert short.metadata["n_sequences"] == "48" and short.n_groups == 4
    assert int(short.metadata["sequences_needed"]) > 48
    assert f"about {short.metadata['sequences_needed']} sequences would be needed" in caplog.text


def test_what_until_compares_is_what_signatures_read_out(gpt2: ql.Model, sample: ql.Tokens) -> None:
    transport = ql.fit_transport(gpt2, sample, orders=("full",), progress=False)
    dictionary = ql.neuron_dictionary(gpt2, 1)
    for side in ("value", "key"):
        moved = transport.apply(dictionary.vectors(side, torch.arange(9)), side, "full", dictionary.point(side))
        found = top_tokens(gpt2, moved, side, transport.centre, 6)
        preset = f"query_lens_{side}"
        expected = ql.signatures(dictionary, gpt2, preset=preset, transport=transport, k=6, features=slice(0, 9))
        assert torch.equal(found, expected.top_ids)


def test_extrapolation_follows_the_square_root() -> None:
    assert sequences_needed(100, 0.85, 0.85) == 100
    overlap = 2 * 0.6 / 1.6  # four times the sequences halve what is exchanged
    target = (1 + overlap) / 2
    assert sequences_needed(100, 0.6, target / (2 - target)) == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 0},
        {"groups": 6},
        {"groups": 2.0},
        {"until": 1.0},
        {"until": 0.8, "groups": 3},
        {"until": 0.8, "k": 0},
    ],
)
def test_bad_groups_and_targets(gpt2: ql.Model, sample: ql.Tokens, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]} is"):
        ql.fit_transport(gpt2, sample, progress=False, **wrong)


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


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> Path:
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    del metadata[SEAL_KEY]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t["matrix.value.full"][1].fill_(torch.nan), "matrix.value.full holds NaN or infinite"),
        (lambda t, m: t["group.key.full"][0, 0].fill_(torch.inf), "group.key.full holds NaN or infinite"),
        (lambda t, m: t["centre"].fill_(torch.nan), "centre holds NaN"),
        (lambda t, m: t.update(centre=torch.zeros(3)), r"centre is \[3\]; expected \[24\]"),
        (lambda t, m: t.update({"matrix.value.full": torch.zeros(7, 24, 23)}), r"expected \[7, 24, 24\]"),
        (lambda t, m: t.update({"matrix.value.full": torch.zeros(7, 24, 24).int()}), "holds torch.int32"),
        (lambda t, m: t.update({"matrix.value.half": torch.zeros(7, 24, 24)}), "which no transport has"),
        (lambda t, m: t.update({"other": torch.zeros(2)}), "which no transport has"),
        (lambda t, m: t.clear(), "holds no matrices"),
        (lambda t, m: m.update(n_layers="many"), "n_layers is 'many'"),
        (lambda t, m: m.update(n_layers=str(10**9)), "n_layers is '1000000000'"),
        (lambda t, m: m.update(d_model="1,2"), "d_model is '1,2'"),
        (lambda t, m: m.update(points="2,4,99"), r"points \[2, 4, 99\]"),
        (lambda t, m: m.update(group_n_valid="1,2"), "do not add up"),
        (lambda t, m: m.pop("fingerprint"), "has no fingerprint"),
        (lambda t, m: m.update(format="other"), "no transport"),
    ],
)
def test_hostile_transport_files(
    gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path, change: Callable[[dict, dict], None], message: str
) -> None:
    grouped = "group" in message
    path = ql.fit_transport(gpt2, sample, groups=1 + grouped, progress=False).save(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        ql.load_transport(rewritten(path, change))
    assert "t.safetensors" in str(caught.value)


def test_no_cut_or_flipped_file_is_taken(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    """Cut anywhere, or with the header's bytes changed, a file is refused by name or read as it was."""
    whole = ql.fit_transport(gpt2, sample, sides=("value",), orders=("full",), progress=False)
    content = whole.save(tmp_path / "t.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(content[:8], "little")
    hostile = [content[: int(torch.randint(len(content), (), generator=generator))] for _ in range(30)]
    for at in torch.randint(header + 8, (60,), generator=generator).tolist():
        hostile.append(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
    for number, changed in enumerate([b"", *hostile]):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(changed)
        try:
            found = ql.load_transport(path)
        except ValueError as error:
            assert path.name in str(error)
        else:
            assert torch.equal(found.matrices["value", "full"], whole.matrices["value", "full"])
