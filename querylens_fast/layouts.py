"""Layouts: where each supported architecture keeps its weights.

`FAMILIES` is a table: one row for each transformers ``model_type``, saying what differs (norm kind, biases, query/key
norms, norms after the modules, soft caps). `from_transformers` reads a row; `from_hooked` reads the uniform names of
transformer-lens instead. Weights are views of the caller's tensors: nothing is copied but reshaped norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from querylens_fast.blocks import MLP, Activation, Attention, Block
from querylens_fast.models import Model, UnsupportedModelError
from querylens_fast.norms import IDENTITY, AnyNorm, Norm


@dataclass(frozen=True)
class Family:
    """What sets one transformers architecture apart from the next."""

    norm_offset: float = 0.0
    """Added to RMSNorm weights: Gemma stores w − 1."""
    mlp_norm: str = "post_attention_layernorm"
    """The norm in front of the MLP."""
    post_norms: tuple[str, str] | None = None
    """The norms after attention and after the MLP, where there are any."""


FAMILIES = {
    "gpt2": Family(),
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(1.0, "pre_feedforward_layernorm", ("post_attention_layernorm", "post_feedforward_layernorm")),
    "gemma3_text": Family(1.0, "pre_feedforward_layernorm", ("post_attention_layernorm", "post_feedforward_layernorm")),
}
FAMILIES["gemma3"] = FAMILIES["gemma3_text"]


def from_transformers(source: Any, name: str, tokenizer: Any) -> Model:
    """A `Model` over a transformers causal LM's own tensors.

    Raises:
        UnsupportedModelError: For an architecture that is not in `FAMILIES`.
    """
    config = source.config.get_text_config()
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model {name!r} is of type {model_type!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    build = _gpt2_blocks if model_type == "gpt2" else _rotary_blocks
    decoder = _decoder(source)
    blocks, final_norm = build(decoder, config, FAMILIES[model_type])
    head = source.get_output_embeddings()
    embedding = source.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    return Model(
        name=name,
        architecture=model_type,
        blocks=blocks,
        final_norm=final_norm,
        W_E=embedding.weight.detach(),
        W_U=head.weight.detach(),
        b_U=_bias(head),
        embed_scale=1.0 if scale is None else float(torch.as_tensor(scale).to(embedding.weight.dtype)),
        position_embedding=decoder.wpe.weight.detach() if model_type == "gpt2" else None,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        convention="raw lm_head",
        tokenizer=tokenizer,
        source=source,
    )


def _decoder(source: Any) -> Any:
    """The module that holds the blocks, under whatever wrappers the checkpoint has."""
    decoder = source
    while True:
        for name in ("transformer", "model", "language_model"):
            if hasattr(decoder, name):
                decoder = getattr(decoder, name)
                break
        else:
            return decoder


def _activation(name: str) -> Activation:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _layer_norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), _bias(module), module.eps, centred=True)


def _rms_norm(module: Any, offset: float) -> Norm:
    weight = module.weight.detach()
    if offset:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    eps = getattr(module, "eps", None)
    return Norm(weight, None, module.variance_epsilon if eps is None else eps, centred=False)


def _gpt2_blocks(decoder: Any, config: Any, family: Family) -> tuple[list[Block], Norm]:
    blocks = []
    for layer in decoder.h:
        # Conv1D keeps weights as [in, out]; q, k and v share one matrix.
        weights = layer.attn.c_attn.weight.detach().mT.chunk(3)
        biases = layer.attn.c_attn.bias.detach().chunk(3)
        attention = Attention(
            norm=_layer_norm(layer.ln_1),
            W_Q=weights[0],
            W_K=weights[1],
            W_V=weights[2],
            W_O=layer.attn.c_proj.weight.detach().mT,
            b_Q=biases[0],
            b_K=biases[1],
            b_V=biases[2],
            b_O=_bias(layer.attn.c_proj),
            q_norm=IDENTITY,
            k_norm=IDENTITY,
            post_norm=IDENTITY,
            n_heads=config.n_head,
            n_kv_heads=config.n_head,
            scale=layer.attn.scaling if hasattr(layer.attn, "scaling") else layer.attn.head_dim**-0.5,
            softcap=None,
            window=None,
            rotary=None,
        )
        mlp = MLP(
            norm=_layer_norm(layer.ln_2),
            W_in=layer.mlp.c_fc.weight.detach().mT,
            b_in=_bias(layer.mlp.c_fc),
            W_gate=None,
            b_gate=None,
            W_out=layer.mlp.c_proj.weight.detach().mT,
            b_out=_bias(layer.mlp.c_proj),
            post_norm=IDENTITY,
            activation=_activation(config.activation_function),
        )
        blocks.append(Block(attention, mlp))
    return blocks, _layer_norm(decoder.ln_f)


def _rotary_blocks(decoder: Any, config: Any, family: Family) -> tuple[list[Block], Norm]:
    def norm(module: Any) -> Norm:
        return _rms_norm(module, family.norm_offset)

    def optional(module: Any, name: str) -> AnyNorm:
        return norm(getattr(module, name)) if hasattr(module, name) else IDENTITY

    after = family.post_norms
    activation = _activation(getattr(config, "hidden_activation", None) or config.hidden_act)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    blocks = []
    for layer, kind in zip(decoder.layers, kinds, strict=True):
        a, m = layer.self_attn, layer.mlp
        attention = Attention(
            norm=norm(layer.input_layernorm),
            W_Q=a.q_proj.weight.detach(),
            W_K=a.k_proj.weight.detach(),
            W_V=a.v_proj.weight.detach(),
            W_O=a.o_proj.weight.detach(),
            b_Q=_bias(a.q_proj),
            b_K=_bias(a.k_proj),
            b_V=_bias(a.v_proj),
            b_O=_bias(a.o_proj),
            q_norm=optional(a, "q_norm"),
            k_norm=optional(a, "k_norm"),
            post_norm=IDENTITY if after is None else norm(getattr(layer, after[0])),
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            scale=a.scaling,
            softcap=getattr(config, "attn_logit_softcapping", None),
            window=config.sliding_window if kind == "sliding_attention" else None,
            rotary=_rotary(decoder.rotary_emb, kind),
        )
        mlp = MLP(
            norm=norm(getattr(layer, family.mlp_norm)),
            W_in=m.up_proj.weight.detach(),
            b_in=_bias(m.up_proj),
            W_gate=m.gate_proj.weight.detach(),
            b_gate=_bias(m.gate_proj),
            W_out=m.down_proj.weight.detach(),
            b_out=_bias(m.down_proj),
            post_norm=IDENTITY if after is None else norm(getattr(layer, after[1])),
            activation=activation,
        )
        blocks.append(Block(attention, mlp))
    return blocks, norm(decoder.norm)


def _rotary(module: Any, kind: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, positions) → (cos, sin), by the model's own module; Gemma 3 keeps one frequency table per layer type."""
    per_kind = hasattr(module, f"{kind}_inv_freq")

    def angles(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return module(x, positions, kind) if per_kind else module(x, positions)

    return angles


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
    return Model(
        name=name,
        architecture="hooked",
        blocks=[_hooked_block(cfg, block, layer) for layer, block in enumerate(hooked.blocks)],
        final_norm=_hooked_norm(hooked.ln_final),
        W_E=hooked.W_E.detach(),
        W_U=hooked.W_U.detach().mT,
        b_U=None if b_U is None or not bool(b_U.any()) else b_U.detach(),
        embed_scale=1.0,
        position_embedding=hooked.W_pos.detach() if cfg.positional_embedding_type == "standard" else None,
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
        activation=_activation(_HOOKED_ACTIVATIONS[cfg.act_fn]),
    )
    return Block(attention, mlp)


def _hooked_rotary(attention: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def angles(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = attention.rotary_cos[positions], attention.rotary_sin[positions]
        return cos.to(x.dtype), sin.to(x.dtype)

    return angles
