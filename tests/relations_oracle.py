"""Brute force for the products of querylens_fast.relations, in float64, from a transformers model's own modules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """One layer's weights [out, in], straight from the checkpoint's modules; gains are norms' scales."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    up: Tensor
    gate: Tensor | None
    down: Tensor
    attention_gain: Tensor
    mlp_gain: Tensor
    after_attention: Tensor
    after_mlp: Tensor
    centred: bool
    n_heads: int
    n_kv_heads: int


def layer_of(source: torch.nn.Module, index: int) -> Layer:
    """Layer ``index`` of a GPT-2, Gemma 3 or Qwen 3 of transformers."""
    config = source.config
    if config.model_type == "gpt2":
        block = source.transformer.h[index]
        q, k, v = block.attn.c_attn.weight.T.chunk(3)
        up, down, one = block.mlp.c_fc.weight.T, block.mlp.c_proj.weight.T, torch.ones(config.n_embd)
        gains = (block.ln_1.weight, block.ln_2.weight, one, one)
        return Layer(q, k, v, block.attn.c_proj.weight.T, up, None, down, *gains, True, config.n_head, config.n_head)
    block = source.model.layers[index]
    a, m = block.self_attn, block.mlp
    weights = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.up_proj, m.gate_proj, m.down_proj)
    if config.model_type == "gemma3_text":
        norms = (block.input_layernorm, block.pre_feedforward_layernorm)
        norms += (block.post_attention_layernorm, block.post_feedforward_layernorm)
        gains = [1 + norm.weight for norm in norms]
    else:
        one = torch.ones(config.hidden_size)
        gains = [block.input_layernorm.weight, block.post_attention_layernorm.weight, one, one]
    heads = config.num_attention_heads, config.num_key_value_heads
    return Layer(*(w.weight for w in weights), *gains, False, *heads)


def through(x: Tensor, gain: Tensor, centred: bool) -> Tensor:
    """Vectors [n, D] as a module sees them behind its norm, but for the division by their size."""
    return (x - x.mean(-1, keepdim=True) if centred else x) * gain


def back_through(x: Tensor, gain: Tensor, centred: bool) -> Tensor:
    """The transpose of `through`."""
    x = x * gain
    return x - x.mean(-1, keepdim=True) if centred else x


def head_norms(projected: Tensor, n_heads: int) -> Tensor:
    """[n, H] norms of projections [n, H·E]."""
    return projected.reshape(len(projected), n_heads, -1).norm(dim=-1)


def ov(layer: Layer, head: int) -> Tensor:
    """[D, D] matrix W_O^h W_V^h of a query head, without norms."""
    E = layer.q.shape[0] // layer.n_heads
    kv = head // (layer.n_heads // layer.n_kv_heads)
    return layer.o[:, head * E : (head + 1) * E] @ layer.v[kv * E : (kv + 1) * E]


def final_logits(source: torch.nn.Module, x: Tensor) -> Tensor:
    """The final norm applied to x as a function, then the head."""
    norm = source.transformer.ln_f if source.config.model_type == "gpt2" else source.model.norm
    return source.lm_head(norm(x))


def embeddings(source: torch.nn.Module) -> Tensor:
    """[V, D] token embeddings as the model adds them to the stream."""
    table = source.get_input_embeddings()
    return table(torch.arange(table.num_embeddings))


def extremes(scores: Tensor, k: int) -> dict[str, Tensor]:
    """Top-k and bottom-k scores of whole rows."""
    return {"top": scores.sort(1, descending=True).values[:, :k], "bottom": scores.sort(1).values[:, :k]}
