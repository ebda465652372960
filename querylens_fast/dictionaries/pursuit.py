"""Matching pursuit: the activations of a dictionary whose encoder is a greedy search (Mallat & Zhang 1993)."""

from __future__ import annotations

import torch
from torch import Tensor


def matching_pursuit(
    x: Tensor,
    W_dec: Tensor,
    residual_threshold: float = 1e-2,
    max_iterations: int | None = None,
    stop_on_duplicate_support: bool = True,
) -> Tensor:
    """Activations [..., n] of x [..., D]: subtract the best matching row of W_dec [n, D] again and again.

    A position stops when its residual is shorter than ``residual_threshold`` or, with ``stop_on_duplicate_support``,
    when a step makes no further feature active; all stop after ``max_iterations`` (default: D). As sae-lens's
    MatchingPursuitSAE. Cost: a product with W_dec for each step.
    """
    residual = x.reshape(-1, x.shape[-1]).clone()
    acts = residual.new_zeros(len(residual), len(W_dec))
    running = torch.arange(len(residual), device=x.device)
    for _ in range(x.shape[-1] if max_iterations is None else max_iterations):
        if not len(running):
            break
        left = residual[running]
        best = (left @ W_dec.mT).relu().argmax(1)
        rows = W_dec[best]
        step = (left * rows).sum(1).relu()
        was_active = acts[running, best] != 0
        acts[running, best] += step
        left = left - step[:, None] * rows
        residual[running] = left
        done = torch.zeros_like(was_active)
        if stop_on_duplicate_support:
            # The set of active features is the same after a step on an active one, or of length zero.
            done |= was_active == (acts[running, best] != 0)
        if residual_threshold > 0:
            done |= left.norm(dim=1) < residual_threshold
        running = running[~done]
    return acts.unflatten(0, x.shape[:-1])
