"""The reference's Python interface: the golden rows, feature by feature, and its small functions."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_cases import CASES, assert_close, assert_same_row, golden

from querylens_fast.analysis import common, jvp, vjp
from querylens_fast.analysis.processes import distribute_batch
from querylens_fast.analysis.run import analyze_identity, analyze_token_change, analyze_tuned_lens
from querylens_fast.dictionaries.feature_lists import Feature
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.tuned_lens import load_tuned_lens
from querylens_fast.models.load import load_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, load_tokens
from querylens_fast.transport.fit import fit_transport

CFG = SimpleNamespace(token_change_value=10.0, accumulation_steps=1)


@cache
def model_of(name: str) -> Model:
    return load_model(golden(name).model_path, dtype="float64")


@cache
def tokens_of(name: str) -> Tokens:
    return load_tokens(golden(name).tokens_path, model=model_of(name))


def analyse(
    name: str, baseline: str, layer: int, feature: int, transport: Any = None, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """One golden feature through the reference's functions, as its run.py calls them."""
    case, model, ids = golden(name), model_of(name), tokens_of(name).ids
    share = ids[slice(*distribute_batch(len(ids), rank, world_size))]
    f = Feature(name, feature, layer, "res")
    sae = load_dictionary(case.sae_path(layer))
    parts = common.BASELINE_REGISTRY[baseline]
    vector, transition, readout = (parts[k] for k in ("feature_vector", "stream_transition", "readout"))
    common_arguments = {
        "model": model, "f": f, "sae": sae, "pile_sample": ids, "rank": rank, "world_size": world_size,
        "stream_transition": transition, "submodule": "both", "k": case.k, "accumulation_steps": 2,
        "transport": transport,
    }  # fmt: skip
    if transition == "identity":
        return analyze_identity(model, f, sae, vector, readout, case.k, True)
    if transition == "tuned_lens":
        return analyze_tuned_lens(model, f, sae, case.k, True, load_tuned_lens(case.tuned_lens_path).params)
    if transition in ("token_change", "zero_out"):
        cache_ = common.ResidCache.build_for_local_pile_sample(model, share, 1, "all")
        ablated = transition == "zero_out"
        return analyze_token_change(model, f, sae, ids, rank, world_size, CFG, cache_, case.k, ablated)
    if vector == "value":
        cache_ = common.ResidCache.build_for_local_pile_sample(model, share, 2, "all", use_layer_norm=True)
        return jvp.analyze_feature(**common_arguments, use_jvp_layer_norm=True, resid_cache=cache_)
    cache_ = common.VJPResidCache.build_for_local_pile_sample(model, share, 2, "all", use_layer_norm=True)
    return vjp.analyze_feature(**common_arguments, use_vjp_layer_norm=True, resid_cache=cache_)


@pytest.mark.parametrize("baseline", list(common.BASELINE_REGISTRY))
@pytest.mark.parametrize("name", CASES)
def test_goldens(name: str, baseline: str) -> None:
    case = golden(name)
    for layer, feature in zip(case.layers, case.features, strict=False):
        found = analyse(name, baseline, layer, feature)
        assert_same_row(found, case, baseline, layer, feature)
        assert list(found) == [k for k in case.row(baseline, layer, feature) if k not in ("baseline", "feature")]


