"""Norms: LayerNorm and RMSNorm, and their Jacobians at one batch of residuals.

Axes: B sequences, S positions, D the normalised width. Directions carry any leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 when it is narrower; sums and norm statistics are never taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def of_moderate_length(rows: Tensor) -> Tensor:
    """rows [n, D], multiplied by a power of two where their squares would overflow or vanish in float32."""
    if not rows.numel():
        return rows
    peak = torch.maximum(rows.amax(1), -rows.amin(1))
    extreme = (peak > 0) & ((peak < 1e-15) | (peak > 1e15)) & peak.isfinite()
    if not bool(extreme.any()):
        return rows
    exponent = torch.where(extreme, -torch.frexp(peak).exponent, 0)[:, None]
    half = exponent // 2  # 2 ** 148, for the smallest of float32, is no float32
    return torch.ldexp(torch.ldexp(rows, half), exponent - half)


@dataclass(frozen=True)
class Norm:
    """LayerNorm (``centred``) or RMSNorm with its scale and bias, both [D] or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool
    stored: Tensor | None = None
    """The scale as the checkpoint has it, where something was added to it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x ([..., D]); statistics in float32 or wider."""
        x_hat, _ = self._standardise(x)
        y = x_hat if self.weight is None else x_hat * self.weight
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)

    def linearise(self, x: Tensor) -> LinearNorm:
        """The Jacobian of the norm at x [B, S, D]."""
        x_hat, inverse_std = self._standardise(x)
        return LinearNorm(x_hat.to(x.dtype), inverse_std.to(x.dtype), self.weight, self.centred)

    def _standardise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = at_least_float32(x)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        inverse_std = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * inverse_std, inverse_std


@dataclass(frozen=True)
class LinearNorm:
    """J t = w ∘ (t − mean t − x̂ mean(x̂ t)) / σ; the middle matrix is symmetric, so the pullback reuses it."""

    x_hat: Tensor
    inverse_std: Tensor
    weight: Tensor | None
    centred: bool

    def jvp(self, t: Tensor) -> Tensor:
        t = self._project(t)
        return t if self.weight is None else t * self.weight.to(t.dtype)

    def vjp(self, g: Tensor) -> Tensor:
        return self._project(g if self.weight is None else g * self.weight.to(g.dtype))

    def _project(self, t: Tensor) -> Tensor:
        along = (t * self.x_hat).mean(-1, keepdim=True)
        if self.centred:
            t = t - t.mean(-1, keepdim=True)
        return torch.addcmul(t, self.x_hat, along, value=-1).mul_(self.inverse_std)


class Identity:
    """Stands where a block has no norm, or where the Jacobian is asked for without it."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def linearise(self, x: Tensor) -> Identity:
        return self

    def jvp(self, t: Tensor) -> Tensor:
        return t

    def vjp(self, g: Tensor) -> Tensor:
        return g


IDENTITY = Identity()
AnyNorm = Norm | Identity
AnyLinearNorm = LinearNorm | Identity


@dataclass(frozen=True)
class OwnNorm:
    """A model's own norm module, called as it is; on inputs wider than its weights with widened weights."""

    module: Any

    @property
    def weight(self) -> Tensor | None:
        weight = getattr(self.module, "weight", None)
        return None if weight is None else weight.detach()

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def stored(self) -> Tensor | None:
        """The scale as the checkpoint has it."""
        return self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x ([..., D])."""
        held = dict(self.module.named_parameters())
        if all(p.dtype == x.dtype for p in held.values()):
            return self.module(x)
        return torch.func.functional_call(self.module, {n: p.detach().to(x.dtype) for n, p in held.items()}, (x,))
