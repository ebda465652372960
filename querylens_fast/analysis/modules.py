"""Jacobians of single modules, as products with vectors (reference ``analysis.common``: ``jvp_mlp`` and the like)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from querylens_fast.models.blocks import LinearAttention, LinearMLP, Masking
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.norms import IDENTITY


def _expand_to_BSD(vec: Tensor, B: int, S: int, d_model: int, device: Any, dtype: torch.dtype) -> Tensor:
    """vec [d], [S, d] or [B, S, d] at every position, [B, S, d]."""
    if tuple(vec.shape) not in ((d_model,), (S, d_model), (B, S, d_model)):
        raise ValueError(
            f"vector is {list(vec.shape)}; expected {[d_model]}, {[S, d_model]} or {[B, S, d_model]} for this batch"
        )
    return vec.to(device=device, dtype=dtype).expand(B, S, d_model)


def jvp_mlp(
    model: Any,
    layer_idx: int,
    X: Tensor,
    f_vec: Tensor,
    return_output: bool = False,
    use_layer_norm: bool = False,
) -> Any:
    """J_M f: the MLP's Jacobian at X [B, S, d] applied to f_vec ([d], [S, d] or [B, S, d]).

    X is the residual stream before the MLP with ``use_layer_norm``, else the MLP's own (normed) input; norms after the
    MLP count in the first case only. ``return_output`` gives (output, product), both [B, S, d].
    """
    linear, engine = _linear_mlp(model, layer_idx, X, use_layer_norm)
    moved = linear.jvp(_everywhere(f_vec, X, engine))[0]
    return (linear.output, moved) if return_output else moved


def jvp_attn(
    model: Any,
    layer_idx: int,
    X: Tensor,
    f_vec: Tensor,
    return_output: bool = False,
    use_layer_norm: bool = False,
    attention_mask: Tensor | None = None,
) -> Any:
    """J_A f, as `jvp_mlp`; ``attention_mask`` [B, S] bool hides padding."""
    linear, engine = _linear_attention(model, layer_idx, X, use_layer_norm, attention_mask)
    moved = linear.jvp(_everywhere(f_vec, X, engine))[0]
    return (linear.output, moved) if return_output else moved


def vjp_mlp(model: Any, layer_idx: int, X: Tensor, out_cotangent: Tensor, use_layer_norm: bool = False) -> Tensor:
    """J_Mᵀ g for out_cotangent g ([d], [S, d] or [B, S, d]), [B, S, d]; X as in `jvp_mlp`."""
    linear, engine = _linear_mlp(model, layer_idx, X, use_layer_norm)
    return linear.vjp(_everywhere(out_cotangent, X, engine))[0]


def vjp_attn(
    model: Any,
    layer_idx: int,
    X: Tensor,
    out_cotangent: Tensor,
    use_layer_norm: bool = False,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """J_Aᵀ g for out_cotangent g, [B, S, d]; X and the mask as in `jvp_attn`."""
    linear, engine = _linear_attention(model, layer_idx, X, use_layer_norm, attention_mask)
    return linear.vjp(_everywhere(out_cotangent, X, engine))[0]


def _everywhere(vec: Tensor, X: Tensor, model: Model) -> Tensor:
    """vec as one direction of the engine over X [B, S, d], [1, B, S, d]."""
    return _expand_to_BSD(vec, X.shape[0], X.shape[1], X.shape[2], model.device, model.dtype)[None]


@torch.no_grad()
def _linear_mlp(model: Any, layer: int, X: Tensor, use_layer_norm: bool) -> tuple[LinearMLP, Model]:
    engine = as_model(model)
    mlp = engine.blocks[layer].mlp
    if not use_layer_norm:
        mlp = dataclasses.replace(mlp, norm=IDENTITY, post_norm=IDENTITY)
    return mlp.linearise(_checked_input(X, engine)), engine


@torch.no_grad()
def _linear_attention(
    model: Any, layer: int, X: Tensor, use_layer_norm: bool, mask: Tensor | None
) -> tuple[LinearAttention, Model]:
    engine = as_model(model)
    attention = engine.blocks[layer].attention
    if not use_layer_norm:
        attention = dataclasses.replace(attention, norm=IDENTITY, post_norm=IDENTITY)
    X = _checked_input(X, engine)
    valid = None if mask is None else mask.to(engine.device).bool()
    return attention.linearise(X, Masking(valid, (X.shape[0], X.shape[1]), engine.device)), engine


def _checked_input(X: Tensor, model: Model) -> Tensor:
    if X.ndim != 3 or X.shape[2] != model.d_model or X.dtype != model.dtype:
        raise ValueError(
            f"X is {list(X.shape)} of {X.dtype}; expected [B, S, {model.d_model}] of {model.dtype}, as the model is"
        )
    return X.to(model.device)
