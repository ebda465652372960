"""Totals: a module's Jacobian summed over positions in closed form, for the first order.

The first order gives every module the same direction v at all positions, so what it needs of a module is one matrix,
T = Σ_s o_s Σ_r J_{s,r} i_r, with weights o of the outputs and i of the inputs (masks). It does not need D walks:

- A norm is N_s = r_s diag(w) (P − x̂_s x̂_sᵀ / D): a scalar r_s = 1/σ_s, the centring P (LayerNorm only) and a rank-one
  part. So Σ_s A_s N_s = (Σ_s r_s A_s) diag(w) P − (1/D) Σ_s r_s (A_s (w ∘ x̂_s)) x̂_sᵀ.
- MLP: A_s = diag(g_s) W_in has a diagonal that sums by itself, and the rank-one parts are one product [N, S] · [S, D].
- A mixture of experts, its routing held fixed: such an MLP for each expert, over the positions it serves.
- Attention: for each head and coordinate e of its mixed values, a cotangent at all positions is pulled back inside the
  head alone: E cotangents of width E, in place of D of width D. What arrives at q, k and v sums the same way.
- A norm after the module is N'_s on the left: the same split, whose rank-one part needs each output position's own
  pullback of ŷ_s: one for the MLP, S for attention.

Everything is computed in float32 or wider. Cost a batch: some forward passes, against D walks.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from querylens_fast.models.blocks import LinearAttention, LinearMLP
from querylens_fast.models.moe import LinearMixture
from querylens_fast.models.norms import IDENTITY, AnyLinearNorm, LinearNorm, at_least_float32

T = TypeVar("T")


def has_closed_form(module: object, length: int) -> TypeGuard[LinearAttention | LinearMLP | LinearMixture]:
    """Whether `total` is cheaper than walking the D basis directions through the module."""
    if isinstance(module, LinearAttention):
        return not isinstance(module.post_norm, LinearNorm) or length < module.output.shape[-1]
    return isinstance(module, LinearMLP | LinearMixture)


def total_inside(module: LinearAttention | LinearMLP, ins: Tensor, outs: Tensor, chunk: int) -> Tensor:
    """`total` up to what the module's output matrix reads, [W, D]."""
    module, ins, outs = _widened(module), at_least_float32(ins), at_least_float32(outs)
    return _mlp(module, ins, outs) if isinstance(module, LinearMLP) else _attention(module, ins, outs, chunk)


def total(module: LinearAttention | LinearMLP | LinearMixture, ins: Tensor, outs: Tensor, chunk: int) -> Tensor:
    """Σ_s outs_s Σ_r J_{s,r} ins_r, [D, D] in float32 or wider.

    Args:
        module: Linearised at residuals [B, S, D].
        ins: Weights of the input positions, [B, S, 1].
        outs: Weights of the output positions, [B, S, 1].
        chunk: Cotangents held at once.
    """
    ins, outs = at_least_float32(ins), at_least_float32(outs)
    if isinstance(module, LinearMixture):
        return _mixture(module, ins, outs)
    module = _widened(module)
    after, bare = module.post_norm, replace(module, post_norm=IDENTITY)
    if isinstance(after, LinearNorm):
        outs = outs * after.inverse_std
    if isinstance(bare, LinearMLP):
        whole = bare.weights.W_out @ _mlp(bare, ins, outs)
    else:
        whole = bare.weights.W_O @ _attention(bare, ins, outs, chunk)
    if not isinstance(after, LinearNorm):
        return whole
    if after.centred:
        whole = whole - whole.mean(0)
    pulled = _pulled_by_position(bare, after.x_hat * outs, ins, chunk)
    whole = whole - after.x_hat.flatten(0, 1).mT @ pulled / len(whole)
    return whole if after.weight is None else whole * after.weight[:, None]


def _widened(value: T) -> T:
    """A dataclass with every tensor in it in float32 or wider."""
    if isinstance(value, Tensor):
        return at_least_float32(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _widened(getattr(value, f.name)) for f in fields(value)})
    return value


def _mlp(module: LinearMLP, ins: Tensor, outs: Tensor) -> Tensor:
    w, before = module.weights, _Before(module.norm, ins, module.output.shape[-1])
    pairs = [(w.W_in, module.by_up)]
    if w.W_gate is not None and module.by_gate is not None:
        pairs.append((w.W_gate, module.by_gate))
    slopes = [(weight, slope.flatten(0, 1)) for weight, slope in pairs]
    return _hidden(before, outs.flatten(0, 1), slopes, slice(None))


def _mixture(module: LinearMixture, ins: Tensor, outs: Tensor) -> Tensor:
    w, before = module.weights, _Before(_widened(module.norm), ins, module.output.shape[-1])
    whole = outs.new_zeros(module.output.shape[-1], module.output.shape[-1])
    for e in module.experts:
        up, gate, down = (at_least_float32(weight[e.index]) for weight in (w.ups, w.gates, w.downs))
        pairs = [(up, at_least_float32(e.by_up)), (gate, at_least_float32(e.by_gate))]
        whole.addmm_(down, _hidden(before, outs.flatten(0, 1), pairs, e.at))
    return whole


