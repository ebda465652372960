"""Scores as numbers that are compared quickly: integer keys, and what an error does to the order.

A *gain* is the score on the top side and its negative on the bottom side, so that larger is better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
INTEGERS[torch.float64] = torch.int64


def keys_of(scores: Tensor, largest: bool, *, total: bool, out: Tensor | None = None) -> Tensor:
    """Integers in the order of the gains of some scores: raw, right from 0 up; or total, for all numbers."""
    keys = scores.view(INTEGERS[scores.dtype])
    info = torch.iinfo(keys.dtype)
    if not largest:
        keys = torch.bitwise_xor(keys, info.min, out=out)
    return flipped(keys) if total else keys


def flipped(keys: Tensor) -> Tensor:
    """Keys from raw to total order and back."""
    info = torch.iinfo(keys.dtype)
    return (keys >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(keys)


def moved(gains: Tensor, rounding: float, error: Tensor | None, sign: float) -> Tensor:
    """Bounds on exact gains from gains that are off by an error [..] and then rounded; sign: above or below."""
    if error is None:
        return gains
    scaled = torch.where(gains > 0, gains * (1 + rounding), gains * (1 - rounding))
    return scaled + sign * (error[:, :, None] if gains.ndim == 3 else error)


def k_best(gains: Tensor, k: int, earlier: Tensor | None = None) -> Tensor:
    """The k largest [r, k] of gains [T, r, s] and of earlier ones [r, k], in no order; -inf where there are fewer."""
    flat = gains.permute(1, 0, 2).flatten(1)
    if flat.shape[1] < k:
        flat = torch.nn.functional.pad(flat, (0, k - flat.shape[1]), value=-math.inf)
    best = flat.topk(k, dim=1, sorted=False).values
    return best if earlier is None else torch.cat([best, earlier], 1).topk(k, dim=1, sorted=False).values
