"""Layouts: where each supported architecture keeps its weights.

`FAMILIES` is a table: one row for each transformers ``model_type``, saying what differs (norm kind, biases, query/key
norms, norms after the modules, soft caps). `from_transformers` reads a row; an architecture without one can be
differentiated as it is (`autodiff`). Weights are views of the caller's tensors: nothing is copied but reshaped norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from querylens_fast.models.blocks import MLP, Activation, Attention, Block
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.models.moe import Mixture
from querylens_fast.models.norms import IDENTITY, AnyNorm, Norm
from querylens_fast.models.units import Beside, Nothing


@dataclass(frozen=True)
class Family:
    """What sets one transformers architecture apart from the next."""

    norm_offset: float = 0.0
    """Added to RMSNorm weights: Gemma stores w − 1."""
    mlp_norm: str = "post_attention_layernorm"
    """The norm in front of the MLP."""
    post_norms: tuple[str, str] | None = None
    """The norms after attention and after the MLP, where there are any."""
    windowed: bool = False
    """Every layer's attention slides where the config sets a window and names no layer types."""


FAMILIES = {
    "gpt2": Family(),
    "gpt_neox": Family(),
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(windowed=True),
    "mistral": Family(windowed=True),
    "gemma": Family(1.0),
    "gemma2": Family(1.0, "pre_feedforward_layernorm", ("post_attention_layernorm", "post_feedforward_layernorm")),
    "gemma3_text": Family(1.0, "pre_feedforward_layernorm", ("post_attention_layernorm", "post_feedforward_layernorm")),
}
FAMILIES["gemma3"] = FAMILIES["gemma3_text"]


def from_transformers(source: Any, name: str, tokenizer: Any) -> Model:
    """A `Model` over a transformers causal LM's own tensors, with hand-written linearisations.

    Raises:
        UnsupportedModelError: For an architecture that is not in `FAMILIES`.
    """
    config = source.config.get_text_config()
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model {name!r} is of type {model_type!r}; linearisations are written out for "
            f"{', '.join(sorted(FAMILIES))}. Leave linearisation at 'auto' to differentiate its own layers"
        )
    decoder = _decoder(source)
    head = source.get_output_embeddings()
    embedding = source.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    build = {"gpt2": _gpt2_blocks, "gpt_neox": _neox_blocks}.get(model_type, _rotary_blocks)
    blocks = build(decoder, config, FAMILIES[model_type])
    parallel = all(isinstance(block.attention, Beside) for block in blocks)
    return Model(
        name=name,
        architecture=model_type,
        blocks=blocks,
        final_norm=_final_norm(decoder, model_type, name),
        W_E=embedding.weight.detach(),
        W_U=head.weight.detach(),
        b_U=_bias(head),
        embed_scale=1.0 if scale is None else float(torch.as_tensor(scale).to(embedding.weight.dtype)),
        position_embedding=decoder.wpe.weight.detach() if model_type == "gpt2" else None,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        convention="raw lm_head",
        tokenizer=tokenizer,
        source=source,
        linearisation="hand-written",
        has_submodules=not parallel,
        parallel=parallel,
    )


FINAL_NORMS = ("ln_f", "norm", "final_layernorm", "final_layer_norm")


def _final_norm(decoder: Any, model_type: str, name: str) -> Norm:
    module = next((getattr(decoder, n) for n in FINAL_NORMS if hasattr(decoder, n)), None)
    if module is None:
        raise UnsupportedModelError(f"model {name!r}: {type(decoder).__name__} has none of {', '.join(FINAL_NORMS)}")
    if "RMS" not in type(module).__name__:
        return _layer_norm(module)
    return _rms_norm(module, FAMILIES[model_type].norm_offset if model_type in FAMILIES else 0.0)


def _decoder(source: Any) -> Any:
    """The module that holds the blocks, under whatever wrappers the checkpoint has."""
    decoder = source
    while True:
        for name in ("transformer", "model", "language_model", "gpt_neox"):
            if hasattr(decoder, name):
                decoder = getattr(decoder, name)
                break
        else:
            return decoder


def activation_named(name: str) -> Activation:
    from transformers.activations import ACT2FN

    # gelu_new is the same function in six kernels; the other is one.
    return ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _layer_norm(module: Any) -> Norm:
    weight = getattr(module, "weight", None)
    return Norm(None if weight is None else weight.detach(), _bias(module), module.eps, centred=True)


def _rms_norm(module: Any, offset: float) -> Norm:
    weight = stored = module.weight.detach()
    if offset:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    eps = getattr(module, "eps", None)
    return Norm(weight, None, module.variance_epsilon if eps is None else eps, False, stored)


