"""Tiny configurations of transformers' causal LMs, with the traits that set each family apart; random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCAB, D_MODEL, LAYERS = 61, 24, 3
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
HEADS = COMMON | {"head_dim": 8}
GPT = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
GPT |= {"bos_token_id": 1, "eos_token_id": 1}
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def without(*names: str) -> dict[str, Any]:
    return {k: v for k, v in COMMON.items() if k not in names}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


DEEPSEEK = without("num_key_value_heads") | {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "gpt_neox_parallel": ("GPTNeoXConfig", without("num_key_value_heads") | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", without("num_key_value_heads") | {"use_parallel_residual": False}),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        without("num_key_value_heads", "num_hidden_layers", "num_attention_heads")
        | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 3},
    ),
    "opt": ("OPTConfig", without("num_key_value_heads") | {"ffn_dim": 40, "word_embed_proj_dim": D_MODEL}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_layer": LAYERS, "n_head": 4}),
    "falcon_parallel": ("FalconConfig", without("num_key_value_heads") | {"new_decoder_architecture": False}),
    "falcon_new": (
        "FalconConfig",
        without("num_key_value_heads") | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_alibi": ("FalconConfig", without("num_key_value_heads") | {"alibi": True, "parallel_attn": False}),
    "codegen": ("CodeGenConfig", GPT | {"rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "mpt": (
        "MptConfig",
        {"d_model": D_MODEL, "n_heads": 4, "n_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": 64},
    ),
    "phi": ("PhiConfig", COMMON | {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "phi3": ("Phi3Config", COMMON),
    "stablelm": ("StableLmConfig", COMMON),
    "stablelm_parallel": ("StableLmConfig", COMMON | {"use_parallel_residual": True}),
    "llama": ("LlamaConfig", HEADS),
    "llama_linear": ("LlamaConfig", HEADS | rope("linear", factor=2.0)),
    "llama_yarn": ("LlamaConfig", HEADS | rope("yarn", factor=2.0, original_max_position_embeddings=16)),
    "llama_llama3": (
        "LlamaConfig",
        HEADS
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama_longrope": (
        "LlamaConfig",
        HEADS | rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=32),
    ),
    "mistral": ("MistralConfig", HEADS | {"sliding_window": 3}),
    "ministral": ("MinistralConfig", HEADS | SLIDING),
    "mixtral": ("MixtralConfig", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", HEADS),
    "gemma2": ("Gemma2Config", HEADS | SLIDING | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", HEADS | SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma4": (
        "Gemma4TextConfig",
        HEADS
        | SLIDING
        | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    ),
    "gemma4_shared": (
        "Gemma4TextConfig",
        HEADS
        | SLIDING
        | {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        HEADS | SLIDING | {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB},
    ),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen2_moe": ("Qwen2MoeConfig", COMMON | EXPERTS | {"shared_expert_intermediate_size": 20}),
    "qwen3": ("Qwen3Config", HEADS),
    "qwen3_moe": ("Qwen3MoeConfig", HEADS | EXPERTS),
    "qwen3_next": ("Qwen3NextConfig", HEADS | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 20}),
    "qwen3_5": ("Qwen3_5TextConfig", HEADS | LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", HEADS | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 20}),
    "olmo": ("OlmoConfig", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    "olmo3": ("Olmo3Config", COMMON | SLIDING),
    "olmoe": ("OlmoeConfig", COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", HEADS | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("GlmConfig", HEADS),
    "glm4": ("Glm4Config", HEADS),
    "exaone4": ("Exaone4Config", HEADS | SLIDING),
    "granite": (
        "GraniteConfig",
        COMMON
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.5,
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.7},
    ),
    "cohere": ("CohereConfig", COMMON | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", COMMON | SLIDING | {"logit_scale": 0.25}),
    "smollm3": ("SmolLM3Config", COMMON),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK),
    "nemotron": ("NemotronConfig", HEADS),
    "jetmoe": (
        "JetMoeConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": D_MODEL,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 40,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "state_size": 4, "expand": 2},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": VOCAB,
            "hidden_size": D_MODEL,
            "num_hidden_layers": LAYERS,
            "state_size": 4,
            "expand": 2,
            "num_heads": 6,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    "falcon_mamba": (
        "FalconMambaConfig",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "state_size": 4, "expand": 2},
    ),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "context_length": 64},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        HEADS | {"lru_width": D_MODEL, "attention_window_size": 3, "num_hidden_layers": 3},
    ),
    "lfm2": ("Lfm2Config", COMMON | {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 40}),
    "falcon_h1": (
        "FalconH1Config",
        HEADS
        | {
            "mamba_d_ssm": 48,
            "mamba_n_heads": 6,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_chunk_size": 4,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
        },
    ),
    "bamba": (
        "BambaConfig",
        COMMON
        | {
            "mamba_n_heads": 6,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_chunk_size": 4,
            "attn_layer_indices": [1],
        },
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "vocab_size": VOCAB,
            "d_model": D_MODEL,
            "n_heads": 4,
            "n_layers": LAYERS,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": D_MODEL, "ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "starcoder2": ("Starcoder2Config", COMMON),
    "persimmon": ("PersimmonConfig", without("num_key_value_heads") | {"num_attention_heads": 3}),
    "biogpt": ("BioGptConfig", without("num_key_value_heads")),
    "llama4": (
        "Llama4TextConfig",
        HEADS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
        },
    ),
    "ernie4_5": ("Ernie4_5Config", HEADS),
    "seed_oss": ("SeedOssConfig", HEADS),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", HEADS),
    "helium": ("HeliumConfig", COMMON | {"head_dim": 6}),
    "arcee": ("ArceeConfig", HEADS),
    "diffllama": ("DiffLlamaConfig", HEADS),
    "bitnet": ("BitNetConfig", COMMON),
    "minimax": (
        "MiniMaxConfig",
        HEADS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 4,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        HEADS
        | {
            "mamba_headdim": 8,
            "mamba_d_state": 4,
            "n_mamba_heads": 6,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "chunk_size": 4,
        },
    ),
    "gpt": ("OpenAIGPTConfig", GPT),
    "ctrl": (
        "CTRLConfig",
        {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4, "dff": 40, "n_positions": 64},
    ),
}


MANY_EXPERTS = EXPERTS | {
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "shared_expert_intermediate_size": 20,
}
DECODER = without("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads") | {
    "d_model": D_MODEL
}
DECODER |= {"decoder_layers": LAYERS, "encoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 40}
DECODER |= {"encoder_attention_heads": 4, "encoder_ffn_dim": 40}
ALIKE: tuple[tuple[dict[str, Any], str], ...] = (
    (
        COMMON,
        "apertus aria_text beam cohere2_moe cwm doge exaone flex_olmo gpt_neox_japanese granite_swa granitemoe_swa "
        "granitemoeshared hyperclovax internlm3 iquestcoder jais2 lfm3 ministral3 modernbert-decoder nanochat "
        "olmo_hybrid phimoe vaultgemma",
    ),
    (
        HEADS | MANY_EXPERTS,
        "afmoe dots1 ernie4_5_moe exaone_moe flint glm4_moe hunyuan_v1_moe hy_v3 kolibri1 laguna mellum mimo_v2_flash "
        "minimax_m2 sarvam_moe solar_open",
    ),
    (HEADS | MANY_EXPERTS | SLIDING, "inkling_text lara_mini"),
    (HEADS | MANY_EXPERTS | {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * LAYERS}, "zaya"),
    (HEADS | MANY_EXPERTS | {"layer_types": ["conv", "full_attention", "conv"]}, "lfm2_moe"),
    (DEEPSEEK, "axk1 axk2 glm4_moe_lite glm_moe_dsa minicpm3 sarvam_mla youtu"),
    (
        {k: v for k, v in (DEEPSEEK | MANY_EXPERTS).items() if k != "num_hidden_layers"}
        | {"head_dim": 4, "qk_head_dim": 8, "num_layers": LAYERS},
        "longcat_flash",
    ),
    (DECODER, "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper"),
    (
        without("num_key_value_heads") | {"is_decoder": True},
        "bert bert-generation big_bird electra ernie megatron-bert rembert roberta roc_bert roformer",
    ),
    (
        HEADS
        | MANY_EXPERTS
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "jamba",
    ),
    ({"vocab_size": VOCAB, "d_model": D_MODEL, "num_layers": LAYERS, "attention_heads": 4, "ffn_dim": 40}, "xglm"),
)
"""Settings that several model types share."""
FAMILIES |= {name: (CONFIG_MAPPING_NAMES[name], settings) for settings, names in ALIKE for name in names.split()}
IN_FLOAT32 = ("xglm",)
"""Their own forward pass fails in float64."""


def tiny(name: str, seed: int = 0) -> Any:
    """A random model of the family in float64, weights large enough that every term of the Jacobian counts."""
    kind, settings = FAMILIES[name]
    config = getattr(transformers, kind)(**settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.ndim > 1 and "conv" not in weight_name and "A_log" not in weight_name:
                weight.copy_(torch.randn_like(weight) * 0.3)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.to(torch.float32 if name in IN_FLOAT32 else torch.float64).eval().requires_grad_(False)
