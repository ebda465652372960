"""Hook points: names stand for the right places; dictionaries there are read, carried and spliced in rightly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import assert_close, golden
from safetensors.torch import save_file
from test_hooked import hooked_model
from tiny_models import D_MODEL, save_tiny_model
from torch import Tensor

import querylens_fast as ql
from bench.family_cases import tiny
from querylens_fast.dictionaries.hook_points import NAMES, SITES, hook_point
from querylens_fast.relations.flow import site

sae_lens = pytest.importorskip("sae_lens")
N = 9


@pytest.mark.parametrize(
    ("name", "layer", "value", "key"),
    [
        ("blocks.3.hook_resid_post", 3, 8, 8),
        ("blocks.3.hook_in", 3, 6, 6),
        ("blocks.3.hook_out", 3, 8, 8),
        ("blocks.3.attn.hook_out", 3, 7, None),
        ("blocks.3.attn.hook_z", 3, None, None),
        ("blocks.3.ln2.hook_normalized", 3, None, 7),
        ("blocks.3.hook_mlp_in", 3, None, 7),
        ("gpt_neox.layers.2", 2, 6, 6),
        ("model.language_model.layers.2", 2, 6, 6),
        ("language_model.model.layers.2.mlp", 2, 6, None),
        ("transformer.h.4.attn", 4, 9, None),
        ("model.layers.4.self_attn", 4, 9, None),
        ("model.layers.4.mlp.input", 4, None, 9),
        ("layers.11", 11, 24, 24),
        ("h.0.mlp", 0, 2, None),
    ],
)
def test_names_stand_for_points(name: str, layer: int, value: int | None, key: int | None) -> None:
    found = hook_point(name)
    assert (found.layer, found.point("value"), found.point("key")) == (layer, value, key)


@pytest.mark.parametrize(
    "name", ["blocks.1.hook_resid_posst", "vision_tower.layers.3", "model.layers.x", "lm_head", "blocks.1.", ""]
)
def test_unknown_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(ValueError, match="is not understood; expected .*hook_resid_mid.*mlp.hook_post"):
        hook_point(name)


def test_the_table_names_every_site_once() -> None:
    names = [name for site in SITES for name in NAMES[site.name].split()]
    assert len(names) == len(set(names)) and {s.name for s in SITES} == set(NAMES)


def vectors(width: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"W_dec": torch.randn(N, width, generator=generator), "W_enc": torch.randn(width, N, generator=generator)}


def loaded(folder: Path, width: int, **where: Any) -> ql.Dictionary:
    save_file(vectors(width), str(folder / "d.safetensors"))
    return ql.load_dictionary(folder / "d.safetensors", **where)


NO_VALUES = ["ln1.hook_normalized", "hook_mlp_in", "ln2.hook_normalized", "mlp.hook_in", "mlp.hook_pre", "attn.hook_q"]


@pytest.mark.parametrize("place", NO_VALUES)
def test_values_that_are_not_in_the_stream_have_no_identity(tmp_path: Path, gpt2: ql.Model, place: str) -> None:
    dictionary = loaded(tmp_path, D_MODEL, hook_name=f"blocks.1.{place}")
    calls: list[Callable[[], Any]] = [
        lambda: ql.signatures(dictionary, gpt2, preset="logit_lens_value", k=2),
        lambda: ql.token_features(dictionary, gpt2, k=2),
        lambda: ql.neighbours(dictionary, k=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{place}.*not a point of the residual stream"):
            call()


@pytest.mark.parametrize("place", ["ln1.hook_normalized", "attn.hook_z", "mlp.hook_post", "attn.hook_k"])
def test_keys_that_are_not_in_the_stream_have_no_identity(tmp_path: Path, gpt2: ql.Model, place: str) -> None:
    width = gpt2.blocks[1].mlp.width if "post" in place else D_MODEL
    dictionary = loaded(tmp_path, width, hook_name=f"blocks.1.{place}")
    with pytest.raises(ValueError, match=f"{place}.*not a point of the residual stream"):
        ql.signatures(dictionary, gpt2, preset="logit_lens_key", k=2)


@pytest.mark.parametrize(("place", "weight"), [("attn.hook_z", "W_O"), ("mlp.hook_post", "W_out")])
@pytest.mark.parametrize("preset", ["logit_lens_value", "query_lens_value"])
def test_values_before_an_output_weight_are_carried_by_it(
    tmp_path: Path, gpt2: ql.Model, sample: ql.Tokens, place: str, weight: str, preset: str
) -> None:
    """What W_O (W_out) v is read as at resid_mid (resid_post) is what v is read as at hook_z (hook_post)."""
    part = gpt2.blocks[1].attention if weight == "W_O" else gpt2.blocks[1].mlp
    matrix = getattr(part, weight)
    dictionary = loaded(tmp_path, matrix.shape[1], hook_name=f"blocks.1.{place}")
    values = vectors(matrix.shape[1])["W_dec"].double() @ matrix.mT
    same = ql.directions(values, layer=1, point="resid_mid" if weight == "W_O" else "resid_post")
    options = {"preset": preset, "k": 5, "tokens": sample if "query" in preset else None}
    found, expected = (ql.signatures(d, gpt2, **options) for d in (dictionary, same))
    assert torch.equal(found.top_ids, expected.top_ids)
    assert torch.allclose(found.top_scores, expected.top_scores)
    assert dictionary.value_point is None and dictionary.d_model == matrix.shape[1], "the caller's object is unchanged"
    with pytest.raises(ValueError, match=r"goes there through W_\w+: pass dictionary.on\(model\)"):
        ql.neighbours(dictionary, k=2)
    close, expected = (ql.neighbours(d, k=2).table() for d in (dictionary.on(gpt2), same))
    assert close["target_id"] == expected["target_id"]
    assert site(dictionary) == ("attention" if weight == "W_O" else "mlp")


def test_values_before_a_post_norm_are_refused(tmp_path: Path, sample: ql.Tokens) -> None:
    model = ql.load_model(save_tiny_model("gemma2", tmp_path / "model"))
    dictionary = loaded(tmp_path, model.blocks[1].attention.W_O.shape[1], hook_name="blocks.1.attn.hook_z")
    for preset in ("logit_lens_value", "query_lens_value"):
        with pytest.raises(ValueError, match="which .* norms before it adds it to the residual stream"):
            ql.signatures(dictionary, model, preset=preset, tokens=sample if "query" in preset else None, k=2)


@pytest.fixture(scope="module")
def hooked():
    model = hooked_model(golden("gpt2-standard-sae"))
    model.set_use_hook_mlp_in(True)
    return model


PLACES = [
    ("1.hook_resid_pre", ""),
    ("1.hook_resid_mid", ""),
    ("1.hook_attn_out", ""),
    ("1.attn.hook_z", ""),
    ("1.hook_mlp_in", ""),
    ("1.ln2.hook_normalized", ""),
    ("1.mlp.hook_post", ""),
    ("1.hook_mlp_out", ""),
    ("1.ln2.hook_normalized", "1.hook_mlp_out"),
    ("1.ln1.hook_normalized", "1.hook_attn_out"),
    ("0.ln2.hook_normalized", "2.hook_mlp_out"),
    ("0.hook_resid_post", "1.hook_resid_post"),
]


@pytest.mark.parametrize(("read", "write"), PLACES)
@pytest.mark.parametrize(("preset", "value", "sign"), [("token_change", 10.0, 1), ("zero_out", 0.0, -1)])
def test_ablations_at_every_site_are_the_hooked_models(
    hooked: Any, read: str, write: str, preset: str, value: float, sign: int
) -> None:
    """The mean change of logits with the dictionary spliced into the hooked model at the very hooks it names."""
    case = golden("gpt2-standard-sae")
    ids = ql.load_tokens(case.tokens_path).ids
    read, write = f"blocks.{read}", f"blocks.{write or read}"
    width = hooked.cfg.d_mlp if "hook_post" in read else hooked.cfg.d_model
    torch.manual_seed(1)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=read, hook_name_out=write if write != read else None)
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=width, d_sae=N, metadata=metadata)).double()
    sae.dtype = torch.float64
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4)

    def logits(feature: int | None) -> Tensor:
        kept: dict[str, Tensor] = {}

        def reading(x: Tensor, hook: Any) -> None:
            kept["acts"] = sae.encode(x.reshape(*ids.shape, -1))
            if feature is not None:
                kept["acts"][..., feature] = value

        def writing(y: Tensor, hook: Any) -> Tensor:
            return sae.decode(kept["acts"]).reshape(y.shape)

        with torch.no_grad():
            return hooked.run_with_hooks(ids, fwd_hooks=[(read, reading), (write, writing)])

    expected = sign * (logits(3) - logits(None)).mean((0, 1))
    plain = ql.load_model(case.model_path, dtype="float64")
    found = ql.scores_at(sae, plain, [3], torch.arange(len(expected)), preset=preset, tokens=ids)
    assert_close(found[0], expected, f"{preset} at {read}")


BESIDE = {  # what a hook reads in a layer of GPT-NeoX with attention and MLP side by side, and where it is written
    "hook_attn_out": ("attention", ""),
    "hook_mlp_out": ("mlp", ""),
    "attn.hook_z": ("attention.dense", "input"),
    "mlp.hook_post": ("mlp.dense_4h_to_h", "input"),
    "mlp.hook_in": ("mlp", "input"),
    "hook_resid_pre": ("", "input"),
}


@pytest.mark.parametrize("place", BESIDE)
def test_ablations_in_layers_with_attention_and_mlp_side_by_side(place: str) -> None:
    source = tiny("gpt_neox_parallel")
    path, where = BESIDE[place]
    module = source.gpt_neox.layers[0].get_submodule(path)
    width = source.config.intermediate_size if "post" in place else source.config.hidden_size
    torch.manual_seed(1)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=f"blocks.0.{place}")
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=width, d_sae=N, metadata=metadata)).double()
    sae.dtype = torch.float64
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4)
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))

    def logits(feature: int | None) -> Tensor:
        def changed(x: Tensor) -> Tensor:
            acts = sae.encode(x)
            if feature is not None:
                acts[..., feature] = 10.0
            return sae.decode(acts)

        def after(_module: object, _args: object, out: Any) -> Any:
            return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)

        if where:
            hook = module.register_forward_pre_hook(lambda _m, args: (changed(args[0]), *args[1:]))
        else:
            hook = module.register_forward_hook(after)
        with torch.no_grad():
            found = source(ids, use_cache=False).logits
        hook.remove()
        return found

    expected = (logits(3) - logits(None)).mean((0, 1))
    found = ql.scores_at(sae, ql.as_model(source), [3], torch.arange(len(expected)), preset="token_change", tokens=ids)
    assert_close(found[0], expected, f"token_change at {place}")


def test_points_of_layers_with_attention_and_mlp_side_by_side(tmp_path: Path) -> None:
    for name in ("gpt_neox_parallel", "gptj"):
        model = ql.as_model(tiny(name))
        ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
        transport = ql.fit_transport(model, ids, progress=False)
        for place, value, key in (("hook_attn_out", 2, None), ("mlp.hook_in", None, 0), ("hook_mlp_out", 2, None)):
            found = loaded(tmp_path, model.d_model, hook_name=f"blocks.0.{place}").on(model)
            assert (found.value_point, found.key_point) == (value, key)
        between = loaded(tmp_path, model.d_model, hook_name="blocks.0.hook_resid_mid")
        for preset in ("query_lens_value", "query_lens_key"):
            with pytest.raises(ValueError, match="no matrix for resid_mid of layer 0|linearised by whole layers"):
                ql.signatures(between, model, preset=preset, transport=transport, k=2)
    gptj = ql.as_model(tiny("gptj"))
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=gptj.d_model, d_sae=N, apply_b_dec_to_input=False))
    for place in ("hook_attn_out", "hook_mlp_out", "hook_resid_mid", "attn.hook_z"):
        sae.cfg.metadata.hook_name = f"blocks.0.{place}"
        with pytest.raises(ValueError, match=f"{place}' is inside a layer, but model .* layers that are one unit"):
            ql.signatures(sae, gptj, preset="token_change", tokens=torch.full((1, 4), 5), k=2)
