"""Keys that read what a module adds to the stream: the gradient through the module, by transformers' own autograd."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import D_MODEL, save_tiny_model
from torch import Tensor

import querylens_fast as ql

LAYER, N = 1, 4
MODULES = {
    "gpt2": {"hook_attn_out": "attn", "hook_mlp_out": "mlp"},
    "gemma2": {"ln1_post.hook_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"},
}
CASES = [(name, hook) for name, hooks in MODULES.items() for hook in hooks]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ql.Model]:
    folders = {name: save_tiny_model(name, tmp_path_factory.mktemp(name)) for name in MODULES}
    return {name: ql.load_model(folder, dtype="float64") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def padded() -> ql.Tokens:
    ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 4:] = False
    return ql.Tokens(ids, valid)


def dictionary(folder: Path, hook: str) -> ql.Dictionary:
    vectors = torch.randn(D_MODEL, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    save_file({"W_enc": vectors}, str(folder / "d.safetensors"))
    return ql.load_dictionary(folder / "d.safetensors", hook_name=f"blocks.{LAYER}.{hook}")


def brute_force(model: ql.Model, module: str, tokens: ql.Tokens, key: Tensor) -> Tensor:
    """Mean over valid positions of the gradient, before layer 0, of the module's output along the key at each."""
    decoder = getattr(model.source, "transformer", None) or model.source.model
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    found: dict[str, Tensor] = {}

    def before(_module: object, args: tuple, kwargs: dict) -> tuple:
        x = args[0] if args else kwargs["hidden_states"]
        found["start"] = torch.zeros_like(x).requires_grad_()
        x = x + found["start"]
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def after(_module: object, _args: object, out: object) -> None:
        found["out"] = out[0] if isinstance(out, tuple) else out  # type: ignore[assignment]

    hooks = [
        layers[0].register_forward_pre_hook(before, with_kwargs=True),
        getattr(layers[LAYER], module).register_forward_hook(after),
    ]
    weight = tokens.valid_mask[..., None].double()
    with torch.enable_grad():
        model.source(tokens.ids, attention_mask=tokens.valid_mask.long(), use_cache=False)
        (gradient,) = torch.autograd.grad(found["out"], found["start"], key * weight)
    for hook in hooks:
        hook.remove()
    return (gradient * weight).sum((0, 1)) / weight.sum()


@pytest.mark.parametrize(("name", "hook"), CASES)
def test_keys_go_through_the_module_they_read(
    models: dict[str, ql.Model], padded: ql.Tokens, name: str, hook: str, tmp_path: Path
) -> None:
    model, given = models[name], dictionary(tmp_path, hook)
    expected = torch.stack([brute_force(model, MODULES[name][hook], padded, k) for k in given.keys(slice(None))])
    fitted = ql.fit_transport(model, padded, sides=("key",), orders=("full",), groups=2, progress=False)
    options = {"preset": "query_lens_key", "k": 5, "vectors": True}
    for source in ({"transport": fitted}, {"tokens": padded}):
        found = ql.signatures(given, model, **options, **source)
        assert (found.vectors - expected).norm() < 1e-6 * expected.norm()
    by_groups = ql.signatures(given, model, **options, transport=fitted)
    assert by_groups.top_se is not None and bool((by_groups.top_se > 0).all())


def test_what_is_refused_of_such_keys(models: dict[str, ql.Model], padded: ql.Tokens, tmp_path: Path) -> None:
    given = dictionary(tmp_path, "hook_attn_out")
    for options in ({"preset": "query_lens_key_approx"}, {"preset": "query_lens_key", "stats": "exact"}):
        with pytest.raises(ValueError, match="carried through that module in full order only"):
            ql.signatures(given, models["gpt2"], k=2, tokens=padded, **options)
    behind = dictionary(tmp_path, "attn.hook_out")  # in front of Gemma's norm
    with pytest.raises(ValueError, match="norms before it adds it"):
        ql.signatures(behind, models["gemma2"], preset="query_lens_key", k=2, tokens=padded)
