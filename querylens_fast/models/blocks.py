"""Decoder blocks as plain tensors: run them, and linearise them once for many directions.

A layer maps the residual stream as ``mid = pre + A(pre)``, ``post = mid + M(mid)``; A (attention) and M (MLP)
include their norms. `Attention.linearise` and `MLP.linearise` keep what the Jacobian at one batch of residuals needs
(norm statistics, attention probabilities, activation derivatives); each further direction then costs plain matrix
products. Directions carry a leading axis C: ``[C, B, S, D]``.

Axes: C directions, B sequences, S positions, D d_model, H heads, K key/value heads, E head dimension, N MLP neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from querylens_fast.models.masking import Masking, turn, turn_back
from querylens_fast.models.norms import IDENTITY, AnyLinearNorm, AnyNorm, at_least_float32
from querylens_fast.topk.products import add_product, linear

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """Multi-head causal attention with the norm before it and, in Gemma, the norm after it.

    Weights are [out, in]: W_Q [H·E, D], W_K and W_V [K·E, D], W_O [D, H·E]; biases [out] or None.
    ``rotary`` gives (cos, sin), each [B, S, E] or narrower, for positions [B, S]; None for learned absolute positions.
    """

    norm: AnyNorm
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor | None
    b_K: Tensor | None
    b_V: Tensor | None
    b_O: Tensor | None
    q_norm: AnyNorm
    k_norm: AnyNorm
    post_norm: AnyNorm
    n_heads: int
    n_kv_heads: int
    scale: float
    softcap: float | None
    window: int | None
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    routed: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """H·E."""
        return self.W_Q.shape[0]

    @property
    def adds_directly(self) -> bool:
        """Whether what W_O gives is added to the residual stream as it is."""
        return self.post_norm is IDENTITY

    def matrices(self) -> list[Tensor]:
        """The weights that tell one model from another."""
        return [self.W_Q, self.W_K, self.W_V, self.W_O]

    def __call__(self, x: Tensor, masking: Masking) -> Tensor:
        """The residual contribution A(x) of x [B, S, D]."""
        return self.linearise(x, masking).output

    def linearise(self, x: Tensor, masking: Masking, through_norms: bool = True) -> LinearAttention:
        """A and its Jacobian at x [B, S, D]; ``through_norms=False`` leaves the block's norms out of the Jacobian."""
        normed = self.norm(x)
        q0 = self._heads(nnf.linear(normed, self.W_Q, self.b_Q), self.n_heads)
        k0 = self._heads(nnf.linear(normed, self.W_K, self.b_K), self.n_kv_heads)
        v = self._heads(nnf.linear(normed, self.W_V, self.b_V), self.n_kv_heads)
        cos = sin = None
        q, k = self.q_norm(q0), self.k_norm(k0)
        if self.rotary is not None:
            cos, sin = (c.unsqueeze(-3) for c in self.rotary(x, masking.positions()))
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        groups = self.n_heads // self.n_kv_heads
        k, v = (z.repeat_interleave(groups, dim=-3) for z in (k, v))
        scores = at_least_float32(q @ k.mT) * self.scale
        slope = None
        if self.softcap is not None:
            squashed = torch.tanh(scores / self.softcap)
            scores, slope = squashed * self.softcap, 1 - squashed.square()
        scores = scores.masked_fill(~masking.visible(self.window), float("-inf"))
        # A query that sees no key at all attends to nothing: zero, not NaN.
        pattern = torch.softmax(scores, dim=-1).nan_to_num(0.0).to(x.dtype)
        mixed = nnf.linear(self._merge(pattern @ v), self.W_O, self.b_O)
        return LinearAttention(
            weights=self,
            output=self.post_norm(mixed),
            norm=self.norm.linearise(x) if through_norms else IDENTITY,
            q_norm=self.q_norm.linearise(q0),
            k_norm=self.k_norm.linearise(k0),
            post_norm=self.post_norm.linearise(mixed) if through_norms else IDENTITY,
            cos=cos,
            sin=sin,
            q=q * self.scale,
            k=k * self.scale,
            v=v,
            pattern=pattern,
            slope=None if slope is None else slope.to(x.dtype),
        )

    @staticmethod
    def _heads(x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (n, -1)).transpose(-2, -3)

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return x.transpose(-2, -3).flatten(-2)


