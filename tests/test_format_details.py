"""What formats leave to be told apart: places, classes and numbers that would be read wrongly without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import querylens_fast as ql

N, D = 12, 8


def _write(path: Path, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path))
    return path


def _matrices() -> dict[str, torch.Tensor]:
    return {"W_dec": torch.randn(N, D), "W_enc": torch.randn(D, N), "b_enc": torch.randn(N), "b_dec": torch.randn(D)}


def test_each_side_is_at_the_layer_of_its_own_hook(tmp_path: Path) -> None:
    """A dictionary that reads one layer and writes another."""
    path = _write(tmp_path / "d.safetensors", W_dec=torch.randn(N, D), W_enc=torch.randn(D, N))
    found = ql.load_dictionary(
        path, hook_name="blocks.3.hook_resid_post", hook_name_out="blocks.5.hook_resid_post", kind="transcoder"
    )
    assert (found.layer, found.point("key"), found.point("value")) == (5, 8, 12)


@pytest.mark.parametrize("name", ["activation_function.threshold", "threshold"])
def test_thresholds_in_the_weights_alone(name: str, tmp_path: Path) -> None:
    """circuit-tracer's JumpReLU transcoders say so by a tensor."""
    tensors = {**_matrices(), name: torch.full((N,), 0.7)}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    path = _write(tmp_path / "layer_2.safetensors", **tensors)
    (tmp_path / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n")
    found = ql.load_dictionary(path)
    assert found.point("key") == 5 and found.point("value") == 6
    x = torch.randn(50, D)
    before = x @ tensors["W_enc"].T + tensors["b_enc"]
    assert torch.allclose(found.coder.encode(x), before * (before > 0.7), atol=1e-6)


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("resid_post_vs_transcoder/transcoder/layer_3_width_16k", "blocks.3.mlp.hook_in"),
        ("attn_out_and_affine/resid_post_all/layer_3_width_16k", "blocks.3.hook_resid_post"),
    ],
)
def test_gemma_scope_2_sites_are_the_files_own_folders(folder: str, hook: str, tmp_path: Path) -> None:
    tensors = {"w_dec": torch.randn(N, D), "w_enc": torch.randn(D, N), "threshold": torch.rand(N)}
    found = ql.load_dictionary(_write(tmp_path / folder / "params.safetensors", **tensors))
    assert found.hook_name == hook and "skip" not in found.details["architecture"]


def test_a_dictionary_learning_class_that_is_not_known_is_read_but_not_run(tmp_path: Path) -> None:
    weights = {"encoder.weight": torch.randn(N, D), "encoder.bias": torch.randn(N), "decoder.weight": torch.randn(D, N),
               "bias": torch.randn(D)}  # fmt: skip
    for kind in ("AutoEncoderNew", "CrossCoder"):
        folder = tmp_path / kind
        folder.mkdir()
        torch.save(weights, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "layer": 1}}))
        found = ql.load_dictionary(folder)
        assert torch.equal(found.values(slice(None)), weights["decoder.weight"].T)
        if kind == "CrossCoder":
            with pytest.raises(ValueError, match="CrossCoder"):
                _ = found.coder
        else:
            x = torch.randn(20, D)
            expected = (x @ weights["encoder.weight"].T + weights["encoder.bias"]).relu()
            assert torch.allclose(found.coder.encode(x), expected, atol=1e-6)


def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "layers.3.self_attn"
    _write(folder / "sae.safetensors", **{"encoder.weight": torch.randn(N, D), "W_dec": torch.randn(N, D)})
    (folder / "cfg.json").write_text(json.dumps({"k": 3, "transcode": True}))
    with pytest.raises(ValueError, match="sparsify transcoder of 'layers.3.self_attn'"):
        ql.load_dictionary(folder)
    whitened = tmp_path / "whitened"
    _write(whitened / "sae_weights.safetensors", **_matrices())
    settings = {"architecture": "standard", "normalize_activations": "covariance_whitening", "d_in": D, "d_sae": N,
                "metadata": {"hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.0.0"}}  # fmt: skip
    (whitened / "cfg.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trained on whitened activations"):
        ql.load_dictionary(whitened)
    wide = _write(tmp_path / "wide.safetensors", W_dec=torch.randn(N, D + 2), W_enc=torch.randn(D, N))
    with pytest.raises(ValueError, match="values of width 10 but keys of width 8"):
        ql.load_dictionary(wide, layer=1)
    loaded = ql.directions(torch.randn(N, D), layer=1)
    with pytest.raises(ValueError, match="is loaded already"):
        ql.load_dictionary(loaded, layer=2)


def test_numbers_of_one_byte(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = torch.randn(N, D).to(dtype)
        path = _write(tmp_path / f"{dtype}.safetensors", W_dec=values)
        found = ql.load_dictionary(path, layer=1)
        assert torch.equal(found.values(slice(None)).float(), values.float())


def test_an_npz_entry_that_claims_more_than_it_has(tmp_path: Path) -> None:
    import io
    import zipfile

    import numpy as np

    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (N, D)})
        archive.writestr("W_dec.npy", header.getvalue() + b"\0" * 4 * D)
        archive.writestr("W_enc.npy", b"\0" * 4 * N * D)
    with pytest.raises(ValueError, match="W_dec says .* bytes; fetch the file again|is damaged"):
        ql.load_dictionary(tmp_path / "a.npz", layer=1)
