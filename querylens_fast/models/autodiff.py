"""Autodiff: any transformers decoder's own layers, differentiated as they are, where no linearisation is written here.

Chosen by ``load_model(..., linearisation="autodiff")``, never by itself. A layer is called with exactly the arguments
that its model passes it (masks, rotary angles, position ids), recorded from a forward pass. It is split by silencing:
with the MLP's output set to zero the layer adds its attention, with the attention's output set to zero its MLP. That is
the layer again when it is sequential (``mid = pre + A(pre)``, ``post = mid + M(mid)``); for others, such as layers with
attention and MLP side by side, the check of the logits refuses the model. The routing of a mixture of experts is held
fixed, as in `experts`: what its router gives counts as constant.

Cost: a backward pass through the module for each cotangent and a forward-mode pass for each tangent, batched by
`torch.func.vmap` (module code that it cannot batch raises its error). `bench lens --linearisation autodiff` measures it
against the hand-written linearisations of `blocks`, which are its test, and it theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from querylens_fast.models.blocks import Block, Masking
from querylens_fast.models.model import Model, UnsupportedModelError
from querylens_fast.models.moe import NoSingleWeights

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
ROUTER_NAMES = ("gate", "router")
LAYER_NAMES = ("layers", "h", "blocks")


class Arguments(NamedTuple):
    """What a model passes one of its layers beside the hidden states, and the queries that see any key there."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    sees: Tensor | None
    """[B or 1, S, 1] bool; None: all of them."""