@dataclass(frozen=True)
class LinearAttention:
    """Attention's Jacobian at one batch: q, k (with the score scale) and v [B, H, S, E], pattern [B, H, S, S]."""

    weights: Attention
    output: Tensor
    norm: AnyLinearNorm
    q_norm: AnyLinearNorm
    k_norm: AnyLinearNorm
    post_norm: AnyLinearNorm
    cos: Tensor | None
    sin: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Tensor
    slope: Tensor | None

    def jvp(self, t: Tensor) -> Tensor:
        """J_A t for t [C, B, S, D]."""
        return self.post_norm.jvp(linear(self.inside(t), self.weights.W_O))

    def inside(self, t: Tensor, module: int = 0) -> Tensor:
        """The tangent of the heads' outputs, which W_O reads, [C, B, S, H·E] of t [C, B, S, D]."""
        w = self.weights
        t = self.norm.jvp(t)
        dq = self._turn(self.q_norm.jvp(w._heads(linear(t, w.W_Q), w.n_heads)))
        dk = self._spread(self._turn(self.k_norm.jvp(w._heads(linear(t, w.W_K), w.n_kv_heads))))
        dv = self._spread(w._heads(linear(t, w.W_V), w.n_kv_heads))
        dscores = dq @ self.k.mT + self.q @ dk.mT
        if self.slope is not None:
            dscores = dscores * self.slope
        dpattern = self._through_softmax(dscores)
        return w._merge(dpattern @ self.v + self.pattern @ dv)

    def vjp(self, g: Tensor) -> Tensor:
        """J_Aᵀ g for g [C, B, S, D]."""
        w = self.weights
        mixed = w._heads(linear(self.post_norm.vjp(g), w.W_O.mT), w.n_heads)
        dq, dk, dv = self.heads_vjp(mixed)
        back = linear(w._merge(self.q_norm.vjp(self.turn_back(dq))), w.W_Q.mT)
        add_product(back, w._merge(self.k_norm.vjp(self.turn_back(self._gather(dk)))), w.W_K)
        add_product(back, w._merge(self._gather(dv)), w.W_V)
        return self.norm.vjp(back)

    def heads_vjp(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of the turned q and k and of v, each query head's own, for one of the mixed values.

        All are [C, B, H, S, E]; grouped key and value heads are not added up yet.
        """
        dv = self.pattern.mT @ mixed
        dscores = self._through_softmax(mixed @ self.v.mT)
        if self.slope is not None:
            dscores = dscores * self.slope
        return dscores @ self.k, dscores.mT @ self.q, dv

    def _through_softmax(self, d: Tensor) -> Tensor:
        d = d * self.pattern
        return torch.addcmul(d, self.pattern, d.sum(-1, keepdim=True), value=-1)

    def _turn(self, x: Tensor) -> Tensor:
        return x if self.cos is None or self.sin is None else turn(x, self.cos, self.sin)

    def turn_back(self, x: Tensor) -> Tensor:
        return x if self.cos is None or self.sin is None else turn_back(x, self.cos, self.sin)

    def _spread(self, x: Tensor) -> Tensor:
        groups = self.weights.n_heads // self.weights.n_kv_heads
        return x if groups == 1 else x.repeat_interleave(groups, dim=-3)

    def _gather(self, x: Tensor) -> Tensor:
        kv = self.weights.n_kv_heads
        return x if kv == self.weights.n_heads else x.unflatten(-3, (kv, -1)).sum(-3)


@dataclass(frozen=True)
class MLP:
    """Plain (W_gate None) or gated MLP with its norms; W_in, W_gate [N, D], W_out [D, N], biases [out] or None."""

    norm: AnyNorm
    W_in: Tensor
    b_in: Tensor | None
    W_gate: Tensor | None
    b_gate: Tensor | None
    W_out: Tensor
    b_out: Tensor | None
    post_norm: AnyNorm
    activation: Activation
    routed: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """N."""
        return self.W_in.shape[0]

    @property
    def adds_directly(self) -> bool:
        """Whether what W_out gives is added to the residual stream as it is."""
        return self.post_norm is IDENTITY

    def matrices(self) -> list[Tensor]:
        """The weights that tell one model from another."""
        return [self.W_in, self.W_out, *([] if self.W_gate is None else [self.W_gate])]

    def hidden(self, normed: Tensor) -> Tensor:
        """Neuron activations [..., N] (what W_out reads) for the MLP's normed input [..., D]."""
        up = nnf.linear(normed, self.W_in, self.b_in)
        if self.W_gate is None:
            return self.activation(up)
        return self.activation(nnf.linear(normed, self.W_gate, self.b_gate)) * up

    def project(self, hidden: Tensor) -> Tensor:
        """The residual contribution of neuron activations [..., N]."""
        return self.post_norm(nnf.linear(hidden, self.W_out, self.b_out))

    def __call__(self, x: Tensor) -> Tensor:
        """The residual contribution M(x) of x [..., D]."""
        return self.project(self.hidden(self.norm(x)))

    def linearise(self, x: Tensor, through_norms: bool = True) -> LinearMLP:
        """M and its Jacobian at x [B, S, D]; ``through_norms=False`` leaves the block's norms out of the Jacobian."""
        normed = self.norm(x)
        up = nnf.linear(normed, self.W_in, self.b_in)
        if self.W_gate is None:
            hidden, slope = with_slope(self.activation, up)
            by_gate, by_up = None, slope
        else:
            gate = nnf.linear(normed, self.W_gate, self.b_gate)
            opened, slope = with_slope(self.activation, gate)
            hidden, by_gate, by_up = opened * up, slope * up, opened
        mixed = nnf.linear(hidden, self.W_out, self.b_out)
        return LinearMLP(
            weights=self,
            output=self.post_norm(mixed),
            norm=self.norm.linearise(x) if through_norms else IDENTITY,
            post_norm=self.post_norm.linearise(mixed) if through_norms else IDENTITY,
            by_up=by_up,
            by_gate=by_gate,
        )


def with_slope(activation: Activation, x: Tensor) -> tuple[Tensor, Tensor]:
    """activation(x) and its derivative there, elementwise."""
    value, slope, *_ = torch.func.jvp(activation, (x,), (torch.ones_like(x),))
    return value, slope


@dataclass(frozen=True)
class LinearMLP:
    """The MLP's Jacobian at one batch: ∂hidden/∂up and ∂hidden/∂gate, [B, S, N]."""

    weights: MLP
    output: Tensor
    norm: AnyLinearNorm
    post_norm: AnyLinearNorm
    by_up: Tensor
    by_gate: Tensor | None

    def jvp(self, t: Tensor) -> Tensor:
        """J_M t for t [C, B, S, D]."""
        return self.post_norm.jvp(linear(self.inside(t), self.weights.W_out))

    def inside(self, t: Tensor, module: int = 1) -> Tensor:
        """The tangent of the neurons, which W_out reads, [C, B, S, N] of t [C, B, S, D]."""
        w = self.weights
        t = self.norm.jvp(t)
        hidden = linear(t, w.W_in).mul_(self.by_up)
        if w.W_gate is not None and self.by_gate is not None:
            hidden.addcmul_(linear(t, w.W_gate), self.by_gate)
        return hidden

    def vjp(self, g: Tensor) -> Tensor:
        """J_Mᵀ g for g [C, B, S, D]."""
        w = self.weights
        hidden = linear(self.post_norm.vjp(g), w.W_out.mT)
        if w.W_gate is None or self.by_gate is None:
            return self.norm.vjp(linear(hidden.mul_(self.by_up), w.W_in.mT))
        back = linear(hidden * self.by_gate, w.W_gate.mT)
        add_product(back, hidden.mul_(self.by_up), w.W_in)
        return self.norm.vjp(back)


class LinearPart(Protocol):
    """A module's output and Jacobian at one batch of residuals; directions are [C, B, S, D]."""

    @property
    def output(self) -> Tensor: ...

    def jvp(self, t: Tensor) -> Tensor: ...

    def vjp(self, g: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """One layer of the residual stream: plain tensors, or parts that answer to the same methods.

    `moe.Mixture` stands in for an MLP, `autodiff.AutodiffPart` for any module, `units.Beside` for both at once.
    """

    attention: Any
    mlp: Any

    @property
    def parts(self) -> list[Any]:
        """The parts that hold weights."""
        return list(getattr(self.attention, "parts", [self.attention, self.mlp]))

    def __call__(self, pre: Tensor, masking: Masking) -> Tensor:
        """``post`` [B, S, D] from ``pre`` [B, S, D]."""
        mid = pre + self.attention(pre, masking)
        return mid + self.mlp(mid)
