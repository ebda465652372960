"""Autodiff through transformers' own layers: the oracle of the hand-written blocks, and the way in for other models."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, D_MODEL, LAYERS, VOCAB, save_tiny_model
from torch import Tensor

import querylens_fast as ql
from querylens_fast.models.autodiff import graph_bytes


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def padded() -> ql.Tokens:
    """Padding at the end, in the middle, and at the start, where the first queries see nothing."""
    ids = torch.randint(3, VOCAB, (4, 6), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 4:], valid[2, 2], valid[3, :2] = False, False, False
    return ql.Tokens(ids, valid)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hand_written_blocks_agree_with_autodiff(architecture: str, padded: ql.Tokens, tmp_path: Path) -> None:
    folder = save_tiny_model(architecture, tmp_path)
    by_hand = ql.load_model(folder, dtype="float64")
    by_autodiff = ql.load_model(folder, dtype="float64", linearisation="autodiff")
    assert (by_hand.linearisation, by_autodiff.linearisation) == ("hand-written", "autodiff")
    ours, theirs = (ql.fit_transport(m, padded, progress=False) for m in (by_hand, by_autodiff))
    for pair, matrices in ours.matrices.items():
        assert relative(matrices, theirs.matrices[pair]) < 1e-6
    assert theirs.metadata["linearisation"] == "autodiff"
    assert theirs.metadata["routing"] == ours.metadata["routing"]
    assert (ours.metadata["routing"] == "held fixed: experts and weights") == (architecture == "qwen3_moe")


def test_a_family_without_a_layout_is_differentiated_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny_model("olmo2", tmp_path)
    with pytest.raises(ql.UnsupportedModelError, match="'olmo2'; linearisations are written out for .*gpt2"):
        ql.load_model(folder, linearisation="hand-written")
    model = ql.load_model(folder, dtype="float64")
    assert "linearised by autodiff through its own layers: no linearisation is written out" in caplog.text
    tokens = ql.load_tokens(torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(7)))
    transport = ql.fit_transport(model, tokens, sides=("value",), orders=("full",), progress=False)
    assert transport.metadata["linearisation"] == "autodiff"
    found = ql.signatures(ql.directions(torch.randn(3, D_MODEL), layer=0), model, transport=transport, k=3)
    assert torch.isfinite(found.top_scores).all()


@pytest.mark.parametrize("architecture", ["olmo2", "gemma3"])
@pytest.mark.parametrize(("hook", "side"), [("layers.1.mlp", "value"), ("layers.1.self_attn", "value")])
def test_modules_in_front_of_a_norm_are_refused_under_autodiff(
    architecture: str, hook: str, side: str, tmp_path: Path
) -> None:
    """The norm behind the module is found by what reaches the stream, whichever way the model is linearised."""
    model = ql.load_model(save_tiny_model(architecture, tmp_path), linearisation="autodiff")
    dictionary = dataclasses.replace(
        ql.directions(torch.randn(5, D_MODEL), layer=1), hook_name=hook, hook_name_out=hook
    )
    with pytest.raises(ValueError, match=rf"its {side}s are of '{hook}', which .* norms"):
        ql.signatures(dictionary, model, preset=f"logit_lens_{side}")


def test_both_ways_of_one_model_share_transports(gpt2: ql.Model, gpt2_folder: Path, padded: ql.Tokens) -> None:
    model = ql.load_model(gpt2_folder, dtype="float64", linearisation="autodiff")
    assert model.fingerprint == gpt2.fingerprint
    ql.fit_transport(gpt2, padded, orders=("full",), progress=False).check_model(model)
    ql.fit_transport(model, padded, orders=("full",), progress=False).check_model(gpt2)


def test_memory_is_planned_from_the_graphs(gpt2_folder: Path, padded: ql.Tokens) -> None:
    model = ql.load_model(gpt2_folder, dtype="float64", linearisation="autodiff")
    short, long = (graph_bytes(model, n) for n in (6, 12))
    assert long[0] > 1.9 * short[0] and long[1] > 1.9 * short[1]
    with pytest.raises(ValueError, match="max_memory_gib is 1e-05, but one sequence of 6 tokens needs"):
        ql.fit_transport(model, padded, max_memory_gib=1e-5, progress=False)


def test_what_autodiff_cannot_do_is_named(gpt2_folder: Path, padded: ql.Tokens) -> None:
    model = ql.load_model(gpt2_folder, linearisation="autodiff")
    with pytest.raises(ql.UnsupportedModelError, match="has no single W_out: MLP neurons"):
        ql.neuron_dictionary(model, 0)
    with pytest.raises(ql.UnsupportedModelError, match="cannot leave out its norms"):
        ql.fit_transport(model, padded, through_norms=False, progress=False)
    with pytest.raises(ValueError, match="linearisation is 'magic'; expected one of auto, hand-written"):
        ql.load_model(gpt2_folder, linearisation="magic")  # type: ignore[arg-type]
    assert ql.as_model(model.source, linearisation="autodiff").linearisation == "autodiff"
    assert ql.as_model(model.source).linearisation == "hand-written"


def test_attention_and_mlp_can_be_left_out(gpt2: ql.Model, gpt2_folder: Path, padded: ql.Tokens) -> None:
    model = ql.load_model(gpt2_folder, dtype="float64", linearisation="autodiff")
    for submodule in ("attn", "mlp"):
        ours, theirs = (
            ql.fit_transport(m, padded, submodule=submodule, orders=("full",), progress=False) for m in (gpt2, model)
        )
        assert relative(theirs.matrices["key", "full"], ours.matrices["key", "full"]) < 1e-10
    assert len(model.blocks) == LAYERS
