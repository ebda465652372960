"""Ablations: token_change and zero_out, the model run with the dictionary spliced in.

The reference sets one feature's activation to a value at every position, runs the model twice for each feature, and
averages the logits' difference over all positions, pads included. Here one clean pass serves every feature: the
spliced output changes by (value − activation) · decoder row, only the layers above are run again, for many features
at once, and since the unembedding is linear the mean over positions is taken before it: each feature ends as one
vector [D], read out by `streamed_topk`. (A model with a soft cap on its logits has to go through the logits.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.lens.splice import encoder_at, run_from, splice
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.tokens import Tokens
from querylens_fast.transport.jacobians import Budget, batches


@torch.no_grad()
def ablate(
    model: Model,
    tokens: Tokens,
    dictionary: Dictionary,
    features: Tensor,
    value: float,
    invert_sign: bool = False,
    max_memory_gib: float = 2.0,
) -> Tensor:
    """Mean change when each feature's activation is set to ``value`` everywhere (paper §4 baselines).

    Args:
        model: The model.
        tokens: The sample; every position counts, pads included, and no padding mask is used.
        dictionary: A SAE or transcoder that can be run, or MLP neurons.
        features: Feature ids [n].
        value: The activation they are set to (token_change: 10; zero_out: 0).
        invert_sign: clean − changed instead of changed − clean (zero_out).
        max_memory_gib: Bound on the working memory.

    Returns:
        Differences of normed final residuals [n, D], to be read out by W_U; for a model with a logit soft cap,
        differences of logits [n, V].
    """
    budget = Budget.plan(model, tokens.ids.shape[1], max_memory_gib)
    width = model.d_model if model.logit_softcap is None else model.vocab_size
    dtype = torch.promote_types(model.dtype, torch.float32)
    total = torch.zeros(len(features), width, dtype=dtype, device=model.device)
    for rows in batches(len(tokens.ids), budget.rows):
        ids = tokens.ids[rows].to(model.device)
        spliced = splice(model, dictionary, ids)
        clean = run_from(model, spliced.clean(), spliced.point, ids)[0]
        for chosen in batches(len(features), budget.directions):
            changed = spliced.changed(features[chosen].to(model.device), value)
            for i, residual in zip(
                range(chosen.start, chosen.stop), run_from(model, changed, spliced.point, ids), strict=True
            ):
                total[i] += _output_sum(model, residual, clean)
    mean = total / tokens.ids.numel()
    return -mean if invert_sign else mean


@torch.no_grad()
def activations(model: Model, dictionary: Dictionary, ids: Tensor) -> Tensor:
    """The activations [B, S, n] of a dictionary's features on ids [B, S], from a plain forward pass."""
    return splice(model, dictionary, ids).acts


@torch.no_grad()
def activations_by_position(model: Model, dictionary: Dictionary, ids: Tensor, positions: int) -> Iterator[Tensor]:
    """`activations`, ``positions`` of the S positions at a time, [B, P, n] each: all of them are never held."""
    encode = encoder_at(model, dictionary, ids)
    for part in batches(ids.shape[1], positions):
        yield encode(part)


def _output_sum(model: Model, changed: Tensor, clean: Tensor) -> Tensor:
    """Σ over positions of the change in normed residuals, or in logits where they are capped."""
    normed, reference = (model.final_norm(x) for x in (changed, clean))
    if model.logit_softcap is None:
        return at_least_float32(normed - reference).sum((0, 1))
    total = torch.zeros(model.vocab_size, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
    for now, before in zip(normed, reference, strict=True):
        total += at_least_float32(model.cap(model.unembed(now)) - model.cap(model.unembed(before))).sum(0)
    return total
