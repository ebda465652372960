"""Hooked models: transformer-lens and sae-lens models as the engine's blocks, by their uniform names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from querylens_fast.models.blocks import MLP, Attention, Block
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.families import activation_named
from querylens_fast.models.model import Model
from querylens_fast.models.norms import IDENTITY, AnyNorm, Norm

_HOOKED_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_fast",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "relu": "relu",
}


def from_hooked(hooked: Any) -> Model:
    """A `Model` over a transformer-lens (or sae-lens) hooked model's parameters, as processed by its loader.

    Raises:
        UnsupportedModelError: For what the engine does not cover (parallel attention, ALiBi, mixture of experts, …).
    """
    cfg = hooked.cfg
    name = str(getattr(cfg, "model_name", type(hooked).__name__))
    refused = {
        "parallel_attn_mlp": getattr(cfg, "parallel_attn_mlp", False),
        "attn_only": getattr(cfg, "attn_only", False),
        "num_experts": getattr(cfg, "num_experts", None),
        "rotary_adjacent_pairs": getattr(cfg, "rotary_adjacent_pairs", False),
        "act_fn": cfg.act_fn not in _HOOKED_ACTIVATIONS,
        "positional_embedding_type": cfg.positional_embedding_type not in ("standard", "rotary"),
        "attention_dir": getattr(cfg, "attention_dir", "causal") != "causal",
    }
    wrong = [f"{key}={getattr(cfg, key, None)!r}" for key, bad in refused.items() if bad]
    if wrong:
        raise UnsupportedModelError(f"hooked model {name!r} uses {', '.join(wrong)}, which is not supported")
    folded = str(cfg.normalization_type).endswith("Pre")
    b_U = getattr(hooked, "b_U", None)
    table = hooked.W_pos.detach() if cfg.positional_embedding_type == "standard" else None
    return Model(
        name=name,
        architecture="hooked",
        blocks=[_hooked_block(cfg, block, layer) for layer, block in enumerate(hooked.blocks)],
        final_norm=_hooked_norm(hooked.ln_final),
        W_E=hooked.W_E.detach(),
        W_U=hooked.W_U.detach().mT,
        b_U=None if b_U is None or not bool(b_U.any()) else b_U.detach(),
        embed_scale=1.0,
        position_embedding=table,
        max_positions=None if table is None else len(table),
        logit_softcap=_positive(getattr(cfg, "output_logits_soft_cap", None)),
        convention="hooked model, final norm folded into W_U" if folded else "hooked model, raw unembedding",
        tokenizer=getattr(hooked, "tokenizer", None),
        source=hooked,
    )


def _positive(value: float | None) -> float | None:
    """A hooked model's soft cap: −1 stands for none."""
    return float(value) if value is not None and value > 0 else None


def _hooked_norm(module: Any) -> Norm:
    weight = getattr(module, "w", None)
    bias = getattr(module, "b", None)
    return Norm(
        None if weight is None else weight.detach(),
        None if bias is None else bias.detach(),
        float(module.eps),
        centred="RMS" not in type(module).__name__,
    )


def _hooked_block(cfg: Any, block: Any, layer: int) -> Block:
    a, m = block.attn, block.mlp
    d = cfg.d_model
    group = cfg.n_heads // (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
    kinds = getattr(cfg, "attn_types", None)
    local = kinds is not None and kinds[layer] == "local"

    def heads(weight: Tensor, step: int) -> Tensor:
        # The hooked model repeats grouped key and value heads; every `step`-th one is an original.
        return weight.detach()[::step].mT.reshape(-1, d)

    def bias(name: str, step: int = 1) -> Tensor | None:
        value = getattr(a, name, None)
        return None if value is None else value.detach()[::step].reshape(-1)

    def optional(owner: Any, name: str) -> AnyNorm:
        module = getattr(owner, name, None)
        return IDENTITY if module is None else _hooked_norm(module)

    attention = Attention(
        norm=_hooked_norm(block.ln1),
        W_Q=heads(a.W_Q, 1),
        W_K=heads(a.W_K, group),
        W_V=heads(a.W_V, group),
        W_O=a.W_O.detach().reshape(-1, d).mT,
        b_Q=bias("b_Q"),
        b_K=bias("b_K", group),
        b_V=bias("b_V", group),
        b_O=a.b_O.detach(),
        q_norm=optional(a, "q_norm"),
        k_norm=optional(a, "k_norm"),
        post_norm=optional(block, "ln1_post"),
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_heads // group,
        scale=1.0 / float(a.attn_scale) if cfg.use_attn_scale else 1.0,
        softcap=_positive(getattr(cfg, "attn_scores_soft_cap", None)),
        window=cfg.window_size if local else None,
        rotary=_hooked_rotary(a) if cfg.positional_embedding_type == "rotary" else None,
    )
    gate = getattr(m, "W_gate", None)
    mlp = MLP(
        norm=_hooked_norm(block.ln2),
        W_in=m.W_in.detach().mT,
        # A gated hooked MLP adds b_in after the product of gate and up projection, unlike the transformers models.
        b_in=None if gate is not None else m.b_in.detach(),
        W_gate=None if gate is None else gate.detach().mT,
        b_gate=None,
        W_out=m.W_out.detach().mT,
        b_out=m.b_out.detach(),
        post_norm=optional(block, "ln2_post"),
        activation=activation_named(_HOOKED_ACTIVATIONS[cfg.act_fn]),
    )
    return Block(attention, mlp)


def _hooked_rotary(attention: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def angles(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = attention.rotary_cos[positions], attention.rotary_sin[positions]
        return cos.to(x.dtype), sin.to(x.dtype)

    return angles
