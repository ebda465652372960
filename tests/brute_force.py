"""Brute force through transformers' own layers; never imports the product."""

from typing import Any

from torch import Tensor


def hidden_to_final(source: Any, layer: int, hidden: Tensor) -> Tensor:
    """The stream before the final norm when layer ``layer`` gives ``hidden`` [B, S, D], every router held fixed."""
    final = {}
    decoder = next(getattr(source, n) for n in ("transformer", "model", "gpt_neox") if hasattr(source, n))
    norm = next(getattr(decoder, n) for n in ("ln_f", "norm", "final_layer_norm") if hasattr(decoder, n))
    blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
    hooks = [
        blocks[layer].register_forward_hook(
            lambda _m, _i, out: (hidden, *out[1:]) if isinstance(out, tuple) else hidden
        ),
        norm.register_forward_pre_hook(lambda _m, args: final.update(x=args[0])),
    ]
    for module in source.modules():
        if "Router" in type(module).__name__:
            hooks.append(module.register_forward_hook(lambda _m, _i, out: tuple(o.detach() for o in out)))
    try:
        source(hidden.new_zeros(hidden.shape[:2]).long(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return final["x"]
