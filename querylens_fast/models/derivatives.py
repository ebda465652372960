"""Derivatives of linear layers and activations for autodiff, the same numbers as autograd's, at less cost.

Layers are differentiated at one batch of residuals, for many directions. So an activation's slope can be kept as
numbers (autograd goes through every one of its operations for every direction; GPT-2's tanh-GELU has ten), and products
with weights can go to the faster library, all directions of a vmap as one product. Together they halve the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from querylens_fast.models.blocks import Activation, with_slope
from querylens_fast.topk.products import linear


def make_cheaper(layer: nn.Module) -> None:
    """Change the linear layers and activations of a layer (a copy that may be changed) in place."""
    from transformers.activations import ACT2CLS
    from transformers.pytorch_utils import Conv1D

    activations = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
    for module in layer.modules():
        if type(module) in (nn.Linear, Conv1D):
            vars(module)["forward"] = _linear(module, module.forward)
        elif type(module) in activations and not any(True for _ in module.parameters()):
            vars(module)["forward"] = _activation(module.forward)


def _linear(module: nn.Module, forward: Activation) -> Activation:
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator]
    W, bias = weight if isinstance(module, nn.Linear) else weight.mT, module.bias

    def cheaper(x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return forward(x)
        out: Tensor = _Product.apply(x, W)  # type: ignore[assignment]
        return out if bias is None else out + bias  # type: ignore[operator]

    return cheaper


def _activation(forward: Activation) -> Activation:
    def cheaper(x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return forward(x)
        return _Diagonal.apply(x, forward)  # type: ignore[return-value]

    return cheaper


class _Diagonal(torch.autograd.Function):
    """activation(x), elementwise, with its slope at x kept as numbers: it has no second derivative in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        value, slope = with_slope(activation, x)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


class _Product(torch.autograd.Function):
    """x Wᵀ for x [..., d] and a constant W [n, d]."""

    @staticmethod
    def forward(x: Tensor, W: Tensor) -> Tensor:
        return linear(x, W)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.W = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(grads[0], ctx.W.mT), None  # type: ignore[return-value]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, W: Tensor) -> tuple[Tensor, int]:
        return _Product.apply(x.movedim(in_dims[0], 0), W), 0  # type: ignore[return-value]