@pytest.mark.parametrize("baseline", ["query_lens_value", "query_lens_key_approx", "query_lens_value_approx"])
def test_a_transport_gives_the_same_result(baseline: str) -> None:
    """A fitted transport and a walk of the one feature agree, whether given or attached to the cache."""
    name = CASES[0]
    case, model = golden(name), model_of(name)
    transport = fit_transport(model, tokens_of(name), progress=False)
    layer, feature = case.layers[1], case.features[1]
    assert_same_row(analyse(name, baseline, layer, feature, transport), case, baseline, layer, feature)
    cache_ = common.ResidCache.build_for_local_pile_sample(model, tokens_of(name).ids, 1, "all")
    cache_.transport = fit_transport(model, tokens_of(name), progress=False, through_norms=False)
    arguments = (model, Feature(name, feature, layer, "res"), load_dictionary(case.sae_path(layer)))
    options = {"stream_transition": "full", "k": case.k}
    found = jvp.analyze_feature(*arguments, tokens_of(name).ids, 0, 1, **options, resid_cache=cache_)
    walked = jvp.analyze_feature(*arguments, tokens_of(name).ids, 0, 1, **options)
    assert found["top_ids"] == walked["top_ids"]
    assert_close(list(found["stats"].values()), list(walked["stats"].values()), "stats")
    with pytest.raises(ValueError, match="fitted with through_norms=True, but this call has through_norms=False"):
        jvp.analyze_feature(*arguments, tokens_of(name).ids, 0, 1, **options, transport=transport)
    with pytest.raises(ValueError, match="tokens_digest"):
        analyse_on = tokens_of(name).ids[:2]
        jvp.analyze_feature(*arguments, analyse_on, 0, 1, **options, use_jvp_layer_norm=True, transport=transport)


