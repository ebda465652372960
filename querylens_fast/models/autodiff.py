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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from querylens_fast.models.blocks import Block, Masking
from querylens_fast.models.derivatives import make_cheaper
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.models.moe import NoSingleWeights
from querylens_fast.models.own_layers import OwnLayers, removing, routers
from querylens_fast.models.splitting import output_matrix, split_layer
from querylens_fast.models.units import Nothing


def from_autodiff(frame: Model, own: OwnLayers) -> Model:
    """``frame`` (embedding, final norm, unembedding) with blocks that differentiate the model's own layers."""
    for layer in own.layers:
        make_cheaper(layer)
        for router in routers(layer):
            router.register_forward_hook(lambda _module, _args, out: _detached(out))
    splits = [split_layer(own, i) for i in range(len(own))]
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
        return LinearByAutodiff(self.function(masking), x, lambda module: self.inside(masking, module))

    def function(self, masking: Masking) -> Callable[[Tensor], Tensor]:
        """x [B, S, D] → what the part adds to it for tokens that attend as masking says."""
        sees = self.own.passes(masking).arguments[self.layer].sees

        def added(x: Tensor) -> Tensor:
            out = self.own.call(self.layer, self.module, x, masking) - x
            return out if sees is None else out * sees.to(x.dtype)

        return added

    def inside(self, masking: Masking, module: int) -> Callable[[Tensor], Tensor]:
        """x [B, S, D] → what the output matrix of the attention (``module`` even) or MLP reads, [B, S, W]."""
        matrix = self.module.get_submodule(output_matrix(self.own, self.layer, module))
        sees = self.own.passes(masking).arguments[self.layer].sees

        def read(x: Tensor) -> Tensor:
            found: list[Tensor] = []
            with removing(matrix.register_forward_pre_hook(lambda _module, args: found.append(args[0]))):
                self.own.call(self.layer, self.module, x, masking)
            out = found[-1].reshape(*x.shape[:2], -1)
            return out if sees is None else out * sees.to(x.dtype)

        return read

    def output_weight(self, module: int) -> Tensor:
        """The weight of that output matrix, [D, W]. Raises UnsupportedModelError where there is no single one."""
        matrix = self.module.get_submodule(output_matrix(self.own, self.layer, module))
        weight: Tensor = matrix.weight.detach()  # type: ignore[union-attr, operator, assignment]
        return weight if isinstance(matrix, nn.Linear) else weight.mT


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

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        reads: Callable[[int], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        """Run ``run`` at x [B, S, D]; ``reads(module)``, for `inside`, leads up to that module's output matrix."""
        self._reads, self._inside = reads, dict[int, LinearByAutodiff]()
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

    def inside(self, t: Tensor, module: int) -> Tensor:
        """The tangent of what the output matrix of the attention (``module`` even) or the MLP reads, [C, B, S, W]."""
        if module not in self._inside:
            assert self._reads is not None
            self._inside[module] = LinearByAutodiff(self._reads(module), self.x.detach())
        return self._inside[module].jvp(t)

    def _through(self, output: Tensor, at: Tensor, g: Tensor) -> Tensor:
        if self._batched:
            try:
                return torch.func.vmap(lambda one: torch.autograd.grad(output, at, one, retain_graph=True)[0])(g)
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
