"""Layers that are one unit: module 2l is the whole layer, module 2l + 1 adds nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from querylens_fast.models.blocks import MLP, Attention, LinearAttention, LinearMLP
from querylens_fast.models.masking import Masking
from querylens_fast.models.moe import NoSingleWeights


@dataclass(frozen=True)
class Beside(NoSingleWeights):
    """Attention and MLP side by side: both read the stream before the layer, and their outputs are added to it."""

    attention: Attention
    mlp: MLP
    name: str = "a layer with attention and MLP side by side"
    routed: ClassVar[bool] = False
    adds_directly: ClassVar[bool] = True

    @property
    def parts(self) -> list[Attention | MLP]:
        """The attention and the MLP."""
        return [self.attention, self.mlp]

    @property
    def width(self) -> int:
        """H·E of the attention."""
        return self.attention.width

    @property
    def n_heads(self) -> int:
        """The attention's heads."""
        return self.attention.n_heads

    def __call__(self, x: Tensor, masking: Masking) -> Tensor:
        """A(x) + M(x) for x [B, S, D]."""
        return self.attention(x, masking) + self.mlp(x)

    def linearise(self, x: Tensor, masking: Masking, through_norms: bool = True) -> LinearSum:
        """A + M and its Jacobian at x [B, S, D]."""
        return LinearSum(self.attention.linearise(x, masking, through_norms), self.mlp.linearise(x, through_norms))


@dataclass(frozen=True)
class LinearSum:
    """The Jacobian of the sum of two modules at one batch."""

    first: LinearAttention
    second: LinearMLP

    @property
    def output(self) -> Tensor:
        """The sum of their outputs, [B, S, D]."""
        return self.first.output + self.second.output

    def jvp(self, t: Tensor) -> Tensor:
        """J t for t [C, B, S, D]."""
        return self.first.jvp(t).add_(self.second.jvp(t))

    def vjp(self, g: Tensor) -> Tensor:
        """Jᵀ g for g [C, B, S, D]."""
        return self.first.vjp(g).add_(self.second.vjp(g))

    def inside(self, t: Tensor, module: int) -> Tensor:
        """The tangent of what the first (even module) or second one's output matrix reads, [C, B, S, W]."""
        return (self.second if module % 2 else self.first).inside(t)


@dataclass(frozen=True)
class Nothing(NoSingleWeights):
    """The second module of a layer that is differentiated whole: it adds nothing."""

    name: str
    adds_directly: bool = False
    width: int = 0
    routed: ClassVar[bool] = False

    def __call__(self, x: Tensor) -> Tensor:
        """Zeros like x."""
        return torch.zeros_like(x)

    def linearise(self, x: Tensor, through_norms: bool = True) -> NothingLinear:
        """Zeros like x, and the zero Jacobian."""
        return NothingLinear(torch.zeros_like(x))


@dataclass(frozen=True)
class NothingLinear:
    """The Jacobian of nothing."""

    output: Tensor

    def jvp(self, t: Tensor) -> Tensor:
        """Zeros [C, B, S, D]."""
        return torch.zeros_like(t)

    def vjp(self, g: Tensor) -> Tensor:
        """Zeros [C, B, S, D]."""
        return torch.zeros_like(g)
