"""Coders: dictionaries of every library encode and decode as the library itself does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import querylens_fast as ql

SPARSIFY = Path(__file__).parent / "goldens" / "sparsify"
D, N = 12, 16


@pytest.mark.parametrize("name", ["layers.1", "layers.1.mlp", "layers.2"])
def test_sparsify_files_run_as_eai_sparsify_runs_them(name: str) -> None:
    """SAE (b_dec is subtracted although the decoder is normalised), skip transcoder, groupmax; see goldens/sparsify."""
    expected = load_file(str(SPARSIFY / f"{name}.expected.safetensors"))
    found = ql.load_dictionary(SPARSIFY / name)
    acts = found.coder.encode(expected["x"])
    assert torch.allclose(acts, expected["acts"], atol=1e-5)
    assert torch.allclose(found.coder.decode(acts, expected["x"]), expected["output"], atol=1e-5)
    assert found.kind == ("transcoder" if "mlp" in name else "sae")


def made(architecture: str, training: bool = False, **settings: Any) -> Any:
    """A sae-lens object with random weights."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class, get_sae_training_class

    kind, config = (get_sae_training_class if training else get_sae_class)(architecture)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post")
    torch.manual_seed(0)
    sae = kind(config(d_in=D, d_sae=N, metadata=metadata, **settings))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)
    return sae


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("abstopk", {"k": 3}),
        ("matching_pursuit", {}),
        ("matching_pursuit", {"residual_threshold": 0.8, "apply_b_dec_to_input": False}),
        ("matching_pursuit", {"stop_on_duplicate_support": False, "max_iterations": 5}),
        ("temporal", {"kval_topk": 3, "n_heads": 2, "bottleneck_factor": 4}),
        ("temporal", {"sae_diff_type": "relu", "tied_weights": False, "n_heads": 1, "bottleneck_factor": 8,
                      "normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.7}),
        ("temporal", {"n_attn_layers": 2, "n_heads": 1, "bottleneck_factor": 16, "apply_b_dec_to_input": False}),
    ],
)  # fmt: skip
def test_architectures_run_as_sae_lens_runs_them(tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    sae = made(architecture, **settings)
    sae.save_model(tmp_path)
    x = torch.randn(2, 6, D)
    with torch.no_grad():
        acts, output = sae.encode(x), sae(x)
    for source in (tmp_path, sae):
        found = ql.load_dictionary(source)
        assert torch.allclose(found.coder.encode(x), acts, atol=1e-5)
        assert torch.allclose(found.coder.decode(acts, x), output, atol=1e-5)
        assert torch.equal(found.values(slice(None)), sae.W_dec)
        tied = architecture == "matching_pursuit" or getattr(sae.cfg, "tied_weights", False)
        assert torch.equal(found.keys(slice(None)), sae.W_dec if tied else sae.W_enc.T)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [False, True])
def test_batch_topk_checkpoints_run_with_their_learned_threshold(
    tmp_path: Path, architecture: str, rescale: bool
) -> None:
    """A training checkpoint gives what the inference model gives that sae-lens saves from it."""
    widths = {"matryoshka_widths": [4, N]} if "matryoshka" in architecture else {}
    sae = made(architecture, training=True, k=3, rescale_acts_by_decoder_norm=rescale, **widths)
    sae.topk_threshold.fill_(0.6)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    x = torch.randn(7, D)
    trained, expected = (ql.load_dictionary(tmp_path / kind) for kind in ("training", "inference"))
    assert expected.details["architecture"] == "jumprelu"
    acts = trained.coder.encode(x)
    assert 0 < (acts > 0).float().mean() < 0.5
    assert torch.allclose(acts, expected.coder.encode(x), atol=1e-5)
    assert torch.allclose(trained.coder.decode(acts, x), expected.coder.decode(acts, x), atol=1e-5)


@pytest.mark.parametrize("nesting", ["state_dict", "model_state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_tensors_within_a_checkpoint_are_read(tmp_path: Path, nesting: str, suffix: str) -> None:
    values, bias = torch.randn(N, D), torch.zeros(N)
    torch.save({nesting: {"W_dec": values, "b_enc": bias}, "step": 3, "args": {"lr": 0.1}}, tmp_path / f"ae{suffix}")
    found = ql.load_dictionary(tmp_path / f"ae{suffix}", layer=1)
    assert torch.equal(found.values(slice(None)), values)


@pytest.mark.parametrize(
    ("submodule", "io", "value", "key"),
    [
        ("resid_post_layer_3", "out", 8, 8),
        ("resid_post_layer_3", "in", 6, 6),
        ("resid_pre_layer_3", "out", 6, 6),
        ("mlp_out_layer_3", "out", 8, None),
        ("mlp_layer_3", "in", None, 7),
        ("mlp_layer_3", "in_and_out", 8, 7),
        ("attn_out_layer_3", "out", 7, None),
    ],
)
def test_dictionary_learning_submodules_and_buffers(
    tmp_path: Path, submodule: str, io: str, value: int | None, key: int | None
) -> None:
    weights = {"encoder.weight": torch.randn(N, D), "encoder.bias": torch.randn(N), "decoder.weight": torch.randn(D, N),
               "bias": torch.randn(D)}  # fmt: skip
    torch.save(weights, tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "layer": 3, "submodule_name": submodule}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": io}}))
    found = ql.load_dictionary(tmp_path)
    assert (found.value_point, found.key_point) == (value, key)
    assert found.kind == ("transcoder" if io == "in_and_out" else "sae")


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"architecture": "topk"}, {}, "has k=None; expected 1 to its 16 features"),
        ({"architecture": "topk", "k": 17}, {}, "has k=17; expected 1 to its 16 features"),
        ({"architecture": "jumprelu"}, {}, r"lacks the tensors \['threshold'\]"),
        ({"architecture": "jumprelu"}, {"threshold": torch.zeros(3)}, r"has threshold \[3\]; expected \[16\]"),
        ({"architecture": "standard"}, {"b_dec": torch.zeros(5)}, r"has b_dec \[5\]; expected \[12\]"),
        ({"architecture": "temporal"}, {}, "lacks the tensor attn_layers.0.k_ctx.weight"),
    ],
)
def test_coders_that_cannot_run_say_why(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    weights = {"W_dec": torch.randn(N, D), "W_enc": torch.randn(D, N), "b_enc": torch.zeros(N), "b_dec": torch.zeros(D)}
    save_file({**weights, **tensors}, str(tmp_path / "sae_weights.safetensors"))
    where = {"metadata": {"hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.0.0"}}
    (tmp_path / "cfg.json").write_text(json.dumps({**settings, **where}))
    with pytest.raises(ValueError, match=message):
        ql.load_dictionary(tmp_path).coder.encode(torch.randn(1, 2, D))
