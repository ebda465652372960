"""Naive answers in float64 that never import the product."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(F: Tensor, W: Tensor, bias: Tensor | None, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """(F Wᵀ + offset) * scale + bias in float64, [n, V]."""
    s = F.double() @ W.double().T
    s = s if offset is None else s + offset.double()[:, None]
    s = s if scale is None else s * scale.double()
    return s if bias is None else s + bias.double()


def topk(scores: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Scores and ids [n, k] by a stable sort of whole rows: equal scores by id, NaN last."""
    order = torch.sort(-scores if largest else scores, dim=1, stable=True).indices[:, :k]
    return scores.gather(1, order), order