def _gpt2_blocks(decoder: Any, config: Any, family: Family) -> list[Block]:
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
            activation=activation_named(config.activation_function),
        )
        blocks.append(Block(attention, mlp))
    return blocks


def _rotary_blocks(decoder: Any, config: Any, family: Family) -> list[Block]:
    def norm(module: Any) -> Norm:
        return _rms_norm(module, family.norm_offset)

    def optional(module: Any, name: str) -> AnyNorm:
        return norm(getattr(module, name)) if hasattr(module, name) else IDENTITY

    after = family.post_norms
    activation = activation_named(getattr(config, "hidden_activation", None) or config.hidden_act)
    slides = family.windowed and getattr(config, "sliding_window", None) is not None
    usual = "sliding_attention" if slides else "full_attention"
    kinds = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
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
            # Gemma 3's config has it too, but transformers applies Gemma 2's alone.
            softcap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
            window=config.sliding_window if kind == "sliding_attention" else None,
            rotary=_rotary(decoder.rotary_emb, kind),
        )
        before = norm(getattr(layer, family.mlp_norm))
        if hasattr(m, "experts"):
            blocks.append(Block(attention, _mixture(m, before, activation)))
            continue
        mlp = MLP(
            norm=before,
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
    return blocks


def _rotary(module: Any, kind: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, positions) → (cos, sin), by the model's own module; Gemma 3 keeps one frequency table per layer type."""
    per_kind = hasattr(module, f"{kind}_inv_freq")
    rope = getattr(module, "rope_type", "default")
    rope = rope.get(kind, "default") if isinstance(rope, dict) else rope
    if rope in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"rotary positions of type {rope!r} change with the longest sequence seen, so no one transport has them; "
            "set another rope type in the config"
        )

    def angles(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return module(x, positions, kind) if per_kind else module(x, positions)

    return angles


def _mixture(module: Any, norm: AnyNorm, activation: Activation) -> Mixture:
    gates, ups = module.experts.gate_up_proj.detach().chunk(2, dim=1)
    return Mixture(
        norm=norm,
        router=module.gate.weight.detach(),
        gates=gates,
        ups=ups,
        downs=module.experts.down_proj.detach(),
        top_k=module.gate.top_k,
        normalised=module.gate.norm_topk_prob,
        activation=activation,
    )


def _neox_blocks(decoder: Any, config: Any, family: Family) -> list[Block]:
    """GPT-NeoX (Pythia): one matrix holds each head's query, key and value in turn; rotary on part of a head."""
    heads, width = config.num_attention_heads, config.hidden_size
    blocks = []
    for layer in decoder.layers:
        a = layer.attention
        # [H, 3, E, D]: each head's query, key and value rows are consecutive.
        weights = a.query_key_value.weight.detach().view(heads, 3, width // heads, width).unbind(1)
        bias = _bias(a.query_key_value)
        biases = (None,) * 3 if bias is None else bias.view(heads, 3, width // heads).unbind(1)
        attention = Attention(
            norm=_layer_norm(layer.input_layernorm),
            W_Q=weights[0].flatten(0, 1),
            W_K=weights[1].flatten(0, 1),
            W_V=weights[2].flatten(0, 1),
            W_O=a.dense.weight.detach(),
            b_Q=None if biases[0] is None else biases[0].flatten(),
            b_K=None if biases[1] is None else biases[1].flatten(),
            b_V=None if biases[2] is None else biases[2].flatten(),
            b_O=_bias(a.dense),
            q_norm=IDENTITY,
            k_norm=IDENTITY,
            post_norm=IDENTITY,
            n_heads=heads,
            n_kv_heads=heads,
            scale=a.scaling,
            softcap=None,
            window=None,
            rotary=_rotary(decoder.rotary_emb, "full_attention"),
        )
        mlp = MLP(
            norm=_layer_norm(layer.post_attention_layernorm),
            W_in=layer.mlp.dense_h_to_4h.weight.detach(),
            b_in=_bias(layer.mlp.dense_h_to_4h),
            W_gate=None,
            b_gate=None,
            W_out=layer.mlp.dense_4h_to_h.weight.detach(),
            b_out=_bias(layer.mlp.dense_4h_to_h),
            post_norm=IDENTITY,
            activation=activation_named(config.hidden_act),
        )
        if config.use_parallel_residual:
            blocks.append(Block(Beside(attention, mlp), Nothing("the MLP beside the attention", True, mlp.width)))
        else:
            blocks.append(Block(attention, mlp))
    return blocks
