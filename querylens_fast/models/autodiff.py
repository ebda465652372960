"""Jacobians by autodiff through a transformers decoder's own layers, for any architecture.

A layer is called with exactly the arguments that its model passes it (`own_layers`). Where its attention and its MLP
are recognised it is split by silencing: with the MLP's output set to zero the layer adds its attention, with the
attention's output set to zero its MLP. That is checked at load: the layer has to be sequential (``mid = pre + A(pre)``,
``post = mid + M(mid)``). All other layers are differentiated whole: module 2l is then the layer, module 2l + 1 nothing,
and `Model.has_submodules` is False. The routing of a mixture of experts is held fixed, as in `moe`.

Cost: one backward pass through the layer for each cotangent, batched by vmap. Tangents go through the backward pass of
the backward pass, which is linear in its argument, so neither direction computes the layer again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from querylens_fast.models.blocks import Block, Masking
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.models.moe import NoSingleWeights
from querylens_fast.models.own_layers import (
    ATTENTION_NAMES,
    MLP_NAMES,
    OwnLayers,
    child,
    probe_ids,
    routers,
    share,
)
from querylens_fast.models.units import Nothing

logger = logging.getLogger(__name__)

SPLIT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative to what the layer adds; 0.05 in half precision."""


def from_autodiff(frame: Model, own: OwnLayers) -> Model:
    """``frame`` (embedding, final norm, unembedding) with blocks that differentiate the model's own layers."""
    for layer in own.layers:
        for router in routers(layer):
            router.register_forward_hook(lambda _module, _args, out: _detached(out))
    splits = [_split_layer(own, i) for i in range(len(own))]
    sequential = all(s is not None and s.order == "sequential" for s in splits)
    parallel = all(s is not None and s.order == "parallel" for s in splits)
    blocks = []
    for i, (layer, split) in enumerate(zip(own.layers, splits, strict=True)):
        direct = (split.attention_adds, split.mlp_adds) if split is not None else (False, False)
        if sequential and split is not None:
            attention = AutodiffPart(own, i, split.no_mlp, f"attention {i} of {frame.name!r}, by autodiff,", direct[0])
            part = AutodiffPart(own, i, split.no_attention, f"MLP {i} of {frame.name!r}, by autodiff,", direct[1])
            mlp: Any = AutodiffMLP(part)
        else:
            attention = AutodiffPart(own, i, layer, f"layer {i} of {frame.name!r}, by autodiff as a whole,", direct[0])
            mlp = Nothing(f"layer {i} of {frame.name!r}, by autodiff as a whole,", adds_directly=direct[1])
        blocks.append(Block(attention, mlp))
    return replace(
        frame, blocks=blocks, linearisation="autodiff", own=own, has_submodules=sequential, parallel=parallel
    )


class Split(NamedTuple):
    """A layer in two versions, each with one module silent; and whether the modules' outputs are added as they are."""

    no_mlp: nn.Module
    no_attention: nn.Module
    order: str
    """sequential or parallel."""
    attention_adds: bool
    mlp_adds: bool


@torch.no_grad()
def _split_layer(own: OwnLayers, index: int) -> Split | None:
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


