"""What the parts of a decoder layer are, found by running it: attention and MLP apart, and their output matrices.

A layer is split by silencing: with the MLP's output set to zero it adds its attention, with the attention's output set
to zero its MLP. Whether it is their sum, one after the other or side by side, is checked on a few tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from querylens_fast.models.blocks import Masking
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.own_layers import (
    ATTENTION_NAMES,
    MLP_NAMES,
    OwnLayers,
    child,
    first_tensor,
    probe_ids,
    removing,
    routers,
    share,
)

logger = logging.getLogger(__name__)

SPLIT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative to what the layer adds; 0.05 in half precision."""


class Split(NamedTuple):
    """A layer in two versions, each with one module silent; and whether the modules' outputs are added as they are."""

    no_mlp: nn.Module
    no_attention: nn.Module
    order: str
    """sequential or parallel."""
    attention_adds: bool
    mlp_adds: bool


@torch.no_grad()
def split_layer(own: OwnLayers, index: int) -> Split | None:
    """The two versions of a layer, or None where it is not the sum of an attention and an MLP."""
    layer = own.layers[index]
    attention, mlp = child(layer, ATTENTION_NAMES), child(layer, MLP_NAMES)
    if attention is None or mlp is None:
        return None
    ids = probe_ids(own.vocab_size, own.device)
    masking = Masking(None, (ids.shape[0], ids.shape[1]), own.device, ids)
    x = own.passes(masking).streams[index]
    width = x.shape[-1]
    try:
        silenced = _silencer(own, index, x, masking, width, (attention, mlp))
        no_mlp, no_attention = silenced(mlp), silenced(attention)
        post, mid = own.call(index, layer, x, masking), own.call(index, no_mlp, x, masking)
        chained, beside = own.call(index, no_attention, mid, masking), own.call(index, no_attention, x, masking)
        tolerance = SPLIT_TOLERANCE.get(x.dtype, 0.05)
        added = float((post - x).norm()) * tolerance
        errors = {
            "sequential": float((chained - post).norm()),
            "parallel": float((mid + beside - x - post).norm()),
        }
        order = min(errors, key=errors.__getitem__)
        if not errors[order] <= added:
            return None
        if own.token_dependent:  # the MLP's Jacobian is taken without tokens: it may not read them
            without_tokens = own.call(index, no_attention, mid, own.any_tokens(masking.shape))
            if not float((without_tokens - chained).norm()) <= added:
                return None
        adds = [_adds_directly(own, index, x, masking, silenced(attention, mlp), name) for name in (attention, mlp)]
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
        logger.debug("%s: layer %d cannot be split (%s)", own.name, index, error)
        return None
    return Split(no_mlp, no_attention, order, *adds)


def _adds_directly(own: OwnLayers, index: int, x: Tensor, masking: Masking, silent: nn.Module, name: str) -> bool:
    """Whether what the module ``name`` gives reaches the stream unchanged: no norm and no factor behind it."""
    stub: _Silence = vars(getattr(silent, name))["forward"]
    before = own.call(index, silent, x, masking)
    stub.value = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1)).to(x) * x.std()
    change = own.call(index, silent, x, masking) - before
    expected = stub.value.expand_as(change)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(x.dtype, 0.03)
    return float((change - expected).norm() / expected.norm()) <= tolerance


class _Silence:
    """Stands for a module's forward: gives zeros [..., d_model] (or ``value`` everywhere), without computing."""

    def __init__(self, width: int, several: int) -> None:
        self.width, self.several = width, several
        self.value: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        zeros = x.new_zeros(*x.shape[:-1], self.width)
        out = zeros if self.value is None else zeros + self.value
        return (out, *[None] * (self.several - 1)) if self.several else out


def _silencer(
    own: OwnLayers, index: int, x: Tensor, masking: Masking, width: int, names: tuple[str, ...]
) -> Callable[..., nn.Module]:
    """names → a copy of the layer, on the same weights, in which the modules of those names give zero."""
    layer, returned = own.layers[index], {}
    with ExitStack() as hooks:
        for name in names:
            hook = getattr(layer, name).register_forward_hook(
                lambda _m, _a, out, name=name: returned.update({name: out})
            )
            hooks.callback(hook.remove)
        own.call(index, layer, x, masking)

    def silenced(*chosen: str) -> nn.Module:
        copied = share(layer)
        for name in chosen:
            out = returned[name]
            getattr(copied, name).forward = _Silence(width, len(out) if isinstance(out, tuple | list) else 0)
        return copied

    return silenced


@torch.no_grad()
def output_matrix(own: OwnLayers, index: int, module: int) -> str:
    """The path, in layer ``index``, of the linear layer whose output is that of the attention (``module`` even) or MLP.

    Raises:
        UnsupportedModelError: There is none: the module is not recognised, or mixes several (experts).
    """
    layer, names = own.layers[index], MLP_NAMES if module % 2 else ATTENTION_NAMES
    path = child(layer, names)
    kind = "MLP" if module % 2 else "attention"
    if path is None:
        raise UnsupportedModelError(f"layer {index} of {own.name!r} has no {kind} that is recognised")
    outs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, part in layer.get_submodule(path).named_modules(prefix=path):
            if name == path or getattr(getattr(part, "weight", None), "ndim", 0) == 2:
                record = lambda _m, _a, out, name=name: outs.update({name: first_tensor(out)})  # noqa: E731
                hooks.enter_context(removing(part.register_forward_hook(record)))
        masking = own.any_tokens((2, 6))
        own.call(index, layer, own.passes(masking).streams[index], masking)
    whole = outs.get(path)
    same = [n for n, out in outs.items() if whole is not None and out.numel() == whole.numel()
            and torch.equal(out.flatten(), whole.flatten()) and (n != path or len(outs) == 1)]  # fmt: skip
    if len(same) != 1 or any(True for _ in routers(layer.get_submodule(path))):
        raise UnsupportedModelError(
            f"the {kind} {path!r} of layer {index} of {own.name!r} does not end in one linear layer, whose input would "
            "be known"
        )
    return same[0]
