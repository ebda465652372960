"""Dictionaries: every source gives the same vectors, at the right point; what does not fit is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import golden
from safetensors.torch import load_file, save_file
from tiny_models import D_MODEL

import querylens_fast as ql
from querylens_fast.dictionaries.hook_points import hook_point

N = 11


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "W_dec": torch.randn(N, D_MODEL, generator=generator),
        "W_enc": torch.randn(D_MODEL, N, generator=generator),
    }


def plain_file(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    path = folder / "plain.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, str(path))
    return path


def sae_folder(folder: Path, weights: dict[str, torch.Tensor], **cfg: object) -> Path:
    folder.mkdir(exist_ok=True)
    extra = {"b_enc": torch.zeros(N), "b_dec": torch.zeros(D_MODEL)}
    save_file({k: v.contiguous() for k, v in {**extra, **weights}.items()}, str(folder / "sae_weights.safetensors"))
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def test_a_plain_file(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    dictionary = ql.load_dictionary(plain_file(tmp_path, weights), layer=1)
    assert (dictionary.n_features, dictionary.d_model, dictionary.layer) == (N, D_MODEL, 1)
    assert torch.equal(dictionary.values(slice(2, 5)), weights["W_dec"][2:5])
    chosen = torch.tensor([7, 8, 3])
    assert torch.equal(dictionary.keys(chosen), weights["W_enc"].T[chosen])
    assert dictionary.point("value") == dictionary.point("key") == 4


@pytest.mark.parametrize("missing", ["W_enc", "W_dec"])
def test_one_side_only(tmp_path: Path, weights: dict[str, torch.Tensor], gpt2: ql.Model, missing: str) -> None:
    del weights[missing]
    dictionary = ql.load_dictionary(plain_file(tmp_path, weights), layer=1)
    side = "value" if missing == "W_dec" else "key"
    with pytest.raises(ValueError, match=f"holds no {side} vectors"):
        ql.signatures(dictionary, gpt2, preset=f"logit_lens_{side}")


def test_npz_and_pt_files(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Gemma Scope's .npz keeps W_enc as [d, n]; Qwen-Scope's .sae.pt keeps [n, d] and W_dec as [d, n]."""
    np.savez(tmp_path / "params.npz", **{k: v.numpy() for k, v in weights.items()}, threshold=np.zeros(N, np.float32))
    turned = {"W_enc": weights["W_enc"].T, "W_dec": weights["W_dec"].T, "b_enc": torch.zeros(N)}
    torch.save({k: v.contiguous() for k, v in turned.items()}, tmp_path / "layer1.sae.pt")
    for name in ("params.npz", "layer1.sae.pt"):
        dictionary = ql.load_dictionary(tmp_path / name, layer=1)
        assert torch.equal(dictionary.values(slice(None)), weights["W_dec"])
        assert torch.equal(dictionary.keys(slice(None)), weights["W_enc"].T)


def test_a_square_file_of_unknown_orientation_is_refused(tmp_path: Path) -> None:
    torch.save({"W_dec": torch.randn(8, 8), "b_enc": torch.zeros(8)}, tmp_path / "square.pt")
    with pytest.raises(ValueError, match="square.*orientation is not known"):
        ql.load_dictionary(tmp_path / "square.pt", layer=0)


def test_a_pickle_in_a_pt_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"W_dec": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        ql.load_dictionary(tmp_path / "evil.pt", layer=0)
    assert not (tmp_path / "ran").exists()


def test_sae_lens_object_and_folder_agree() -> None:
    sae_lens = pytest.importorskip("sae_lens")
    case = golden("gpt2-standard-sae")
    folder = case.sae_path(1)
    from_folder = ql.load_dictionary(folder)
    from_object = ql.load_dictionary(sae_lens.SAE.load_from_disk(str(folder)))
    for side in ("value", "key"):
        assert torch.equal(from_folder.vectors(side, slice(None)), from_object.vectors(side, slice(None)))
        assert from_folder.point(side) == from_object.point(side)
    x = torch.randn(3, 32)
    assert torch.equal(from_folder.coder.encode(x), from_object.coder.encode(x))
    assert from_folder.fingerprint == from_object.fingerprint