def _detached(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.detach()
    if isinstance(out, tuple | list):
        return type(out)(map(_detached, out)) if type(out) in (tuple, list) else out
    return out


@dataclass(frozen=True)
class AutodiffPart(NoSingleWeights):
    """A layer's attention, its MLP (norms included) or the whole layer, as what it adds to the residual stream."""

    own: OwnLayers
    layer: int
    module: nn.Module
    name: str
    adds_directly: bool

    @property
    def routed(self) -> bool:
        """Whether a router chooses experts in here; its choice and weights are held fixed."""
        return any(True for _ in routers(self.module))

    def __call__(self, x: Tensor, masking: Masking) -> Tensor:
        """The residual contribution [B, S, D] of x [B, S, D]."""
        return self.function(masking)(x)

    def linearise(self, x: Tensor, masking: Masking, through_norms: bool = True) -> LinearByAutodiff:
        """The contribution and its Jacobian at x [B, S, D]."""
        if not through_norms:
            raise UnsupportedModelError(f"{self.name} cannot leave out its norms: it is differentiated as a whole")
        return LinearByAutodiff(self.function(masking), x)

    def function(self, masking: Masking) -> Callable[[Tensor], Tensor]:
        """x [B, S, D] → what the part adds to it for tokens that attend as masking says."""
        sees = self.own.passes(masking).arguments[self.layer].sees

        def added(x: Tensor) -> Tensor:
            out = self.own.call(self.layer, self.module, x, masking) - x
            return out if sees is None else out * sees.to(x.dtype)

        return added


@dataclass(frozen=True)
class AutodiffMLP(NoSingleWeights):
    """The MLP of one layer, its norms included; it reads each position by itself, so there is no masking."""

    part: AutodiffPart

    @property
    def name(self) -> str:
        """The part's name."""
        return self.part.name

    @property
    def adds_directly(self) -> bool:
        """Whether what it adds goes into the residual stream without a norm after it."""
        return self.part.adds_directly

    @property
    def routed(self) -> bool:
        """Whether a router chooses experts in here."""
        return self.part.routed

    def __call__(self, x: Tensor) -> Tensor:
        """The residual contribution [B, S, D] of x [B, S, D]."""
        return self.part(x, self._masking(x))

    def linearise(self, x: Tensor, through_norms: bool = True) -> LinearByAutodiff:
        """The contribution and its Jacobian at x [B, S, D]."""
        return self.part.linearise(x, self._masking(x), through_norms)

    def _masking(self, x: Tensor) -> Masking:
        return self.part.own.any_tokens((x.shape[0], x.shape[1]))


class LinearByAutodiff:
    """A module's Jacobian at one batch of residuals, through its autograd graph.

    J t for a tangent t is the derivative, in direction t, of v ↦ Jᵀ v: a backward pass through the backward pass.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.x = x.clone().requires_grad_()
            self._output = run(self.x)
        self.output = self._output.detach()
        self._pullback: tuple[Tensor, Tensor] | None = None
        self._batched = True

    def jvp(self, t: Tensor) -> Tensor:
        """J t for t [C, B, S, D]."""
        if not self._output.requires_grad:
            return torch.zeros_like(t)
        if self._pullback is None:
            with torch.inference_mode(False), torch.enable_grad():
                v = torch.zeros_like(self._output).requires_grad_()
                (pulled,) = torch.autograd.grad(self._output, self.x, v, create_graph=True)
            self._pullback = pulled, v
        return self._through(*self._pullback, t)

    def vjp(self, g: Tensor) -> Tensor:
        """Jᵀ g for g [C, B, S, D]."""
        return self._through(self._output, self.x, g) if self._output.requires_grad else torch.zeros_like(g)

    def _through(self, output: Tensor, at: Tensor, g: Tensor) -> Tensor:
        if self._batched:
            try:
                return torch.autograd.grad(output, at, g, retain_graph=True, is_grads_batched=True)[0]
            except RuntimeError as error:
                if "out of memory" in str(error).lower():
                    raise
                # An operation that vmap cannot batch: one direction after the other.
                self._batched = False
        return torch.stack([torch.autograd.grad(output, at, one, retain_graph=True)[0] for one in g])


def graph_bytes(model: Model, length: int) -> tuple[int, int]:
    """(kept by the graphs of one sequence of ``length`` tokens, moved by one direction), in bytes.

    Measured on one layer of each kind: what autograd saves for the two graphs, and at most half as much again as the
    largest layer's forward graph for a direction on its way back through it.
    """
    masking = Masking(None, (1, length), model.device, torch.zeros(1, length, dtype=torch.int64, device=model.device))
    parts = [getattr(p, "part", p) for b in model.blocks for p in (b.attention, b.mlp) if not isinstance(p, Nothing)]
    measured: dict[Any, tuple[int, int]] = {}
    kept = widest = 0
    for part in parts:
        kind = (
            type(part.module),
            part.module is model.own.layers[part.layer],
            part.name.split()[0],
            _shapes(part.module),
        )
        if kind not in measured:
            measured[kind] = _saved_bytes(part, model.own.passes(masking).streams[part.layer], masking)
        forward, both = measured[kind]
        kept, widest = kept + both, max(widest, forward)
    return kept, widest + widest // 2 + 4 * length * model.d_model * model.W_E.element_size()


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((n, w.shape) for n, w in module.named_parameters())


def _saved_bytes(part: AutodiffPart, x: Tensor, masking: Masking) -> tuple[int, int]:
    """Bytes that autograd saves for the part's graph, and for it and the graph of its pullback."""
    saved: dict[int, int] = {w.untyped_storage().data_ptr(): 0 for w in part.module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear = part.linearise(x, masking)
        forward = sum(saved.values())
        linear.jvp(torch.zeros_like(x)[None])
    return forward, sum(saved.values())
