"""The model inside what users pass in: compiled, parallel, nnsight, nnterp and TransformerBridge objects."""

from __future__ import annotations

from typing import Any

from torch import nn

from querylens_fast.models.errors import UnsupportedModelError


def unwrap(model: Any) -> Any:
    """The model that a wrapper holds, or ``model`` itself.

    Raises:
        UnsupportedModelError: A TransformerBridge whose weights were processed in place.
    """
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def _inner(model: Any) -> Any:
    held = {} if isinstance(model, type) else getattr(model, "__dict__", {})
    modules = held.get("_modules", {})
    if "_orig_mod" in modules:  # torch.compile
        return modules["_orig_mod"]
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    bridged = modules.get("original_model", held.get("original_model"))
    if isinstance(bridged, nn.Module):
        if _processed(model):
            raise UnsupportedModelError(
                f"model is a {type(model).__name__} whose weights were processed in place (norms folded, matrices "
                "centred), so its head is no raw lm_head; pass the bridge as boot_transformers made it (or with "
                "enable_compatibility_mode(no_processing=True)), or the transformers model"
            )
        return bridged
    if any(c.__module__.partition(".")[0] in ("nnsight", "nnterp") for c in type.mro(type(model))):
        for name in ("_model", "_module"):
            inner = held.get(name)
            if isinstance(inner, nn.Module):
                return inner
    return None


def _processed(bridge: Any) -> bool:
    """Whether a TransformerBridge says that its weights are no longer the checkpoint's."""
    said = getattr(bridge, "_weights_processed", None)
    return bool(getattr(bridge, "compatibility_mode", False) if said is None else said)
