"""What tells one model from another: samples of its weights, and what it makes of a few tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from querylens_fast.models.norms import Norm, OwnNorm
from querylens_fast.models.own_layers import ATTENTION_NAMES, MLP_NAMES, child

SAMPLES = 16
SAME_BEHAVIOUR = {"float64": 1e-4, "float32": 1e-2}
"""Relative difference of two models' answers that rounding and another device explain; 0.1 in half precision."""


def fingerprint(model: Any) -> str:
    """A digest of the model's shape and of samples of its weights, the same in every dtype it is loaded in.

    A model of a known family has the same one whichever way it is linearised.
    """
    if model.linearisation == "none":
        return frame_fingerprint(model)
    if model.layout is not None:
        return fingerprint(model.layout)
    if model.own is not None:
        return _digest(model, [w.detach() for w in model.own.model.parameters()])
    weights: list[Tensor | None] = []
    for block in model.blocks:
        for part in block.parts:
            weights += part.matrices()
            for name, held in vars(part).items():
                weights += [held] if name.startswith("b_") else _norm_weights(held)
    return _digest(model, weights)


def frame_fingerprint(model: Any) -> str:
    """A digest of embedding, unembedding and final norm alone: what a model read without its layers has."""
    return f"frame:{_digest(model, [])[:26]}"


def earlier_fingerprints(model: Any) -> list[str]:
    """What the versions before this one called the same model under autodiff."""
    if model.own is None:
        return []
    weights: list[Tensor | None] = []
    for layer in model.own.layers:
        for names in (ATTENTION_NAMES, MLP_NAMES):
            name = child(layer, names)
            if name is not None:
                held = [w.detach() for w in getattr(layer, name).parameters()]
                weights += [w.flatten(0, -2) if w.ndim > 1 else w[None] for w in held]
    return [_digest(model, weights)]


def _digest(model: Any, of_layers: list[Tensor | None]) -> str:
    digest = hashlib.sha256(f"{model.n_layers},{model.d_model},{model.vocab_size}".encode())
    frame = [model.raw_embedding, model.W_U, model.b_U, model.position_embedding, *_norm_weights(model.final_norm)]
    for weight in (*frame, *of_layers):
        # Skip all-zero biases: hooked models store zeros where transformers stores None.
        if weight is None or (weight.ndim == 1 and not bool(weight.any())):
            continue
        matrix = weight[None] if weight.ndim == 1 else weight.reshape(-1, weight.shape[-1])
        rows, columns = (
            torch.linspace(0, n - 1, SAMPLES, device=matrix.device).long() for n in (matrix.shape[0], matrix.shape[1])
        )
        sample = matrix[rows][:, columns].to(torch.float32).to(torch.bfloat16).float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _norm_weights(norm: Any) -> list[Tensor | None]:
    """A norm's scale, as the checkpoint has it, and its bias; nothing for what is no norm."""
    if not isinstance(norm, Norm | OwnNorm):
        return []
    return [norm.weight if norm.stored is None else norm.stored, norm.bias]


def behaviour(logits: Tensor) -> str:
    """A few of the model's own logits [B, S, V], up to what a softmax ignores, as JSON."""
    columns = torch.linspace(0, logits.shape[-1] - 1, SAMPLES, device=logits.device).long()
    sample = logits[:, [logits.shape[1] // 2, -1]][..., columns].double()
    sample = sample - sample.mean(-1, keepdim=True)
    return json.dumps([float(f"{x:.7g}") for x in sample.flatten().tolist()])


def behaves_otherwise(recorded: str, dtype: str, model: Any) -> float | None:
    """The relative difference of recorded answers (of a model in ``dtype``) from the model's, if rounding is less."""
    if not recorded or not model.behaviour:
        return None
    theirs, ours = (torch.tensor(json.loads(x), dtype=torch.float64) for x in (recorded, model.behaviour))
    if theirs.shape != ours.shape:
        return 1.0
    difference = float((theirs - ours).norm() / theirs.norm().clamp_min(1e-30))
    names = dtype, str(model.dtype).removeprefix("torch.")
    tolerance = max(SAME_BEHAVIOUR.get(name, 0.1) for name in names)
    return difference if difference > tolerance else None
