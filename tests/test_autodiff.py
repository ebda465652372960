"""Autodiff through transformers' own layers: the oracle of the hand-written blocks, and the way in for other models."""

import logging
from pathlib import Path

import pytest
import torch
from brute_force import hidden_to_final
from tiny_models import ARCHITECTURES, BY_AUTODIFF, D_MODEL, LAYERS, VOCAB, save_tiny_model
from torch import Tensor

import querylens_fast as ql


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


@pytest.mark.parametrize("architecture", BY_AUTODIFF)
def test_other_architectures_by_autodiff(architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny_model(architecture, tmp_path)
    with pytest.raises(ql.UnsupportedModelError, match="linearisation='autodiff'"):
        ql.load_model(folder)
    with caplog.at_level(logging.INFO):
        model = ql.load_model(folder, dtype="float64", linearisation="autodiff")
    assert "linearised by autodiff" in caplog.text
    tokens = ql.load_tokens(torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(7)))
    transport = ql.fit_transport(model, tokens, sides=("value",), orders=("full",), progress=False)
    base = model.source(tokens.ids, output_hidden_states=True).hidden_states[1]
    v = torch.randn(D_MODEL, dtype=torch.float64)
    moved = torch.func.jvp(lambda x: hidden_to_final(model.source, 0, x), (base,), (v.expand_as(base),))[1]
    assert relative(transport.apply(v[None], "value", "full", 2)[0], moved.mean((0, 1))) < 1e-6
    found = ql.signatures(ql.directions(torch.randn(3, D_MODEL), layer=0), model, transport=transport, k=3)
    assert torch.isfinite(found.top_scores).all()


def test_parallel_layers_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("gpt_neox", tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"use_parallel_residual": false', '"use_parallel_residual": true'))
    with pytest.raises(ql.UnsupportedModelError, match="does not reproduce"):
        ql.load_model(folder, linearisation="autodiff")


def test_what_autodiff_cannot_do_is_named(gpt2_folder: Path, padded: ql.Tokens) -> None:
    model = ql.load_model(gpt2_folder, linearisation="autodiff")
    with pytest.raises(ql.UnsupportedModelError, match="has no single W_out: MLP neurons"):
        ql.neuron_dictionary(model, 0)
    with pytest.raises(ql.UnsupportedModelError, match="cannot leave out its norms"):
        ql.fit_transport(model, padded, through_norms=False, progress=False)
    with pytest.raises(ValueError, match="linearisation is 'magic'; expected 'hand-written' or 'autodiff'"):
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
