"""Downstream: which weights or features read what a feature writes, along the direct path.

The product is value · reader for every feature and every row of the targets, read out by the same streamed top-k as the
signatures: features × features gives virtual weights, features × W_in the neurons a feature drives.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from querylens_fast.dictionaries import Dictionary
from querylens_fast.models import Model, as_model
from querylens_fast.norms import AnyNorm, Norm
from querylens_fast.ops import TopK, streamed_topk
from querylens_fast.sources import load_dictionary

_WEIGHT = re.compile(r"^blocks\.(\d+)\.(attn|mlp)\.(W_Q|W_K|W_V|W_in|W_gate)$")


def downstream(
    dictionary: Any,
    model: Any,
    *,
    targets: Dictionary | str | Tensor,
    k: int = 32,
    features: Any = None,
    backend: str = "auto",
) -> TopK:
    """The k strongest positive and negative readers of each feature's value vector.

    Args:
        dictionary: As in `signatures`; its values are what is written.
        model: As in `signatures`.
        targets: A `Dictionary` (its keys read); a weight "blocks.{layer}.mlp.W_in" (or W_gate, attn.W_Q, attn.W_K,
            attn.W_V), each of whose rows reads the stream through its norm, whose scale (and centring) is folded in; or
            any matrix of readers [V, D].
        k: Readers on each side.
        features: As in `signatures`.
        backend: Of the streamed top-k.

    Returns:
        `TopK`: ids are rows of the targets, scores ⟨value, reader⟩; for attention weights row h·E + e is head h.

    Raises:
        ValueError: Unknown target, a target before the feature's own point, or widths that do not agree.
    """
    model, dictionary = as_model(model), load_dictionary(dictionary)
    dictionary.check_model(model)
    readers, point = _readers(model, targets)
    if point is not None and point < dictionary.point("value"):
        raise ValueError(f"targets lie before layer {dictionary.layer}'s {dictionary.name!r}: nothing there reads it")
    values = dictionary.values(dictionary.select(features)).to(model.device, model.dtype)
    return streamed_topk(values, readers.to(values), k, backend=backend)


def _readers(model: Model, targets: Dictionary | str | Tensor) -> tuple[Tensor, int | None]:
    """(readers [V, D], the point they read at)."""
    if isinstance(targets, Tensor):
        return targets, None
    if isinstance(targets, Dictionary):
        targets.check_model(model)
        return targets.keys(slice(None)), targets.point("key")
    match = _WEIGHT.match(targets)
    layer = int(match.group(1)) if match else -1
    if match is None or layer >= model.n_layers:
        raise ValueError(
            f"targets is {targets!r}; expected a Dictionary, a matrix, or a weight of layers 0 to {model.n_layers - 1} "
            "like 'blocks.3.mlp.W_in' (W_in, W_gate) or 'blocks.3.attn.W_Q' (W_Q, W_K, W_V)"
        )
    block = model.blocks[layer]
    part = block.attention if match.group(2) == "attn" else block.mlp
    weight = getattr(part, match.group(3), None)
    if weight is None:
        raise ValueError(f"targets is {targets!r}, but {model.name!r} has no such weight")
    return _through_norm(part.norm, weight), 2 * layer + (match.group(2) == "mlp")


def _through_norm(norm: AnyNorm, weight: Tensor) -> Tensor:
    """Rows that read the stream as the weight reads the normed stream, up to the norm's scale at a position."""
    if not isinstance(norm, Norm):
        return weight
    scaled = weight if norm.weight is None else weight * norm.weight.to(weight)
    return scaled - scaled.mean(-1, keepdim=True) if norm.centred else scaled