@pytest.mark.parametrize(
    "architecture", ["standard", "jumprelu", "topk", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder"]
)
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_coders_are_sae_lens(tmp_path: Path, architecture: str, normalisation: str) -> None:
    """Every architecture encodes and decodes as the real sae-lens object of the same file."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    torch.manual_seed(0)
    kind, config = get_sae_class(architecture)
    extra = {"k": 4} if architecture == "topk" else {}
    extra |= {"rescale_acts_by_decoder_norm": True} if architecture == "topk" and normalisation == "none" else {}
    extra |= {"d_out": D_MODEL, "apply_b_dec_to_input": False} if "transcoder" in architecture else {}
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post")
    if "transcoder" in architecture:
        metadata = sae_lens.saes.sae.SAEMetadata(
            hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out"
        )
    sae = kind(config(d_in=D_MODEL, d_sae=N, normalize_activations=normalisation, metadata=metadata, **extra))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4)
    sae.save_model(tmp_path)
    dictionary = ql.load_dictionary(tmp_path)
    assert dictionary.kind == ("transcoder" if "transcoder" in architecture else "sae")
    assert dictionary.point("key") == (3 if dictionary.kind == "transcoder" else 4)
    assert dictionary.fingerprint == ql.load_dictionary(sae).fingerprint
    x = torch.randn(2, 5, D_MODEL)
    with torch.no_grad():
        acts = sae.encode(x)
        output = sae(x)
        assert torch.allclose(dictionary.coder.encode(x), acts, atol=1e-6)
        assert torch.allclose(dictionary.coder.decode(acts, x), output, atol=1e-5)


@pytest.mark.parametrize(
    ("hook", "value", "key"),
    [
        ("blocks.1.hook_resid_pre", 2, 2),
        ("blocks.1.hook_resid_mid", 3, 3),
        ("blocks.1.hook_resid_post", 4, 4),
        ("blocks.1.hook_mlp_out", 4, None),
        ("blocks.1.hook_attn_out", 3, None),
        ("blocks.1.attn.hook_z", None, None),
        ("model.layers.1", 4, 4),
        ("transformer.h.1", 4, 4),
    ],
)
def test_hooks_name_points(
    tmp_path: Path, weights: dict[str, torch.Tensor], hook: str, value: int | None, key: int | None
) -> None:
    folder = sae_folder(tmp_path / "sae", weights, architecture="standard", metadata={"hook_name": hook})
    dictionary = ql.load_dictionary(folder)
    assert (dictionary.layer, dictionary.value_point, dictionary.key_point) == (1, value, key)
    for side, point in (("value", value), ("key", key)):
        if point is None:
            with pytest.raises(ValueError, match="not a point of the residual stream"):
                dictionary.point(side)


def test_an_unknown_hook_name_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="'lm_head' is not understood; .*hook_resid_post"):
        hook_point("lm_head")
    folder = sae_folder(tmp_path / "sae", weights, architecture="standard", metadata={"hook_name": "lm_head"})
    with pytest.raises(ValueError, match="hook name 'lm_head' is not understood"):
        ql.load_dictionary(folder)


def test_directions_and_neurons(gpt2: ql.Model) -> None:
    probe = torch.randn(3, D_MODEL)
    dictionary = ql.directions(probe, layer=2)
    assert torch.equal(dictionary.values(torch.tensor([1])), probe[1:2])
    neurons = ql.neuron_dictionary(gpt2, 1)
    mlp = gpt2.source.transformer.h[1].mlp
    assert torch.equal(neurons.values(torch.tensor([5])), mlp.c_proj.weight[5:6])
    assert torch.equal(neurons.keys(torch.tensor([5])), mlp.c_fc.weight[:, 5][None])
    assert (neurons.point("value"), neurons.point("key")) == (4, 3)
    with pytest.raises(ValueError, match="layer is 3, but"):
        ql.neuron_dictionary(gpt2, 3)
    with pytest.raises(ValueError, match="expected a float matrix"):
        ql.directions(torch.zeros(3), layer=0)
    with pytest.raises(ValueError, match=r"keys are \[2, 24\]"):
        ql.directions(probe, layer=0, keys=torch.zeros(2, D_MODEL))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (None, 11),
        ("all", 11),
        ("2:5", 3),
        (":4", 4),
        ("7", 1),
        ("1,3", 2),
        ([4, 2], 2),
        (slice(0, 9, 3), 3),
        (5, 1),
        ([], 0),
    ],
)
def test_select(tmp_path: Path, weights: dict[str, torch.Tensor], features: object, expected: int) -> None:
    dictionary = ql.load_dictionary(plain_file(tmp_path, weights), layer=1)
    if features == []:
        features = torch.empty(0, dtype=torch.int64)
    assert len(dictionary.select(features)) == expected


@pytest.mark.parametrize(
    ("features", "message"),
    [([3, 11], "feature 11 is not in"), ([-1], "feature -1 is not in"), ("a:b", "expected 'all'"), ([0.5], "integer")],
)
def test_select_refuses(tmp_path: Path, weights: dict[str, torch.Tensor], features: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ql.load_dictionary(plain_file(tmp_path, weights), layer=1).select(features)


def test_refusals(tmp_path: Path, weights: dict[str, torch.Tensor], gpt2: ql.Model) -> None:
    path = plain_file(tmp_path, weights)
    with pytest.raises(ValueError, match="does not say its layer; pass layer="):
        ql.load_dictionary(path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ql.load_dictionary(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json"):
        ql.load_dictionary(tmp_path)
    with pytest.raises(ValueError, match="expected a path, a release or an object"):
        ql.load_dictionary(3)
    with pytest.raises(ValueError, match="is of layer 9, but model"):
        ql.signatures(ql.load_dictionary(path, layer=9), gpt2, preset="logit_lens_value")
    wide = plain_file(tmp_path, {"W_dec": torch.randn(3, D_MODEL + 1)})
    with pytest.raises(ValueError, match="d_model 25, but model .* has 24: is this dictionary from another model"):
        ql.signatures(ql.load_dictionary(wide, layer=1), gpt2, preset="logit_lens_value")


def test_contradictions(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    folder = sae_folder(
        tmp_path / "sae", weights, architecture="standard", metadata={"hook_name": "blocks.1.hook_resid_post"}
    )
    with pytest.raises(ValueError, match="of layer 1 by its hook .* but layer=2"):
        ql.load_dictionary(folder, layer=2)
    with pytest.raises(ValueError, match=r"W_enc is \[24, 9\] but W_dec is \[11, 24\]"):
        ql.load_dictionary(plain_file(tmp_path, {**weights, "W_enc": torch.randn(D_MODEL, 9)}), layer=1)
    with pytest.raises(ValueError, match="neither W_dec nor W_enc"):
        ql.load_dictionary(plain_file(tmp_path, {"weight": torch.randn(3, 4)}), layer=1)


def test_truncated_and_incomplete_folders(tmp_path: Path) -> None:
    source = golden("gpt2-standard-sae").sae_path(1)
    shutil.copytree(source, tmp_path / "cut")
    weights = tmp_path / "cut" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        ql.load_dictionary(tmp_path / "cut")
    shutil.copy(source / "sae_weights.safetensors", weights)
    config = (tmp_path / "cut" / "cfg.json").read_text()
    (tmp_path / "cut" / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ql.load_dictionary(tmp_path / "cut")
    (tmp_path / "cut" / "cfg.json").write_text(config)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no sae_weights\.safetensors"):
        ql.load_dictionary(tmp_path / "cut")


def test_nan_vectors_are_named(tmp_path: Path, weights: dict[str, torch.Tensor], gpt2: ql.Model) -> None:
    weights["W_dec"][7, 3] = torch.nan
    dictionary = ql.load_dictionary(plain_file(tmp_path, weights), layer=1)
    assert len(ql.signatures(dictionary, gpt2, preset="logit_lens_value", features="0:7", k=2)) == 7
    with pytest.raises(ValueError, match="value vector of feature 7 holds NaN"):
        ql.signatures(dictionary, gpt2, preset="logit_lens_value", k=2)


def test_a_dictionary_that_cannot_be_run_says_so(
    tmp_path: Path, weights: dict[str, torch.Tensor], gpt2: ql.Model, sample: ql.Tokens
) -> None:
    plain = ql.load_dictionary(plain_file(tmp_path, weights), layer=1)
    with pytest.raises(ValueError, match="no encoder configuration"):
        ql.signatures(plain, gpt2, preset="zero_out", tokens=sample)
    folder = sae_folder(
        tmp_path / "sae", weights, architecture="p-annealed", metadata={"hook_name": "blocks.1.hook_resid_post"}
    )
    with pytest.raises(ValueError, match="'p-annealed' cannot be run here"):
        ql.signatures(ql.load_dictionary(folder), gpt2, preset="zero_out", tokens=sample)


def test_a_release_that_cannot_be_had(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    with pytest.raises(FileNotFoundError, match="could not be loaded by sae-lens"):
        ql.load_dictionary("no-such-release", "no-such-id")


def test_goldens_hold_their_tensors() -> None:
    folder = golden("qwen3-transcoder").sae_path(2)
    dictionary = ql.load_dictionary(folder)
    raw = load_file(str(folder / "sae_weights.safetensors"))
    assert dictionary.kind == "transcoder" and dictionary.point("key") == 5 and dictionary.point("value") == 6
    assert torch.equal(dictionary.keys(slice(None)), raw["W_enc"].T)
