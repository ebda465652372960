"""Models: our blocks reproduce the model, their Jacobians are its Jacobians, and what is not covered is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import CONFIGS, LAYERS, VOCAB, save_tiny_model
from torch.func import jvp, vjp

import querylens_fast as ql
from querylens_fast.models.blocks import Masking


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_logits_are_the_models_own(tiny_model: ql.Model) -> None:
    ids = torch.randint(0, VOCAB, (2, 9))
    ours = tiny_model.logits(tiny_model.residuals(ids)[2])
    assert relative(ours, tiny_model.source(ids).logits) < 1e-6


def test_residuals_are_the_models_own(tiny_model: ql.Model) -> None:
    ids = torch.randint(0, VOCAB, (2, 9))
    pre, _, _ = tiny_model.residuals(ids)
    theirs = tiny_model.source(ids, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        assert relative(pre[layer], theirs[layer]) < 1e-6


def test_padding_follows_the_attention_mask(tiny_model: ql.Model) -> None:
    """With padding in mid-row the masked blocks give what the model gives for an attention mask."""
    ids, valid = torch.randint(3, VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    valid[1, 3:5] = False
    positions = (valid.long().cumsum(-1) - 1).clamp_min(0)
    theirs = tiny_model.source(ids, attention_mask=valid.long(), position_ids=positions).logits
    x = tiny_model.embed(ids)
    if tiny_model.position_embedding is not None:
        x = x + tiny_model.position_embedding[positions]
    for block in tiny_model.blocks:
        x = block(x, Masking(valid, (2, 9), x.device))
    assert relative(tiny_model.logits(x)[valid], theirs[valid]) < 1e-6


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("masked", [False, True])
def test_linearised_blocks_are_the_jacobian(tiny_model: ql.Model, part: str, masked: bool) -> None:
    torch.manual_seed(1)
    valid = torch.rand(2, 7) > 0.3 if masked else None
    masking = Masking(valid, (2, 7), torch.device("cpu"))
    for block in tiny_model.blocks:
        module = getattr(block, part)
        x = torch.randn(2, 7, tiny_model.d_model, dtype=torch.float64)
        t = torch.randn(3, *x.shape, dtype=torch.float64)

        def run(y: torch.Tensor, module=module) -> torch.Tensor:
            return module(y, masking) if part == "attention" else module(y)

        linear = module.linearise(x, masking) if part == "attention" else module.linearise(x)
        forward = torch.stack([jvp(run, (x,), (ti,))[1] for ti in t])
        pulled = torch.stack([vjp(run, x)[1](ti)[0] for ti in t])
        assert relative(linear.jvp(t), forward) < 1e-10
        assert relative(linear.vjp(t), pulled) < 1e-10
        assert relative((linear.jvp(t) * t).sum(), (t * linear.vjp(t)).sum()) < 1e-10


def test_a_query_that_sees_nothing_attends_to_nothing(gpt2: ql.Model) -> None:
    valid = torch.tensor([[False, False, True, True]])
    x = torch.randn(1, 4, gpt2.d_model, dtype=torch.float64)
    linear = gpt2.blocks[0].attention.linearise(x, Masking(valid, (1, 4), x.device))
    assert torch.isfinite(linear.output).all()
    assert not linear.pattern[0, :, :2].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_dtypes_load_with_the_same_fingerprint(gpt2: ql.Model, gpt2_folder: Path, dtype: str) -> None:
    other = ql.load_model(gpt2_folder, dtype=dtype)
    assert str(other.dtype).endswith(dtype)
    if dtype != "float16":  # float16 rounds before the fingerprint's own rounding does
        assert other.fingerprint == gpt2.fingerprint


def test_token_strings(gpt2: ql.Model) -> None:
    assert gpt2.str_tokens([2, 7, 7]) == ["<pad>", "w7", "w7"]
    assert gpt2.pad_token_id == 2


def test_without_a_tokenizer_strings_are_an_error(gpt2_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(gpt2_folder / name, tmp_path / name)
    model = ql.load_model(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.str_tokens([1])


def test_as_model_takes_a_transformers_model(gpt2: ql.Model) -> None:
    assert ql.as_model(gpt2) is gpt2
    adapted = ql.as_model(gpt2.source)
    assert adapted.fingerprint == gpt2.fingerprint
    assert ql.as_model(gpt2.source) is adapted
    with pytest.raises(ql.UnsupportedModelError, match="expected the result of load_model"):
        ql.as_model("gpt2")


def test_a_model_made_in_memory_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    source = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("looked for a tokenizer")
    )
    assert ql.as_model(source).tokenizer is None


def test_a_variation_we_do_not_reproduce_is_refused(tmp_path: Path) -> None:
    """Gemma 3 with bidirectional attention has the supported type and other logits."""
    folder = save_tiny_model("gemma3", tmp_path)
    config = (folder / "config.json").read_text().replace(
        '"use_bidirectional_attention": false', '"use_bidirectional_attention": true'
    )  # fmt: skip
    (folder / "config.json").write_text(config)
    with pytest.raises(ql.UnsupportedModelError, match="does not reproduce"):
        ql.load_model(folder)


def test_missing_and_damaged_models(gpt2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no config.json"):
        ql.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a readable local folder nor a hub id"):
        ql.load_model("nobody/no-such-model")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        ql.load_model(gpt2_folder, dtype="int8")
    shutil.copytree(gpt2_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises((ValueError, FileNotFoundError), match="damaged|could not be loaded"):
        ql.load_model(tmp_path / "cut")


def test_nan_weights_are_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 1 W_in holds 1 NaN"):
        ql.load_model(tmp_path)


def rewrite_weights(folder: Path, change) -> None:
    """Change a saved checkpoint's tensors in place."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    change(tensors)
    save_file(tensors, str(file), metadata={"format": "pt"})


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    folder = save_tiny_model("qwen3", tmp_path)
    rewrite_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"its files lack model.layers.1.mlp.up_proj.weight, for which random numbers"):
        ql.load_model(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen3", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match="its weights do not have its config's shapes"):
        ql.load_model(folder)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "mod'])
def test_a_damaged_tokenizer_is_not_taken_for_none(content: str, tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be read"):
        ql.load_model(folder)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.k_proj", "mlp.gate_proj", "input_layernorm"])
def test_every_weight_is_in_the_fingerprint(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model("gemma3", tmp_path)
    before = ql.load_model(folder).fingerprint
    assert ql.load_model(folder, dtype="bfloat16").fingerprint == before
    rewrite_weights(folder, lambda t: t.update({f"model.layers.1.{name}.weight": -t[f"model.layers.1.{name}.weight"]}))
    assert ql.load_model(folder).fingerprint != before


def test_a_model_that_changed_is_adapted_again(tmp_path: Path) -> None:
    folder = save_tiny_model("gemma3", tmp_path)
    source = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    first = ql.as_model(source)
    before = first.fingerprint
    assert ql.as_model(source) is first
    with torch.no_grad():
        source.model.layers[1].input_layernorm.weight += 0.5
    trained = ql.as_model(source)
    ids = torch.randint(0, VOCAB, (2, 9))
    assert trained is not first and trained.fingerprint != before
    assert relative(trained.logits(trained.residuals(ids)[2]), source(ids).logits.detach()) < 1e-5
    wider = ql.as_model(source.double())
    assert wider.dtype == torch.float64 and ql.as_model(source) is wider


def test_rotary_positions_that_change_with_the_sequence_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["qwen3"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ql.UnsupportedModelError, match="rotary positions of type 'dynamic'"):
        ql.as_model(model)


@pytest.mark.parametrize(
    ("hook", "side"),
    [("layers.1.mlp", "value"), ("layers.1.self_attn", "value"), ("layers.1.post_attention_layernorm.output", "key")],
)
def test_modules_in_front_of_a_norm_are_refused(hook: str, side: str, tmp_path: Path) -> None:
    """Gemma norms what its modules write; other models add it as it is."""
    import dataclasses

    vectors = torch.randn(5, 24)
    written = "blocks.1.hook_resid_post" if side == "key" else hook
    dictionary = dataclasses.replace(ql.directions(vectors, layer=1), hook_name=hook, hook_name_out=written)
    gemma = ql.load_model(save_tiny_model("gemma3", tmp_path / "gemma"))
    with pytest.raises(ValueError, match=rf"its {side}s are of '{hook}', which .* norms before"):
        ql.signatures(dictionary, gemma, preset=f"logit_lens_{side}")
    plain = ql.load_model(save_tiny_model("qwen3", tmp_path / "qwen"))
    assert len(ql.signatures(dictionary, plain, preset=f"logit_lens_{side}")) == 5
