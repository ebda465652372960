"""Tiny real models: every supported architecture with the traits that set it apart, random weights, saved to disk."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB, D_MODEL, LAYERS = 61, 24, 3
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOWED = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=4, n_positions=32, scale_attn_by_inverse_layer_idx=True
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, **WINDOWED, use_sliding_window=True),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, tie_word_embeddings=False),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, **WINDOWED, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, **WINDOWED, query_pre_attn_scalar=16),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=3),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
}
ARCHITECTURES = tuple(CONFIGS)
_WITHOUT_HEAD_DIM = {name: value for name, value in COMMON.items() if name != "head_dim"}
BY_AUTODIFF = {
    "olmo2": lambda: transformers.Olmo2Config(**_WITHOUT_HEAD_DIM),
    "phi3": lambda: transformers.Phi3Config(**_WITHOUT_HEAD_DIM),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=40,
        use_parallel_residual=False,
    ),
}
"""Architectures without a hand-written linearisation."""


def save_tiny_model(architecture: str, folder: Path, seed: int = 0) -> Path:
    """A random model with weights large enough that every term of the Jacobian counts."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config((CONFIGS | BY_AUTODIFF)[architecture]())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = (
                1.0
                if "norm" in name and "gemma" not in architecture or name.endswith(("ln_1.weight", "ln_f.weight"))
                else 0.0
            )
            weight.copy_(centre + torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.2))
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder
