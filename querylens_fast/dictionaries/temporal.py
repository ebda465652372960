"""Temporal dictionaries: what earlier positions predict of a position's codes, by attention over codes.

As sae-lens's TemporalSAE: the prediction is taken off the input, and what is left is encoded sparsely.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as nnf
from torch import Tensor

EPS = 1e-6


def predicted_codes(
    x: Tensor, weights: Mapping[str, Tensor], n_heads: int, n_attn_layers: int
) -> tuple[Tensor, Tensor]:
    """(x less its prediction [B, S, D], the predicted codes [B, S, n]) for inputs x [B, S, D].

    Args:
        x: Inputs, normalised.
        weights: W_enc [D, n], W_dec [n, D] and, for each layer i, "attn_layers.i." k_ctx, q_target [m, n], v_ctx,
            c_proj [n, n], each with weight and bias.
        n_heads: Attention heads.
        n_attn_layers: Attention layers.

    Raises:
        ValueError: x is not [B, S, D].
    """
    if x.ndim != 3:
        raise ValueError(f"input is {list(x.shape)}; a temporal dictionary takes sequences, [B, S, D]")
    total = x.new_zeros(*x.shape[:2], len(weights["W_dec"]))
    for layer in range(n_attn_layers):
        codes = ((x / (4 * x.shape[-1])) @ weights["W_enc"]).relu()
        before = nnf.pad(codes[:, :-1], (0, 0, 1, 0))
        k, q, v = (
            _linear(weights, layer, name, source).unflatten(-1, (n_heads, -1)).transpose(1, 2)
            for name, source in (("k_ctx", before), ("q_target", codes), ("v_ctx", before))
        )
        mixed = nnf.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        predicted = _linear(weights, layer, "c_proj", mixed).relu()
        direction = predicted @ weights["W_dec"]
        length = direction.norm(dim=-1, keepdim=True) + EPS
        share = (direction * x).sum(-1, keepdim=True) / length.square()
        total = total + predicted * share
        x = x - share * direction
    return x, total


def _linear(weights: Mapping[str, Tensor], layer: int, name: str, x: Tensor) -> Tensor:
    prefix = f"attn_layers.{layer}.{name}"
    if f"{prefix}.weight" not in weights:
        raise ValueError(f"temporal dictionary lacks the tensor {prefix}.weight")
    return nnf.linear(x, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))