def _hidden(before: _Before, outs: Tensor, pairs: list[tuple[Tensor, Tensor]], at: Tensor | slice) -> Tensor:
    """[N, D]: Σ over the positions ``at`` of diag(slope) W N_s, over pairs of W [N, D] and slopes [P, N]."""
    straight, along = [], []
    for weight, slope in pairs:
        scaled = slope * outs[at] * before.scale[at]
        straight.append(scaled.sum(0)[:, None] * weight)
        along.append((scaled * nnf.linear(before.directions[at], weight)).mT)
    return before.through(sum(straight[1:], straight[0]), sum(along[1:], along[0]), at)


def _attention(module: LinearAttention, ins: Tensor, outs: Tensor, chunk: int) -> Tensor:
    w, before = module.weights, _Before(module.norm, ins, module.output.shape[-1])
    batch, heads, length, width = module.q.shape
    groups = w.n_heads // w.n_kv_heads
    shape = (batch, length, -1)
    weights, reads = [], []
    for weight in (w.W_Q, w.W_K, w.W_V):
        by_head = weight.unflatten(0, (-1, width))
        repeats = heads // len(by_head)
        weights.append(by_head.repeat_interleave(repeats, 0))
        seen = w._heads(nnf.linear(before.directions, weight).view(shape), len(by_head))
        reads.append(seen.repeat_interleave(repeats, 1))
    scale = before.scale.view(batch, 1, length, 1)
    rows = []
    for start in range(0, width, chunk):
        one_hot = torch.eye(width, dtype=outs.dtype, device=outs.device)[start : start + chunk]
        mixed = one_hot[:, None, None, None, :] * outs[:, None].expand(-1, heads, -1, -1)
        dq, dk, dv = module.heads_vjp(mixed)
        grouped = dk.unflatten(2, (-1, groups)).movedim(3, 0)
        dk = module.k_norm.vjp(module.turn_back(grouped)).movedim(0, 3).flatten(2, 3)
        arrived = (module.q_norm.vjp(module.turn_back(dq)), dk, dv)
        straight = along = 0
        for cotangent, weight, read in zip(arrived, weights, reads, strict=True):
            cotangent = cotangent * scale
            straight = straight + torch.einsum("che,hed->hcd", cotangent.sum((1, 3)), weight)
            along = along + torch.einsum("cbhse,bhse->hcbs", cotangent, read)
        rows.append((straight, along))
    straight, along = (torch.cat(parts, 1).flatten(0, 1) for parts in zip(*rows, strict=True))
    return before.through(straight, along.flatten(1))


def _pulled_by_position(module: LinearAttention | LinearMLP, g: Tensor, ins: Tensor, chunk: int) -> Tensor:
    """Row (b, s): the pullback of g[b, s] at output s alone, summed over the inputs; [B·S, D] of g [B, S, D]."""
    if isinstance(module, LinearMLP):
        return (module.vjp(g[None])[0] * ins).flatten(0, 1)
    length, parts = g.shape[1], []
    for start in range(0, length, chunk):
        alone = torch.eye(length, dtype=g.dtype, device=g.device)[start : start + chunk]
        parts.append((module.vjp(alone[:, None, :, None] * g) * ins).sum(2))
    return torch.cat(parts).transpose(0, 1).flatten(0, 1)


class _Before:
    """The norm in front of a module, [B, S, D] positions in a row of P = B·S."""

    def __init__(self, norm: AnyLinearNorm, ins: Tensor, width: int) -> None:
        scale = ins.flatten(0, 1)
        if not isinstance(norm, LinearNorm):
            norm = LinearNorm(scale.new_zeros(1, len(scale), width), scale.new_ones(1, len(scale), 1), None, False)
        self.norm, self.x_hat = norm, norm.x_hat.flatten(0, 1)
        self.scale = scale * norm.inverse_std.flatten(0, 1)
        """[P, 1]: r_s, with the weight of the input."""
        self.directions = self.x_hat if norm.weight is None else self.x_hat * norm.weight
        """[P, D]: w ∘ x̂_s."""

    def through(self, straight: Tensor, along: Tensor, at: Tensor | slice = slice(None)) -> Tensor:
        """Σ_s A_s N_s over positions ``at``, [m, D], from Σ_s r_s A_s [m, D] and r_s A_s (w ∘ x̂_s) [m, P]."""
        straight = straight if self.norm.weight is None else straight * self.norm.weight
        if self.norm.centred:
            straight = straight - straight.mean(-1, keepdim=True)
        return straight - along @ self.x_hat[at] / self.x_hat.shape[-1]
