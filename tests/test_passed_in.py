"""What people pass in as a model: wrappers are taken off, hostile folders and unusable models are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import CONFIGS, save_tiny_model

import querylens_fast as ql
from bench.family_cases import tiny
from querylens_fast.models import weights_only


def source(name: str = "qwen3") -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def test_a_model_in_memory_needs_no_loading() -> None:
    with pytest.raises(TypeError, match="Qwen3ForCausalLM; expected a hub id or a folder.*as_model"):
        ql.load_model(source())  # type: ignore[arg-type]


def test_wrappers_are_taken_off() -> None:
    model = source()
    plain = ql.as_model(model)
    assert ql.as_model(torch.nn.DataParallel(model)).fingerprint == plain.fingerprint
    assert ql.as_model(torch.compile(model)).fingerprint == plain.fingerprint
    assert "_querylens_model" not in vars(model)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_transformer_bridges(name: str, tmp_path: Path) -> None:
    """A real bridge is the model in it, with its tokenizer, unless its weights were processed."""
    bridges = pytest.importorskip("transformer_lens.model_bridge", reason="needs transformer-lens 3 or later")
    folder = save_tiny_model(name, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def boot() -> Any:
        inner = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return bridges.TransformerBridge.boot_transformers(str(folder), hf_model=inner, tokenizer=tokenizer)

    plain, bridge = ql.load_model(folder), boot()
    found = ql.as_model(bridge)
    assert found.fingerprint == plain.fingerprint and found.linearisation == "hand-written"
    assert found.tokenizer is bridge.tokenizer
    bridge.enable_compatibility_mode(no_processing=True)
    assert ql.as_model(bridge).fingerprint == plain.fingerprint
    processed = boot()
    processed.enable_compatibility_mode()
    with pytest.raises(ql.UnsupportedModelError, match="weights were processed in place"):
        ql.as_model(processed)


def test_nnsight_models(gpt2_folder: Path) -> None:
    nnsight = pytest.importorskip("nnsight", reason="its environment is not that of sae-lens")
    inner = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    found = ql.as_model(nnsight.LanguageModel(inner, tokenizer=tokenizer))
    assert found.fingerprint == ql.load_model(gpt2_folder).fingerprint and found.tokenizer is not None


def test_peft_models() -> None:
    peft = pytest.importorskip("peft", reason="adapters are not needed by anything here")
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(source(), peft.LoraConfig(**options)).eval()
    for given in (adapted, adapted.base_model.model):
        with pytest.raises(ql.UnsupportedModelError, match="unmerged adapters.*merge_and_unload"):
            ql.as_model(given)
    assert ql.as_model(adapted.merge_and_unload()).fingerprint != ql.as_model(source()).fingerprint


def test_bitsandbytes_layers() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantisation is not needed by anything here")
    model = source()
    model.model.layers[0].mlp.up_proj = bitsandbytes.nn.Linear8bitLt(24, 40, bias=False)
    with pytest.raises(ql.UnsupportedModelError, match="quantised weights.*Linear8bitLt"):
        ql.as_model(model)


def test_unusable_models_are_refused_by_name() -> None:
    with torch.device("meta"):
        absent = transformers.AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    with pytest.raises(ql.UnsupportedModelError, match="not in memory"):
        ql.as_model(absent.eval())
    with pytest.raises(ql.UnsupportedModelError, match="has no unembedding"):
        ql.as_model(transformers.AutoModel.from_config(CONFIGS["qwen3"]()).eval())
    with pytest.raises(ValueError, match=r"call .eval\(\)"):
        ql.as_model(source("gpt2").train())
    adapted = source()
    adapted.model.layers[0].lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(ql.UnsupportedModelError, match="merge_and_unload"):
        ql.as_model(adapted)


def test_a_changed_weight_is_noticed_behind_data() -> None:
    """Edits through .data do not raise a tensor's version."""
    model = source("gemma3")
    before = ql.as_model(model).fingerprint
    model.model.layers[1].input_layernorm.weight.data.add_(0.5)
    assert ql.as_model(model).fingerprint != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 10**7}, "n_layer = 10000000, more than"),
        ({"n_layer": -3}, "n_layer = -3; expected a positive integer"),
        ({"n_layer": 900}, "has 900 layers, but its weights are"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "needs code of its own|never run"),
    ],
)
def test_hostile_configs(change: dict, message: str, gpt2_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        ql.load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected a JSON object"):
        ql.load_model(folder)


def test_the_readout_alone(gpt2: ql.Model, gpt2_folder: Path) -> None:
    model = ql.load_model(gpt2_folder, dtype="float64", linearisation="none")
    directions = ql.directions(torch.randn(4, 24), layer=1)
    whole, alone = (ql.signatures(directions, m, preset="logit_lens_value", k=3) for m in (gpt2, model))
    assert torch.equal(whole.top_ids, alone.top_ids)
    with pytest.raises(ql.UnsupportedModelError, match="was not read"):
        model.residuals(torch.zeros(1, 3, dtype=torch.int64))


UNUSUAL = ("gpt_neox_parallel", "falcon_h1", "ctrl", "gemma4_shared")
"""Their readout has another name in the file, factors, a bias, or layers that are refused."""


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_readout_alone_is_the_models_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_only, "LARGE", 400)  # as of a large model
    source = tiny(name)
    source.save_pretrained(tmp_path)
    model = ql.load_model(tmp_path, dtype="float64", linearisation="none")
    layers = source.get_decoder().layers if hasattr(source.get_decoder(), "layers") else source.get_decoder().h
    stream = torch.randn(2, 4, model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(
        lambda _m, a, k: given.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    layers[-1].register_forward_hook(lambda _m, _a, out: (stream, *out[1:]) if isinstance(out, tuple) else stream)
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
    with torch.no_grad():
        logits = source(input_ids=ids, use_cache=False).logits
    assert (model.logits(stream) - logits).norm() < 1e-6 * logits.norm()
    change, ours = given[0][0] - given[0][1], model.embed(ids[0]) - model.embed(ids[1])
    assert (change - ours).norm() < 1e-6 * change.norm()
    assert model.n_layers == len(layers)


def test_a_readout_that_norms_its_embeddings_is_not_read_alone(tmp_path: Path) -> None:
    tiny("bloom").save_pretrained(tmp_path)
    with pytest.raises(ql.UnsupportedModelError, match="does more to its token embeddings than scale them"):
        ql.load_model(tmp_path, linearisation="none")


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertLMHeadModel"])
def test_encoders_are_refused_however_little_they_look_ahead(kind: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    encoder = getattr(transformers, kind)(transformers.BertConfig(vocab_size=61, **shape)).eval()
    with pytest.raises(ql.UnsupportedModelError, match="later tokens"):
        ql.as_model(encoder)
