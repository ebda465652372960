"""Transport of chosen features by themselves, without fitted matrices, as the reference does it for every feature.

`walk_features` carries given vectors through the model, some at a time. It gives the mean vector, the exact statistics
of the paper's Table 8 (how much of the transported direction depends on context), and the first order's layer means.
For whole dictionaries `Transport.rel_var` gives the same rel_var from a quadratic form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.tokens import Tokens
from querylens_fast.transport.jacobians import (
    FEATURE_DIRECTION,
    Budget,
    Linearised,
    Order,
    Side,
    Submodule,
    batches,
    check_point,
    check_submodules,
    linearise,
    position_sum,
    sweep,
)

STATISTICS = ("N", "N_used", "E_mu", "sum_energy", "mean_energy", "sum_parallel2", "EV_mu", "perp_EV", "rel_var")


@dataclass(frozen=True)
class Walked:
    """What carrying n vectors gives: mean [n, D], statistics [n] each, and (first order) each layer's mean [n, D]."""

    mean: Tensor
    stats: dict[str, Tensor]
    layer_means: list[tuple[int, Tensor]]


Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that hold the other parts of a sample."""


def alone(tensor: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return tensor


def linearity(
    vectors: Tensor, eps: float = 1e-12, energy_eps: float = 1e-12, total: Total = alone
) -> dict[str, Tensor]:
    """The reference's statistics of n bundles of N vectors, [n, N, D] → [n] each.

    mu = E[v]; EV_mu = Σ (v·mu/‖mu‖)² / Σ ‖v‖², over the vectors with ‖v‖² > energy_eps; rel_var = 1 − ‖mu‖²/E‖v‖².
    With ``total``, over the vectors of all processes.
    """
    vectors = at_least_float32(vectors)
    n = total(torch.full(vectors.shape[:1], float(vectors.shape[1]), dtype=vectors.dtype, device=vectors.device))
    mu = total(vectors.sum(1)) / n[:, None]
    norm = mu.norm(dim=-1).clamp_min(eps)
    squares = vectors.square().sum(-1)
    used = squares > energy_eps
    along = torch.einsum("nsd,nd->ns", vectors, mu / norm[:, None])
    sum_energy = total((squares * used).sum(1))
    sum_parallel2 = total((along.square() * used).sum(1))
    n_used = total(used.sum(1).to(vectors.dtype))
    explained = (sum_parallel2 / (sum_energy + eps)).clamp(0, 1)
    mean_energy = sum_energy / n_used.clamp_min(1)
    alive = n_used > 0
    stats = {
        "N": n,
        "N_used": n_used,
        "E_mu": norm.square(),
        "sum_energy": sum_energy,
        "mean_energy": mean_energy,
        "sum_parallel2": sum_parallel2,
        "EV_mu": explained,
        "perp_EV": (1 - explained) * alive,
        "rel_var": (1 - norm.square() / (mean_energy + eps)).clamp(0, 1) * alive,
    }
    return stats


@torch.no_grad()
def walk_features(
    model: Model,
    tokens: Tokens,
    vectors: Tensor,
    point: int,
    side: Side,
    order: Order,
    *,
    layer: int | None = None,
    submodule: Submodule = "both",
    through_norms: bool = True,
    max_memory_gib: float = 2.0,
    total: Total = alone,
) -> Walked:
    """Carry vectors [n, D] through the model over every valid position of the sample.

    Args:
        model: The model.
        tokens: The sample.
        vectors: [n, D].
        point: Where they act (`Dictionary.point`).
        side: "value": forward to the end; "key": backward to the embedding.
        order: "full" or "first_order".
        layer: The features' layer, to have the first order's layer means in the reference's order.
        submodule: As in `fit_transport`.
        through_norms: As in `fit_transport`.
        max_memory_gib: Bound on the working memory.
        total: For a sample whose parts are in several processes, which call this with one vector and their own part.

    Raises:
        ValueError: A point or order that the model does not have, or max_memory_gib too small for one sequence.
    """
    check_point(model, point)
    check_submodules(model, (order,), submodule)
    budget = Budget.plan(model, tokens.ids.shape[1], max_memory_gib)
    item = torch.finfo(torch.promote_types(model.dtype, torch.float32)).bits // 8
    held = tokens.ids.numel() * model.d_model * item
    size = max(1, min(int(max_memory_gib * 2**30 / 2 // held), budget.directions))
    linearised = _Batches(model, tokens, submodule, through_norms, budget.rows)
    chunks = [
        _walk_chunk(linearised, vectors[c], point, side, order, layer, total) for c in batches(len(vectors), size)
    ]
    if not chunks:
        empty = vectors.new_zeros(0, model.d_model)
        return Walked(empty, {name: vectors.new_zeros(0) for name in STATISTICS}, [])
    labels = [label for label, _ in chunks[0].layer_means]
    return Walked(
        torch.cat([c.mean for c in chunks]),
        {name: torch.cat([c.stats[name] for c in chunks]) for name in STATISTICS},
        [(label, torch.cat([c.layer_means[i][1] for c in chunks])) for i, label in enumerate(labels)],
    )


@dataclass(frozen=True)
class _Batches:
    """The sample in batches of sequences, each linearised when it is asked for."""

    model: Model
    tokens: Tokens
    submodule: Submodule
    through_norms: bool
    rows: int

    def __iter__(self) -> Iterator[Linearised]:
        for rows in batches(len(self.tokens.ids), self.rows):
            yield linearise(self.model, self.tokens, rows, self.submodule, self.through_norms)


def _walk_chunk(
    linearised: _Batches, vectors: Tensor, point: int, side: Side, order: Order, layer: int | None, total: Total
) -> Walked:
    """Some vectors [n, D] through every batch."""
    model, tokens = linearised.model, linearised.tokens
    vectors = vectors.to(model.device, model.dtype)
    valid = tokens.valid_mask.to(model.device)
    moved, layer_sums = [], {}
    for lin in linearised:
        start = state = previous = lin.everywhere(vectors)
        for i, state in sweep(lin, start, point, FEATURE_DIRECTION[side], order):
            if layer is not None and order == "first_order":
                label = _layer_label(i, layer, side)
                term = position_sum((state if i is None else state - previous) * lin.mask)
                layer_sums[label] = layer_sums[label] + term if label in layer_sums else term
                previous = state
        moved.append(at_least_float32(state)[:, valid[lin.rows]])
    bundle = torch.cat(moved, dim=1)
    n = total(bundle.new_full((), float(tokens.n_valid)))
    means = [(label, total(own) / n) for label, own in layer_sums.items()]
    return Walked(total(bundle.sum(1)) / n, linearity(bundle, total=total), means)


def _layer_label(module: int | None, layer: int, side: Side) -> int:
    """The reference's label of a first-order term: its layer; for the identity, layer (value) or layer + 1 (key)."""
    if module is None:
        return layer if side == "value" else layer + 1
    return module // 2
