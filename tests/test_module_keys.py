"""Keys that read a module's output, or what its output matrix reads: the gradient by transformers' own autograd."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import querylens_fast as ql
from bench.family_cases import tiny
from querylens_fast.models.inside import output_weight

LAYER, N = 1, 4
Z, POST = "attn.hook_z", "mlp.hook_post"
OUTPUTS = {
    "gpt2": {"hook_attn_out": "attn", "hook_mlp_out": "mlp"},
    "gemma2": {"ln1_post.hook_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"},
}
INSIDE = {
    "gpt2": {Z: "attn.c_proj", POST: "mlp.c_proj"},
    "llama": {Z: "self_attn.o_proj"},
    "gemma2": {Z: "self_attn.o_proj", POST: "mlp.down_proj"},
    "gpt_neox_parallel": {Z: "attention.dense", POST: "mlp.dense_4h_to_h"},
    "opt": {Z: "self_attn.out_proj", POST: "fc2"},
    "phi": {Z: "self_attn.dense"},
}
"""Of each model's layer, the module that gives what a key reads; of those in INSIDE, the one that reads it."""
CASES = [(name, hook, "auto") for models in (OUTPUTS, INSIDE) for name, hooks in models.items() for hook in hooks]
CASES += [("gpt2", hook, "autodiff") for hook in INSIDE["gpt2"]] + [("gpt_neox_parallel", Z, "autodiff")]


@cache
def model_of(name: str, way: str = "auto") -> ql.Model:
    return ql.as_model(tiny(name), linearisation=way)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def padded() -> ql.Tokens:
    ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 4:] = False
    return ql.Tokens(ids, valid)


