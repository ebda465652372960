"""Checks of a loaded model: its weights are finite, and its logits are the source's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.own_layers import probe_ids

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}
"""Relative difference of the logits that rounding explains; 0.1 in half precision."""


def check_finite_weights(model: Model) -> None:
    """Raise ValueError when a weight holds NaN or inf."""
    named = [("embedding", model.W_E), ("unembedding", model.W_U)]
    if model.own is not None:
        named += [(f"layer {i} {n}", w) for i, m in enumerate(model.own.layers) for n, w in m.named_parameters()]
    for layer, block in enumerate(model.blocks if model.own is None else ()):
        for part in block.parts:
            tensors = [(n, w) for n, w in vars(part).items() if isinstance(w, Tensor)]
            tensors = tensors or [(f"matrix {i} of {type(part).__name__}", w) for i, w in enumerate(part.matrices())]
            named += [(f"layer {layer} {n}", w) for n, w in tensors]
    for name, weight in named:
        if not torch.isfinite(weight).all():
            count = int((~torch.isfinite(weight)).sum())
            raise ValueError(f"model {model.name!r}: {name} holds {count} NaN or infinite values; reload its weights")


def raise_not_finite(source: nn.Module, layout: Model | None, name: str) -> None:
    """Raise ValueError for a model whose logits hold NaN or inf, naming the weight that does where one does."""
    if layout is not None:
        check_finite_weights(layout)
    for path, weight in source.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"model {name!r}: {path} holds NaN or infinite values; reload its weights")
    raise ValueError(f"model {name!r}: its logits hold NaN or infinite values in {weight.dtype}; use float32")


def check_reproduction(model: Model, theirs: Tensor) -> None:
    """Compare our logits with the source's own, ``theirs`` [B, S, V], on the probe's tokens.

    Raises:
        UnsupportedModelError: They differ by more than rounding, so some variation is not covered.
    """
    ids = probe_ids(len(model.W_E), model.device)
    ours = at_least_float32(model.logits(model.residuals(ids)[2]))
    tolerance = TOLERANCE.get(model.dtype, 0.1)
    difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"model {model.name!r} ({model.architecture}) has a variation this package does not reproduce: its logits "
            f"differ from the model's own by {difference:.2e} (relative), more than the {tolerance:.0e} that rounding "
            "explains; please report its config"
        )