def test_module_jacobians_are_the_modules_own() -> None:
    """jvp_* and vjp_* against torch.func on the transformers modules, with and without norms."""
    model, tokens = model_of("qwen3-transcoder"), tokens_of("qwen3-transcoder")
    layer, source = 1, model.source.model.layers[1]
    cache_ = common.ResidCache.build_for_local_pile_sample(model, tokens.ids, 1, "all", use_layer_norm=True)
    _, mid, mask = cache_.get(0)
    assert mid is not None and mask is not None and torch.equal(mask, tokens.valid_mask)
    normed_cache = common.ResidCache.build_for_local_pile_sample(model, tokens.ids, 1, "mlp")
    nothing, normed, _ = normed_cache.get(0)
    assert nothing is None and normed is not None
    v = torch.randn(model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x, with_norm in ((mid[layer], True), (normed[layer], False)):

        def whole(x: torch.Tensor, with_norm: bool = with_norm) -> torch.Tensor:
            return source.mlp(source.post_attention_layernorm(x) if with_norm else x)

        output, expected = torch.func.jvp(whole, (x,), (v.expand_as(x),))
        found = common.jvp_mlp(model, layer, x, v, return_output=True, use_layer_norm=with_norm)
        assert_close(found[0], output, "output")
        assert_close(found[1], expected, "jvp")
        _, pull = torch.func.vjp(whole, x)
        assert_close(common.vjp_mlp(model, layer, x, v, with_norm), pull(v.expand_as(x))[0], "vjp")
    pre = cache_.get(0, "attn")[0]
    assert pre is not None
    pushed = common.jvp_attn(model, layer, pre[layer], v, use_layer_norm=True, attention_mask=mask)
    w = torch.randn_like(pushed)
    pulled = common.vjp_attn(model, layer, pre[layer], w, use_layer_norm=True, attention_mask=mask)
    assert_close((pushed * w).sum(), (pulled * v).sum(), "⟨Ju, w⟩ = ⟨u, Jᵀw⟩")
    with pytest.raises(ValueError, match=r"vector is \[3\]"):
        common.jvp_mlp(model, layer, mid[layer], v[:3])
    with pytest.raises(ValueError, match="float32; expected"):
        common.jvp_mlp(model, layer, mid[layer].float(), v)


def test_caches_hold_the_residuals() -> None:
    model, ids = model_of("gpt2-standard-sae"), tokens_of("gpt2-standard-sae").ids
    hidden = model.source(ids, output_hidden_states=True).hidden_states
    whole = common.VJPResidCache.build_for_local_pile_sample(model, ids, 3, "all", use_layer_norm=True)
    assert len(whole) == 3 and sum(c.valid_mask.shape[0] for c in whole.chunks) == len(ids)
    assert_close(torch.cat([whole.get(i)[0] for i in range(3)], 1)[2], hidden[2], "resid_pre")
    embed = torch.cat([whole.get(i)[2] for i in range(3)])
    assert_close(embed, model.source.transformer.wte(ids), "hook_embed")
    attn, mlp, embed, mask = whole.get(0, "mlp")
    assert attn is None and mlp is not None and embed is not None and mask is not None
    normed = common.ResidCache.build_for_local_pile_sample(model, ids, 1, "attn")
    assert_close(normed.get(0)[0][1], model.source.transformer.h[1].ln_1(hidden[1]), "ln1(resid_pre)")
    own = common.ResidCache([common.ResidChunk(None, None, torch.ones(8, 12, dtype=torch.bool))], "all")
    assert len(own) == 1 and own.get(0)[2].all()
    with pytest.raises(ValueError, match="kind is 'x'"):
        own.get(0, "x")
    with pytest.raises(ValueError, match="module_type is 'both'"):
        common.ResidCache.build_for_local_pile_sample(model, ids, 1, "both")
    padded = common.ResidCache.build_for_local_pile_sample(model, ids, 1, "all", pad_token_id=int(ids[0, 0]))
    assert torch.equal(padded.valid_masks[0], ids != ids[0, 0])


def test_readouts_and_vectors() -> None:
    name = "gemma3-jumprelu-sae"
    case, model, tokens = golden(name), model_of(name), tokens_of(name)
    f, sae = Feature(name, 5, "2", "res"), load_dictionary(case.sae_path(2))
    value, key = common.get_feature_vector(model, f, sae), common.get_feature_input_vector(model, f, sae)
    assert_close(value, case.expected("logit_lens_value", 2, "vector")[1], "value")
    assert_close(key, case.expected("logit_lens_key", 2, "vector")[1], "key")
    source = model.source
    assert_close(common.apply_unembed(model, value), source.lm_head(source.model.norm(value)), "unembed")
    assert_close(common.apply_unembed(model, value[None, None], False)[0, 0], source.lm_head(value), "no norm")
    table = source.model.embed_tokens(torch.arange(model.vocab_size))
    assert_close(common.apply_embed(model, key), key @ table.T, "embed")
    for centre in (None, case.tensors["mean_embed"], case.tensors["mean_embed"][None]):
        around = table - (table.mean(0) if centre is None else centre.reshape(-1))
        expected = key @ (around / around.norm(dim=1, keepdim=True)).T
        assert_close(common.apply_embed_cosine_centered(model, key, centre), expected, "cosine")
    scores = common.apply_embed(model, key)
    for wrapper in (model, SimpleNamespace(m=model)):
        (top, bottom), (top_ids, bottom_ids) = common.get_logits_tokens(wrapper, scores, 4)
        assert top_ids == [scores.topk(4).indices.tolist()] and top == [model.str_tokens(top_ids[0])]
        assert bottom_ids == [scores.topk(4, largest=False).indices.tolist()] and len(bottom[0]) == 4
    assert common.get_logits_tokens(model, torch.zeros(2, model.vocab_size))[1][0] == [list(range(10))] * 2
    neuron = Feature(name, 3, 1, "mlp")
    assert_close(common.get_feature_vector(model, neuron), source.model.layers[1].mlp.down_proj.weight[:, 3], "value")
    assert_close(common.get_feature_input_vector(model, neuron), source.model.layers[1].mlp.up_proj.weight[3], "key")
    changed = common.compute_token_change(model, tokens.ids, f, sae, 10.0)
    assert changed.topk(case.k).indices.tolist() == case.row("token_change", 2, 5)["top_ids"]
    negative = common.compute_token_change(model, tokens.ids, f, sae, 10.0, invert_sign=True)
    assert_close(negative, -changed, "inverted")
    assert common.compute_token_change(model, ["w1 w2 w3", "w4"], f, sae, 1.0).shape == (model.vocab_size,)
    acts = common.set_feature_act_hook(torch.zeros(1, 2, 3), None, 1, 5.0)
    assert acts.tolist() == [[[0, 5, 0], [0, 5, 0]]]


def test_statistics() -> None:
    V = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    stats = common.jacobian_linearity(V, mask)
    v = V[mask]
    mu = v.mean(0)
    assert list(stats) == [
        "N", "N_used", "E_mu", "sum_energy", "mean_energy", "sum_parallel2", "EV_mu", "perp_EV", "rel_var"
    ]  # fmt: skip
    assert_close(stats["rel_var"], 1 - mu.square().sum() / v.square().sum(1).mean(), "rel_var")
    assert_close(stats["EV_mu"], (v @ (mu / mu.norm())).square().sum() / v.square().sum(), "EV_mu")
    assert (stats["N"], stats["N_used"]) == (8.0, 8.0)
    assert set(common.jacobian_linearity(V, torch.zeros(2, 5)).values()) == {0.0}
    assert common.jacobian_linearity(V, None)["N"] == 10.0
    assert_close(common.distributed_mean_vector(V[0].sum(0), 5), V[0].mean(0), "mean")
    assert torch.equal(common.distributed_mean_vector(V[0]), V[0])
    with pytest.raises(ValueError, match="at least one valid position"):
        common.distributed_mean_vector(V[0], 0)
    assert [distribute_batch(10, r, 4) for r in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_presets_resolve() -> None:
    assert len(common.BASELINE_REGISTRY) == 9
    named = {"baseline": "query_lens_key", "feature_vector": "value"}
    full = {"feature_vector": "key", "stream_transition": "full", "readout": "embed_cosine_centered"}
    for cfg in (named, SimpleNamespace(**named)):
        assert common.resolve_baseline(cfg) == {**full, "baseline": "query_lens_key"}
    parts = SimpleNamespace(baseline=None, feature_vector="key", stream_transition="identity", readout="unembed")
    assert common.resolve_baseline(parts)["baseline"] == "key_identity_unembed"
    with pytest.raises(ValueError, match="unknown preset 'x'; known are logit_lens_value"):
        common.resolve_baseline({"baseline": "x"})
    with pytest.raises(ValueError, match="neither a baseline nor a feature_vector"):
        common.resolve_baseline({"baseline": None})


def test_reference_token_changes(tmp_path: Any) -> None:
    assert common.load_reference_token_changes(None) == {"by_str": {}, "by_idx": {}}
    with pytest.raises(FileNotFoundError, match="do not exist"):
        common.load_reference_token_changes(str(tmp_path / "none.jsonl"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"feature_str": "F", "feature_index": "3", "positive_top_ids": [1]}\n\n')
    found = common.load_reference_token_changes(str(path))
    assert found["by_str"]["F"]["positive_top_ids"] == [1] and found["by_idx"][3] is found["by_str"]["F"]
    path.write_text("{broken\n")
    with pytest.raises(ValueError, match="line 1 is no result row"):
        common.load_reference_token_changes(str(path))


def test_wrong_arguments_are_named() -> None:
    name = "gpt2-standard-sae"
    case, model, ids = golden(name), model_of(name), tokens_of(name).ids
    f, sae = Feature(name, 0, 1, "res"), load_dictionary(case.sae_path(1))
    for wrong, message in (
        ({"stream_transition": "identity"}, "stream_transition is 'identity'"),
        ({"submodule": "none"}, "submodule is 'none'"),
        ({"world_size": 2}, "torch.distributed runs no processes"),
        ({"f": Feature(name, 96, 1, "res")}, "feature 96 is not in"),
        ({"f": Feature(name, 0, 2, "res")}, "of layer 2, but its dictionary .* of layer 1"),
        ({"resid_cache": common.ResidCache.build_for_local_pile_sample(model, ids[:3], 1, "all")}, "was built for"),
    ):
        arguments: dict[str, Any] = {
            "model": model, "f": f, "sae": sae, "pile_sample": ids, "rank": 0, "world_size": 1,
            "stream_transition": "full",
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jvp.analyze_feature(**{**arguments, **wrong})