def dictionary(folder: Path, hook: str, width: int) -> ql.Dictionary:
    vectors = torch.randn(width, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    save_file({"W_enc": vectors}, str(folder / "d.safetensors"))
    return ql.load_dictionary(folder / "d.safetensors", hook_name=f"blocks.{LAYER}.{hook}")


def brute_force(
    model: ql.Model, module: str, tokens: ql.Tokens, key: Tensor, start: int = 0, inside: bool = False, into: str = ""
) -> Tensor:
    """Mean over valid positions of the gradient, before layer ``start``, of a module's output (or input) along the key.

    With ``into``, before the module of that name in that layer.
    """
    source = model.source
    layers: nn.ModuleList = next(m for m in source.modules() if isinstance(m, nn.ModuleList))
    found: dict[str, Tensor] = {}

    def before(_module: object, args: tuple, kwargs: dict) -> tuple:
        x = args[0] if args else kwargs["hidden_states"]
        found["start"] = torch.zeros_like(x).requires_grad_()
        x = x + found["start"]
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def after(_module: object, args: tuple, out: object) -> None:
        read = args[0] if inside else out[0] if isinstance(out, tuple) else out
        found["out"] = read.reshape(*tokens.ids.shape, -1)  # type: ignore[union-attr]

    hooks = [
        layers[start].get_submodule(into).register_forward_pre_hook(before, with_kwargs=True),
        layers[LAYER].get_submodule(module).register_forward_hook(after),
    ]
    weight = tokens.valid_mask[..., None].double()
    with torch.enable_grad():
        source(tokens.ids, attention_mask=tokens.valid_mask.long(), use_cache=False)
        (gradient,) = torch.autograd.grad(found["out"], found["start"], key * weight)
    for hook in hooks:
        hook.remove()
    return (gradient * weight).sum((0, 1)) / weight.sum()


@pytest.mark.parametrize(("name", "hook", "way"), CASES)
def test_keys_go_through_the_module_they_read(
    padded: ql.Tokens, name: str, hook: str, way: str, tmp_path: Path
) -> None:
    model, inside = model_of(name, way), hook in (Z, POST)
    at = 2 * LAYER + (hook == POST)
    given = dictionary(tmp_path, hook, output_weight(model, at).shape[1] if inside else model.d_model)
    module, keys = (INSIDE if inside else OUTPUTS)[name][hook], given.keys(slice(None))
    expected = torch.stack([brute_force(model, module, padded, k, inside=inside) for k in keys])
    reads = [given.hook_name] if inside else []
    fitted = ql.fit_transport(model, padded, sides=("key",), orders=("full",), groups=2, inside=reads, progress=False)
    options = {"preset": "query_lens_key", "k": 5, "vectors": True}
    for source in ({"transport": fitted}, {"tokens": padded}):
        found = ql.signatures(given, model, **options, **source)
        assert (found.vectors - expected).norm() < 1e-6 * expected.norm()
    by_groups = ql.signatures(given, model, **options, transport=fitted)
    assert by_groups.top_se is not None and bool((by_groups.top_se > 0).all())


@pytest.mark.parametrize(("name", "hook", "way"), [("gpt2", "hook_mlp_out", "auto"), ("gemma2", Z, "auto"),
    ("gpt2", POST, "auto"), ("opt", Z, "auto")])  # fmt: skip
def test_the_first_order_is_the_modules_own_term(
    padded: ql.Tokens, name: str, hook: str, way: str, tmp_path: Path
) -> None:
    model, inside, whole = (
        model_of(name, way),
        hook in (Z, POST),
        ql.Tokens(padded.ids, torch.ones_like(padded.valid_mask)),
    )
    module = 2 * LAYER + ("mlp" in hook)
    given = dictionary(tmp_path, hook, output_weight(model, module).shape[1] if inside else model.d_model)
    path = (INSIDE if inside else OUTPUTS)[name][hook]
    # The MLP's input is the stream between the modules, where the gradient has come through no attention yet.
    start = {"gpt2": "ln_2"}.get(name, "") if "mlp" in hook else ""
    expected = [brute_force(model, path, whole, k, LAYER, inside, start) for k in given.keys(slice(None))]
    found = ql.signatures(given, model, preset="query_lens_key_approx", tokens=whole, k=3, vectors=True, layers=True)
    assert (found.vectors - torch.stack(expected)).norm() < 1e-6 * found.vectors.norm()
    assert [term.layer for term in found.layer_terms] == [LAYER]


def test_transports_without_the_inside_are_refused_and_files_keep_it(padded: ql.Tokens, tmp_path: Path) -> None:
    model = model_of("gpt2")
    given = dictionary(tmp_path, Z, model.d_model)
    whole = ql.fit_transport(
        model, padded, groups=2, inside=["blocks.*.attn.hook_z", "transformer.h.0.mlp.c_proj.input"], progress=False
    )
    path = whole.save(tmp_path / "t.safetensors")
    options = {"preset": "query_lens_key", "k": 5}
    ours, again = (ql.signatures(given, model, transport=t, **options) for t in (whole, path))
    assert torch.equal(ours.top_scores, again.top_scores) and torch.equal(ours.top_se, again.top_se)
    assert whole.group(1).inside["full", 2].shape == (1, model.d_model, model.d_model)
    bare = ql.fit_transport(model, padded, progress=False)
    with pytest.raises(ValueError, match=r"cannot carry keys that read blocks.1.attn.hook_z: fit it with inside=\["):
        ql.signatures(given, model, transport=bare, **options)
    for wrong in ("blocks.1.hook_resid_post", "blocks.9.attn.hook_z", "blocks.1.mlp.hook_pre"):
        with pytest.raises(ValueError, match=f"inside names '{wrong}'"):
            ql.fit_transport(model, padded, inside=[wrong], progress=False)
    for wrong in ({"sides": ("value",)}, {"submodule": "mlp"}):
        with pytest.raises(ValueError, match="inside= is for keys"):
            ql.fit_transport(model, padded, inside=[given.hook_name], progress=False, **wrong)


def test_what_is_refused_of_such_keys(padded: ql.Tokens, tmp_path: Path) -> None:
    for hook, name in ((Z, "gpt2"), ("hook_attn_out", "gpt2")):
        given = dictionary(tmp_path, hook, model_of(name).d_model)
        for stats in ("exact", "rel_var"):
            with pytest.raises(ValueError, match="without relative variances; stats="):
                ql.signatures(given, model_of(name), preset="query_lens_key", k=2, tokens=padded, stats=stats)
    behind = dictionary(tmp_path, "attn.hook_out", model_of("gemma2").d_model)  # in front of Gemma's norm
    with pytest.raises(ValueError, match="norms before it adds it"):
        ql.signatures(behind, model_of("gemma2"), preset="query_lens_key", k=2, tokens=padded)
    with pytest.raises(ValueError, match="inside a module, which is not a point of the residual stream"):
        ql.signatures(dictionary(tmp_path, Z, 24), model_of("gpt2"), preset="logit_lens_key", k=2)
    with pytest.raises(ValueError, match="5 numbers wide, but .* has [0-9]+ there"):
        ql.signatures(dictionary(tmp_path, Z, 5), model_of("gpt2"), preset="query_lens_key", k=2, tokens=padded)
    experts = dictionary(tmp_path, POST, 24)
    with pytest.raises(ValueError, match="does not end in one linear layer"):
        ql.signatures(experts, model_of("mixtral"), preset="query_lens_key", k=2, tokens=padded)
