"""Models that are refused by name before anything is computed, because their numbers would not be the model's.

Unmerged adapters, quantised weights, weights that are not in memory, models without an unembedding, encoders, and
models in training mode with dropout: each refusal says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from querylens_fast.models.errors import UnsupportedModelError

ADAPTER_PACKAGES = ("peft", "loralib", "adapters", "torchtune.modules.peft")
QUANTISERS = ("bitsandbytes", "awq", "auto_gptq", "gptqmodel", "torchao", "optimum.quanto", "quanto", "hqq", "aqlm")
NARROW = (torch.int8, torch.uint8, torch.int32, torch.qint8, torch.quint8, torch.float8_e4m3fn, torch.float8_e5m2)


def refuse_unusable(source: nn.Module, name: str) -> None:
    """Check a transformers or hooked model as it stands.

    Raises:
        UnsupportedModelError: Adapters, quantised or absent weights, several devices, an encoder, or no unembedding.
        ValueError: It is in training mode and drops out.
    """
    for reason in _reasons(source):
        raise UnsupportedModelError(f"model {name!r} ({type(source).__name__}) {reason}")
    dropping = [m for m in source.modules() if "dropout" in type(m).__name__.lower() and m.training and _rate(m) > 0]
    if source.training and (dropping or _config_dropout(source)):
        raise ValueError(
            f"model {name!r} is in training mode and drops out, so each pass differs; call .eval() on it first"
        )


def _reasons(source: nn.Module) -> Iterator[str]:
    adapters = [n for n, m in source.named_modules() if _package(m, ADAPTER_PACKAGES)]
    adapters += [n for n, _ in source.named_parameters() if "lora_" in n]
    if adapters:
        yield (
            f"has unmerged adapters ({adapters[0] or type(source).__name__}), which its own weights do not show; pass "
            "what model.merge_and_unload() returns (prompts and prefixes cannot be merged: they are not supported)"
        )
    for name, module in source.named_modules():
        if _package(module, QUANTISERS) or ".quantized" in type(module).__module__:
            kind = type(module).__name__
            yield f"has quantised weights ({name} is a {kind}); dequantise it (model.dequantize()) first"
    for name, weight in source.named_parameters():
        if weight.is_meta:
            yield (
                f"has weights that are not in memory ({name} is on the meta device: not loaded, or offloaded to disk); "
                "load it whole (nnsight: dispatch=True), or with linearisation='none'"
            )
        if weight.dtype in NARROW or not weight.is_floating_point() or type(weight.data) is not Tensor:
            kind = weight.dtype if type(weight.data) is Tensor else type(weight.data).__name__
            yield f"has quantised or distributed weights ({name} is {kind}); dequantise it (model.dequantize()) first"
    places = {str(p.device) for p in source.parameters()}
    if len(places) > 1:
        yield f"is spread over {', '.join(sorted(places))}; put it on one device"
    model: Any = source
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if "'dynamic'" in str(getattr(text, "rope_parameters", None)):
        yield (
            "has rotary positions of type 'dynamic', which change with the longest sequence seen, so no one transport "
            "has them; set another rope type in the config"
        )
    if getattr(config, "is_encoder_decoder", False):
        yield "is an encoder-decoder model: only decoders have one residual stream from token to logit"
    if "MaskedLM" in type(source).__name__:
        yield "is a masked language model: an encoder, whose positions see later tokens; load a causal language model"
    if config is not None and hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None:
        yield "has no unembedding (it was loaded without its head); load it with AutoModelForCausalLM"


def refuse_encoder(
    forward: Callable[[Tensor], Tensor], ids: Tensor, logits: Tensor, name: str, dtype: torch.dtype
) -> None:
    """Raise UnsupportedModelError when a later token changes an earlier position's logits. ``dtype``: the weights'."""
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % logits.shape[-1]
    before, after = logits[:, :-1], forward(changed).to(logits)[:, :-1]
    difference = (before - after).norm()
    if not difference <= {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 0.01) * before.norm():
        raise UnsupportedModelError(
            f"model {name!r} has a variation this package does not reproduce: it looks at later tokens, as encoders do "
            "and causal LMs do not, so a transport has no direction in it"
        )


def _package(module: nn.Module, packages: tuple[str, ...]) -> bool:
    """Whether the module's own class comes from one of the packages."""
    return type(module).__module__.startswith(packages)


def _rate(module: nn.Module) -> float:
    rate = getattr(module, "p", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0


def _config_dropout(source: nn.Module) -> bool:
    config = getattr(source, "config", None)
    names = ("attention_dropout", "attn_pdrop", "hidden_dropout", "dropout")
    return any(isinstance(getattr(config, n, None), float) and getattr(config, n) > 0 for n in names)
