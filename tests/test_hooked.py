"""Hooked models and sae-lens objects, the real ones: the same rows as through the transformers model and our files."""

import pytest
import torch
import transformers
from golden_cases import CASES, GoldenCase, assert_close, assert_same_row, golden

import querylens_fast as ql

sae_lens = pytest.importorskip("sae_lens")
loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
CONVERT = {
    "gpt2": loading.convert_gpt2_weights,
    "gemma3_text": loading.convert_gemma_weights,
    "qwen3": loading.convert_qwen3_weights,
}


def gpt2_settings(case: dict, config) -> dict:
    return {
        "n_layers": case["L"], "d_model": case["d"], "n_heads": case["H"], "d_head": case["d"] // case["H"],
        "d_mlp": 4 * case["d"], "d_vocab": case["V"], "act_fn": "gelu_new", "normalization_type": "LN",
        "eps": config.layer_norm_epsilon,
    }  # fmt: skip


def rotary_settings(case: dict, config) -> dict:
    return {
        "n_layers": case["L"], "d_model": case["d"], "n_heads": case["H"], "d_head": case["dh"], "d_mlp": case["d_mlp"],
        "n_key_value_heads": case["KV"], "d_vocab": case["V"], "eps": config.rms_norm_eps, "normalization_type": "RMS",
        "positional_embedding_type": "rotary", "rotary_dim": case["dh"], "rotary_adjacent_pairs": False,
        "gated_mlp": True, "final_rms": True, "use_qk_norm": True,
    }  # fmt: skip


def qwen3_settings(case: dict, config) -> dict:
    return {**rotary_settings(case, config), "act_fn": "silu", "rotary_base": 10000}


def gemma3_settings(case: dict, config) -> dict:
    return {
        **rotary_settings(case, config), "act_fn": "gelu_pytorch_tanh", "rotary_base": 1000000,
        "rotary_base_local": 10000, "use_local_attn": True, "window_size": case["window"],
        "attn_types": case["attn_types"], "use_normalization_before_and_after": True,
    }  # fmt: skip


SETTINGS = {"gpt2": gpt2_settings, "gemma3_text": gemma3_settings, "qwen3": qwen3_settings}


def hooked_model(case: GoldenCase):
    """A HookedSAETransformer of a golden model, its weights converted by transformer-lens, nothing folded."""
    from transformer_lens import HookedTransformerConfig

    source = transformers.AutoModelForCausalLM.from_pretrained(case.model_path, dtype=torch.float64)
    settings = SETTINGS[source.config.model_type](case.config, source.config)
    common = {"dtype": torch.float64, "device": "cpu", "n_ctx": 64, "model_name": case.name}
    config = HookedTransformerConfig.from_dict({**common, **settings})
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.model_path)
    hooked = sae_lens.HookedSAETransformer(config, tokenizer=tokenizer)
    weights = CONVERT[source.config.model_type](source, config)
    hooked.load_state_dict({k: v.double() for k, v in weights.items()}, strict=False)
    return hooked.double().eval()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return golden(request.param)


@pytest.fixture(scope="module")
def hooked(case: GoldenCase):
    return hooked_model(case)


def sae_of(case: GoldenCase, layer: int):
    folder = case.sae_path(layer)
    kind = sae_lens.Transcoder if "transcoder" in case.name else sae_lens.SAE
    sae = kind.load_from_disk(str(folder)).double()
    sae.dtype = torch.float64  # what its inputs are cast to
    return sae


def test_hooked_models_are_recognised(case: GoldenCase, hooked) -> None:
    adapted, plain = ql.as_model(hooked), ql.load_model(case.model_path, dtype="float64")
    assert adapted.convention.startswith("hooked model") and plain.convention == "raw lm_head"
    ids = torch.randint(3, adapted.vocab_size, (2, 9))
    assert_close(adapted.logits(adapted.residuals(ids)[2]), hooked(ids).detach(), "logits", 1e-6)
    assert_close(adapted.embed(ids), plain.embed(ids), "embeddings", 1e-6)


@pytest.mark.parametrize(
    "preset", ["query_lens_value", "query_lens_key", "query_lens_value_approx", "query_lens_key_approx"]
)
def test_the_references_rows(case: GoldenCase, hooked, preset: str) -> None:
    model = ql.as_model(hooked)
    tokens = ql.load_tokens(case.tokens_path, model=model)
    for layer in case.layers:
        found = ql.signatures(
            sae_of(case, layer), hooked, preset=preset, tokens=tokens, k=case.k, features=case.features,
            layers=preset.endswith("approx"),
        )  # fmt: skip
        for row in found.rows():
            assert_same_row(row, case, preset, layer, row["feature"])


@pytest.mark.parametrize("preset", ["query_lens_value_approx", "query_lens_key"])
def test_a_reference_users_script(case: GoldenCase, hooked, preset: str) -> None:
    """The reference's own calls, on the objects its users hold."""
    from querylens_fast.analysis import Feature, common, jvp, vjp

    ids, layer, feature = ql.load_tokens(case.tokens_path).ids, case.layers[1], case.features[2]
    f = Feature(case.name, feature, str(layer), "res")
    transition = common.BASELINE_REGISTRY[preset]["stream_transition"]
    build = common.ResidCache if "value" in preset else common.VJPResidCache
    cache = build.build_for_local_pile_sample(hooked, ids, 1, "all", use_layer_norm=True)
    if "value" in preset:
        row = jvp.analyze_feature(
            hooked, f, sae_of(case, layer), ids, 0, 1, transition, k=case.k, use_jvp_layer_norm=True, resid_cache=cache
        )
    else:
        row = vjp.analyze_feature(
            hooked, f, sae_of(case, layer), ids, 0, 1, transition, k=case.k, use_vjp_layer_norm=True, resid_cache=cache
        )
    assert_same_row(row, case, preset, layer, feature)


@pytest.mark.parametrize(("preset", "value", "sign"), [("token_change", 10.0, 1), ("zero_out", 0.0, -1)])
def test_ablations_are_the_hooked_models_own(case: GoldenCase, hooked, preset: str, value: float, sign: int) -> None:
    """The mean change of logits that the hooked model itself gives with the SAE spliced in and the feature set."""
    ids = ql.load_tokens(case.tokens_path).ids
    layer, feature = case.layers[1], case.features[1]
    sae = sae_of(case, layer)
    site = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name

    def change(acts, hook):
        acts[:, :, feature] = value
        return acts

    with torch.no_grad():
        clean = hooked.run_with_saes(ids, saes=[sae])
        changed = hooked.run_with_hooks_with_saes(ids, saes=[sae], fwd_hooks=[(f"{site}.hook_sae_acts_post", change)])
    expected = sign * (changed - clean).mean((0, 1))
    plain = ql.load_model(case.model_path, dtype="float64")
    for model in (hooked, plain):
        dictionary = sae if model is hooked else ql.load_dictionary(case.sae_path(layer))
        found = ql.scores_at(dictionary, model, [feature], torch.arange(len(expected)), preset=preset, tokens=ids)
        assert_close(found[0], expected, preset)


def test_an_unsupported_hooked_model_is_refused(case: GoldenCase, hooked) -> None:
    hooked.cfg.parallel_attn_mlp = True
    kept = hooked.__dict__.pop("_querylens_model", None)
    try:
        with pytest.raises(ql.UnsupportedModelError, match="parallel_attn_mlp=True"):
            ql.as_model(hooked)
    finally:
        hooked.cfg.parallel_attn_mlp = False
        if kept is not None:
            hooked._querylens_model = kept


def random_dictionary(architecture: str, d: int, layer: int):
    """A real sae-lens object with random weights."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(architecture)
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    extra: dict = {"k": 5} if architecture == "topk" else {}
    if "transcoder" in architecture:
        metadata = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        extra = {"d_out": d, "apply_b_dec_to_input": False}
    sae = kind(config(d_in=d, d_sae=40, metadata=sae_lens.saes.sae.SAEMetadata(**metadata), **extra)).double()
    sae.dtype = torch.float64
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return sae


@pytest.mark.parametrize("architecture", ["topk", "skip_transcoder", "jumprelu_transcoder", "gated"])
def test_other_dictionaries_spliced_into_every_model(case: GoldenCase, hooked, architecture: str) -> None:
    torch.manual_seed(0)
    ids = ql.load_tokens(case.tokens_path).ids
    sae = random_dictionary(architecture, hooked.cfg.d_model, layer=1)
    site = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name

    def change(acts, hook):
        acts[:, :, 7] = 10.0
        return acts

    with torch.no_grad():
        clean = hooked.run_with_saes(ids, saes=[sae])
        changed = hooked.run_with_hooks_with_saes(ids, saes=[sae], fwd_hooks=[(f"{site}.hook_sae_acts_post", change)])
    expected = (changed - clean).mean((0, 1))
    plain = ql.load_model(case.model_path, dtype="float64")
    found = ql.scores_at(sae, plain, [7], torch.arange(len(expected)), preset="token_change", tokens=ids)
    assert_close(found[0], expected, architecture)


def test_neurons_are_the_hooked_models_own(case: GoldenCase, hooked) -> None:
    """Values, keys and both ablations of MLP neurons, gated ones included."""
    ids, layer, neuron = ql.load_tokens(case.tokens_path).ids, 1, 9
    plain = ql.load_model(case.model_path, dtype="float64")
    dictionary = ql.neuron_dictionary(plain, layer)
    mlp = hooked.blocks[layer].mlp
    chosen = torch.tensor([neuron])
    assert_close(dictionary.values(chosen)[0], mlp.W_out[neuron].detach(), "value", 1e-7)
    assert_close(dictionary.keys(chosen)[0], mlp.W_in[:, neuron].detach(), "key", 1e-7)
    for preset, value, sign in (("token_change", 10.0, 1), ("zero_out", 0.0, -1)):

        def change(acts, hook, value=value):
            acts[:, :, neuron] = value
            return acts

        with torch.no_grad():
            clean = hooked(ids)
            changed = hooked.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", change)])
        expected = sign * (changed - clean).mean((0, 1))
        found = ql.scores_at(dictionary, plain, [neuron], torch.arange(len(expected)), preset=preset, tokens=ids)
        assert_close(found[0], expected, preset)
