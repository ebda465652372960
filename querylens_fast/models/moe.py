"""Mixtures of experts: an MLP whose positions go through a few gated experts each, chosen by a router.

The Jacobian **holds the routing of the forward pass fixed: which experts a position goes to, and their weights**. A
router's choice has no derivative, and its weights' derivative would mix every expert's size into a feature's effect;
with both fixed the layer is a sum of MLPs, each over its own positions. So it leaves out the term Σ_e (∂w_e/∂x) E_e(x).
The residuals themselves come from the model's own routing.

Axes: C directions, B sequences, S positions, D d_model, X experts, N neurons of one, P positions of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
import torch.nn.functional as nnf
from torch import Tensor

from querylens_fast.models.blocks import Activation, with_slope
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.norms import IDENTITY, AnyLinearNorm, AnyNorm


class NoSingleWeights:
    """A part without the weights of a plain MLP or attention; asking for one is an error that says so."""

    name: str

    def refuse(self, attribute: str) -> NoReturn:
        """Raise UnsupportedModelError for a weight that is not there."""
        raise UnsupportedModelError(
            f"{self.name} has no single {attribute}: MLP neurons, weights as downstream targets and the "
            "module-by-module functions of querylens_fast.analysis need a plain MLP or attention"
        )

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith(("W_", "b_")) or attribute in ("hidden", "project", "norm", "post_norm"):
            self.refuse(attribute)
        raise AttributeError(attribute)


@dataclass(frozen=True)
class Mixture(NoSingleWeights):
    """A sparse mixture of gated MLPs, as in Qwen 3 MoE.

    router [X, D]; gates and ups [X, N, D]; downs [X, D, N]. A position goes to its ``top_k`` experts by softmax of the
    router's logits (float32 or wider), with those probabilities as weights, divided by their sum if ``normalised``.
    """

    norm: AnyNorm
    router: Tensor
    gates: Tensor
    ups: Tensor
    downs: Tensor
    top_k: int
    normalised: bool
    activation: Activation
    name: str = "a mixture of experts"
    post_norm: AnyNorm = IDENTITY
    routed: ClassVar[bool] = True
    adds_directly: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Neurons that one position goes through."""
        return self.top_k * self.ups.shape[1]

    def matrices(self) -> list[Tensor]:
        """The weights that tell one model from another."""
        return [self.router, *(w.flatten(0, 1) for w in (self.gates, self.ups, self.downs))]

    def route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, experts), each [P, top_k], of normed positions [P, D]; constants to autodiff."""
        wide = torch.promote_types(normed.dtype, torch.float32)
        probabilities = torch.softmax(nnf.linear(normed, self.router), dim=-1, dtype=wide)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(normed.dtype).detach(), chosen

    def __call__(self, x: Tensor) -> Tensor:
        """The residual contribution of x [..., D]."""
        return self.linearise(x.reshape(1, -1, x.shape[-1])).output.view(x.shape)

    def linearise(self, x: Tensor, through_norms: bool = True) -> LinearMixture:
        """The mixture and its Jacobian at x [B, S, D], the routing held fixed."""
        normed = self.norm(x).flatten(0, 1)
        weights, chosen = self.route(normed)
        output, parts = torch.zeros_like(normed), []
        for expert in chosen.unique().tolist():
            at, place = torch.where(chosen == expert)
            up, gate = normed[at] @ self.ups[expert].mT, normed[at] @ self.gates[expert].mT
            opened, slope = with_slope(self.activation, gate)
            share = weights[at, place, None]
            output.index_add_(0, at, (opened * up) @ self.downs[expert].mT * share)
            parts.append(LinearExpert(expert, at, by_up=opened * share, by_gate=slope * up * share))
        norm = self.norm.linearise(x) if through_norms else IDENTITY
        return LinearMixture(self, output.view(x.shape), norm, parts)


@dataclass(frozen=True)
class LinearExpert:
    """One expert at the positions ``at`` [P] it serves: ∂hidden/∂up and ∂hidden/∂gate [P, N], times its weight."""

    index: int
    at: Tensor
    by_up: Tensor
    by_gate: Tensor


@dataclass(frozen=True)
class LinearMixture:
    """The mixture's Jacobian at one batch of residuals, the routing held fixed."""

    weights: Mixture
    output: Tensor
    norm: AnyLinearNorm
    experts: list[LinearExpert]

    def jvp(self, t: Tensor) -> Tensor:
        """J t for t [C, B, S, D]."""
        w, flat = self.weights, self.norm.jvp(t).flatten(1, 2)
        out = torch.zeros_like(flat)
        for expert in self.experts:
            here = flat[:, expert.at]
            hidden = (here @ w.ups[expert.index].mT).mul_(expert.by_up)
            hidden.addcmul_(here @ w.gates[expert.index].mT, expert.by_gate)
            out.index_add_(1, expert.at, hidden @ w.downs[expert.index].mT)
        return out.view(t.shape)

    def vjp(self, g: Tensor) -> Tensor:
        """Jᵀ g for g [C, B, S, D]."""
        w, flat = self.weights, g.flatten(1, 2)
        back = torch.zeros_like(flat)
        for expert in self.experts:
            hidden = flat[:, expert.at] @ w.downs[expert.index]
            here = (hidden * expert.by_gate) @ w.gates[expert.index]
            back.index_add_(1, expert.at, here + (hidden * expert.by_up) @ w.ups[expert.index])
        return self.norm.vjp(back.view(g.shape))
