"""Partial transport: matrices from a feature's own point of the residual stream to another layer's.

A `Transport` leads to the end of the model (or back to its beginning). To meet the weights of a layer in between, a
value v written at point p must be carried to a later point q only, and a key read at p back to an earlier q:

    M_{p→q} v = (1/N) Σ_s t_q[s]   with t_p = v at every valid position and t carried by Jacobians from p to q,

with the masks and the average of `jacobians` (Query Lens, arXiv 2606.07617, §3, stopped at q). Averages of products do
not factor, M_p ≠ M_q M_{p→q}, so the full order is not contained in a fitted transport: `fit_passage` carries the D
basis directions from p once and gives every q on the way. First-order terms do add up module by module, so a transport
fitted with them carries from any point to any other (`passage_of`), and fitting them costs some forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.jacobians import (
    FEATURE_DIRECTION,
    Budget,
    Order,
    Side,
    batches,
    check_point,
    linearise,
    position_sum,
    sweep,
)
from querylens_fast.transport.transport import Transport


@dataclass(frozen=True)
class Passage:
    """Matrices [D, D] from one point to every point after it (value) or before it (key); a row v moves as v Mᵀ."""

    start: int
    side: Side
    matrices: Tensor
    """[1 + number of points passed, D, D]; the first is the identity."""
    metadata: dict[str, str]

    def apply(self, vectors: Tensor, point: int) -> Tensor:
        """Vectors [n, D] carried to ``point``, in their own dtype.

        Raises:
            ValueError: The point is not on the way.
        """
        step = point - self.start if self.side == "value" else self.start - point
        if not 0 <= step < len(self.matrices):
            way = "later" if self.side == "value" else "earlier"
            raise ValueError(f"point {point} is not on the way from point {self.start} to {way} layers")
        if step == 0:
            return vectors
        matrix = self.matrices[step].to(vectors.device)
        return (vectors.to(matrix) @ matrix.mT).to(vectors)


@torch.no_grad()
def fit_passage(
    model: Any,
    tokens: Tokens | Tensor,
    point: int,
    *,
    side: Side = "value",
    order: Order = "full",
    max_memory_gib: float = 2.0,
    progress: bool = True,
) -> Passage:
    """Fit the partial transport from one point over a token sample.

    Args:
        model: As in `fit_transport`.
        tokens: As in `fit_transport`.
        point: Where the features write or read: ``dictionary.point("value")`` or ``dictionary.point("key")``.
        side: "value": to every later point; "key": back to every earlier one.
        order: "full", or "first_order".
        max_memory_gib: Bound on the working memory beside the result (D² numbers a point).
        progress: Show a progress bar.

    Cost: D directions through the modules on that side of the point; some forward passes for the first order.

    Raises:
        ValueError: An unknown side or order, a point outside the model (or in the middle of a layer that is opaque), or
            max_memory_gib too small for one sequence.
    """
    model = as_model(model)
    tokens = as_tokens(tokens, model)
    if side not in FEATURE_DIRECTION or order not in ("full", "first_order"):
        raise ValueError(f"side is {side!r} and order {order!r}; expected value or key, and full or first_order")
    check_point(model, point)
    if order == "first_order":
        fitted = fit_transport(
            model, tokens, sides=(side,), orders=(order,), max_memory_gib=max_memory_gib, progress=progress
        )
        return passage_of(fitted, point, side)
    metadata = {
        "order": order,
        "side": side,
        "start": str(point),
        **model.identity,
        "n_valid": str(tokens.n_valid),
        "tokens": tokens.source,
        "tokens_digest": tokens.digest,
    }
    return Passage(
        point, side, _full_sums(model, tokens, point, side, max_memory_gib, progress) / tokens.n_valid, metadata
    )


def _full_sums(model: Model, tokens: Tokens, point: int, side: Side, max_memory_gib: float, progress: bool) -> Tensor:
    """N times the matrices from a point to every point on the way, [1 + points passed, D, D]."""
    d, direction = model.d_model, FEATURE_DIRECTION[side]
    n_passed = 2 * model.n_layers - point if direction == "forward" else point
    wide = torch.promote_types(model.dtype, torch.float32)
    total = torch.zeros(n_passed + 1, d, d, dtype=wide, device=model.device)
    budget = Budget.plan(model, tokens.ids.shape[1], max_memory_gib)
    basis = torch.eye(d, dtype=model.dtype, device=model.device)
    n_batches = -(-len(tokens.ids) // budget.rows)
    with tqdm(total=n_batches * d, desc=f"from point {point}", unit="direction", disable=not progress) as bar:
        for rows in batches(len(tokens.ids), budget.rows):
            lin = linearise(model, tokens, rows)
            for chosen in batches(d, budget.directions):
                for step, (_, state) in enumerate(sweep(lin, lin.everywhere(basis[chosen]), point, direction)):
                    total[step, :, chosen] += position_sum(state).mT
                bar.update(chosen.stop - chosen.start)
    return total


def passage_of(transport: Transport, point: int, side: Side) -> Passage:
    """The first-order passage from a point: I + Σ of the fitted terms of the modules on the way.

    Raises:
        ValueError: The transport was fitted without that side's first order.
    """
    if (side, "first_order") not in transport.matrices:
        raise ValueError(
            f"this transport has no first-order terms of the {side} side, which carry to a layer in between: fit it "
            "with orders=('first_order',), or pass fit_passage(model, tokens, point) for the full order"
        )
    terms = transport.matrices[side, "first_order"]
    on_the_way = terms[point:] if side == "value" else terms[:point].flip(0)
    identity = torch.eye(terms.shape[-1], dtype=terms.dtype, device=terms.device)[None]
    matrices = identity + torch.cat([torch.zeros_like(identity), on_the_way.cumsum(0)])
    return Passage(point, side, matrices, {**transport.metadata, "order": "first_order"})


def find_passage(given: Passage | Transport | None, model: Model, point: int, side: Side) -> Passage | None:
    """What carries the features of a point: the passage given, a transport's first-order one, or None.

    Raises:
        ValueError: It belongs to another model, point or side.
    """
    if given is None:
        return None
    if isinstance(given, Transport):
        given.check_model(model)
        return passage_of(given, point, side)
    if model.difference_from(given.metadata) is not None:
        raise ValueError(f"this passage was fitted on another model than {model.name!r}")
    if (given.start, given.side) != (point, side):
        raise ValueError(
            f"this passage is of the {given.side} side from point {given.start}, but the features' {side}s act at "
            f"point {point}; fit it with fit_passage(model, tokens, {point}, side={side!r})"
        )
    return given