class Decoder:
    """A transformers causal LM's decoder layers, with the arguments its forward pass gives them."""

    def __init__(self, source: Any, decoder: Any, name: str) -> None:
        self.source, self.name = source, name
        self.layers = list(_child(decoder, LAYER_NAMES, name))
        self.attentions = [_child(layer, ATTENTION_NAMES, name) for layer in self.layers]
        self.mlps = [_child(layer, MLP_NAMES, name) for layer in self.layers]
        self.routers = [_child(mlp, ROUTER_NAMES, name) if hasattr(mlp, "experts") else None for mlp in self.mlps]
        self._kept = lru_cache(maxsize=4)(self._recorded)

    def arguments(self, layer: int, masking: Masking) -> Arguments:
        """Those of one layer for tokens that attend as masking says."""
        valid = None if masking.valid is None else tuple(map(tuple, masking.valid.tolist()))
        return self._kept(masking.shape, valid)[layer]

    @torch.no_grad()
    def _recorded(self, shape: tuple[int, int], valid: tuple[tuple[bool, ...], ...] | None) -> list[Arguments]:
        """A forward pass on token 0 everywhere: masks and angles depend on the padding alone."""
        device = next(self.source.parameters()).device
        kept: list[Arguments] = []

        def record(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(_repaired(args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        given: dict[str, Tensor] = {}
        if valid is not None:
            mask = torch.tensor(valid, device=device)
            given = {"attention_mask": mask.long(), "position_ids": Masking(mask, shape, device).positions()}
        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            self.source(input_ids=torch.zeros(shape, dtype=torch.int64, device=device), use_cache=False, **given)
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    def contribution(self, layer: int, silent: Any, masking: Masking) -> Callable[[Tensor], Tensor]:
        """x [B, S, D] → what the layer adds to it with the module ``silent`` giving zero."""
        given = self.arguments(layer, masking)

        def run(x: Tensor) -> Tensor:
            with _hooked(silent, torch.zeros_like), _hooked(self.routers[layer], torch.detach):
                out = self.layers[layer](x, *given.positional, **given.named)
            added = (out[0] if isinstance(out, tuple) else out) - x
            return added if given.sees is None else added * given.sees.to(x.dtype)

        return run


def _repaired(positional: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
    """The arguments with a query that sees no key seeing all (for a finite softmax), and marked to give zero."""
    sees = None

    def repair(value: Any) -> Any:
        nonlocal sees
        if not isinstance(value, Tensor) or value.ndim != 4:
            return value
        visible = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
        blind = ~visible.any(-1, keepdim=True)
        if not bool(blind.any()):
            return value
        sees = ~blind[:, 0]
        return value | blind if value.dtype == torch.bool else value.masked_fill(blind, 0.0)

    positional = tuple(map(repair, positional))
    named = {name: repair(value) for name, value in named.items()}
    return Arguments(positional, named, sees)


def _child(module: Any, names: tuple[str, ...], model: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise UnsupportedModelError(
        f"model {model!r}: {type(module).__name__} has none of {', '.join(names)}, so its layers cannot be split"
    )


@contextmanager
def _hooked(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, every tensor that the module (None: nothing) gives goes through ``change``."""
    if module is None:
        yield
        return

    def on_output(_module: Any, _args: Any, out: Any) -> Any:
        if not isinstance(out, tuple):
            return change(out)
        return tuple(change(o) if isinstance(o, Tensor) else o for o in out)

    hook = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Part(NoSingleWeights):
    """Attention or MLP of one layer of a decoder."""

    decoder: Decoder
    layer: int
    width: int
    n_heads: int
    name: str

    def matrices(self) -> list[Tensor]:
        """The weights that tell one model from another."""
        weights = [w.detach() for w in self.own.parameters()]
        return [w.flatten(0, -2) if w.ndim > 1 else w[None] for w in weights]

    @property
    def own(self) -> Any:
        raise NotImplementedError

    def _linearised(self, run: Callable[[Tensor], Tensor], x: Tensor, through_norms: bool) -> LinearByAutodiff:
        if not through_norms:
            raise UnsupportedModelError(f"{self.name} cannot leave out its norms: it is differentiated as a whole")
        output, pull, *_ = torch.func.vjp(run, x)
        return LinearByAutodiff(output.detach(), run, x, lambda g: pull(g)[0])


@dataclass(frozen=True)
class AutodiffAttention(_Part):
    """The attention of one layer, its norms included."""

    @property
    def own(self) -> Any:
        return self.decoder.attentions[self.layer]

    def __call__(self, x: Tensor, masking: Masking) -> Tensor:
        """The residual contribution A(x) of x [B, S, D]."""
        return self._run(masking)(x)

    def linearise(self, x: Tensor, masking: Masking, through_norms: bool = True) -> LinearByAutodiff:
        """A and its Jacobian at x [B, S, D]."""
        return self._linearised(self._run(masking), x, through_norms)

    def _run(self, masking: Masking) -> Callable[[Tensor], Tensor]:
        return self.decoder.contribution(self.layer, self.decoder.mlps[self.layer], masking)


@dataclass(frozen=True)
class AutodiffMLP(_Part):
    """The MLP of one layer, its norms included."""

    @property
    def own(self) -> Any:
        return self.decoder.mlps[self.layer]

    @property
    def routed(self) -> bool:
        return self.decoder.routers[self.layer] is not None

    def __call__(self, x: Tensor) -> Tensor:
        """The residual contribution M(x) of x [B, S, D]."""
        return self._run(x)(x)

    def linearise(self, x: Tensor, through_norms: bool = True) -> LinearByAutodiff:
        """M and its Jacobian at x [B, S, D]."""
        return self._linearised(self._run(x), x, through_norms)

    def _run(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        plain = Masking(None, (x.shape[0], x.shape[1]), x.device)
        return self.decoder.contribution(self.layer, self.decoder.attentions[self.layer], plain)


@dataclass(frozen=True)
class LinearByAutodiff:
    """A module's Jacobian at one batch, by forward- and reverse-mode passes through the module."""

    output: Tensor
    run: Callable[[Tensor], Tensor]
    x: Tensor
    pull: Callable[[Tensor], Tensor]

    def jvp(self, t: Tensor) -> Tensor:
        """J t for t [C, B, S, D]."""
        return torch.func.vmap(lambda one: torch.func.jvp(self.run, (self.x,), (one,))[1])(t)

    def vjp(self, g: Tensor) -> Tensor:
        """Jᵀ g for g [C, B, S, D]."""
        return torch.func.vmap(self.pull)(g)


def from_autodiff(frame: Model, decoder: Any) -> Model:
    """``frame`` (embedding, final norm, unembedding) with blocks that differentiate the decoder's own layers."""
    config = frame.source.config.get_text_config()
    source = Decoder(frame.source, decoder, frame.name)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or frame.d_model // heads)
    neurons = getattr(config, "intermediate_size", None) or 4 * frame.d_model
    blocks = [
        Block(
            AutodiffAttention(source, layer, width, heads, f"attention {layer} of {frame.name!r}, by autodiff,"),
            AutodiffMLP(source, layer, neurons, heads, f"MLP {layer} of {frame.name!r}, by autodiff,"),
        )
        for layer in range(len(source.layers))
    ]
    return replace(frame, blocks=blocks, linearisation="autodiff")
