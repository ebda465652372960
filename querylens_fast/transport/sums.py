"""Accumulators of a fit: position sums of Jacobians, added up batch by batch, divided by the positions at the end.

Full order: one sweep of the D basis directions from the far end passes every point, and the state's sum over positions
is a set of rows of N times that point's matrix. First order: each module's own term, in closed form where it has one
(`first_order`), else by carrying the basis through that module alone. Sums are kept for G disjoint groups of
sequences, in float32 or wider whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from querylens_fast.models.blocks import LinearAttention, LinearMLP
from querylens_fast.models.inside import home, output_weight
from querylens_fast.models.model import Model
from querylens_fast.transport.first_order import has_closed_form, total, total_inside
from querylens_fast.transport.jacobians import (
    FITTING_DIRECTION,
    Linearised,
    Order,
    Side,
    batches,
    position_sum,
    sweep,
)


class JacobianSums:
    """N times the matrices of every side and order asked for: (side, order) → [G, points or modules, D, D].

    And for keys inside modules, (order, module) → [G, D, W], W numbers that the module's output matrix reads.
    """

    def __init__(
        self,
        model: Model,
        sides: Sequence[Side],
        orders: Sequence[Order],
        n_directions: int,
        n_groups: int = 1,
        inside: Sequence[int] = (),
    ) -> None:
        """Args are as in `fit_transport`, but for n_directions, the basis directions carried at once, and inside, the
        numbers of modules."""
        d, modules = model.d_model, 2 * model.n_layers
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self.sides, self.orders, self.n_directions = tuple(sides), tuple(orders), n_directions
        self.basis = torch.eye(d, dtype=model.dtype, device=model.device)
        self.sums: dict[tuple[Side, Order], Tensor] = {
            (side, order): torch.zeros(
                n_groups, modules + (order == "full"), d, d, dtype=self.dtype, device=model.device
            )
            for side in self.sides
            for order in self.orders
        }
        self.homes = {module: home(model, module) for module in inside}
        self.inside: dict[tuple[Order, int], Tensor] = {
            (order, module): self.basis.new_zeros(n_groups, d, output_weight(model, module).shape[1], dtype=self.dtype)
            for order in self.orders
            for module in inside
        }

    @property
    def steps_per_batch(self) -> int:
        """Progress units that `add` yields for a batch."""
        return len(self.basis) * len(self.sides) * ("full" in self.orders) + ("first_order" in self.orders)

    def add(self, lin: Linearised, group: int) -> Iterator[int]:
        """Add one batch's share; yields the number of directions done."""
        if "full" in self.orders:
            for chosen in batches(len(self.basis), self.n_directions):
                for side in self.sides:
                    self.add_full(lin, chosen, side, group)
                    yield chosen.stop - chosen.start
        if "first_order" in self.orders:
            self.add_first_order(lin, group)
            yield 1

    def add_full(self, lin: Linearised, chosen: slice, side: Side, group: int = 0) -> None:
        """Sweep the chosen basis directions through all modules: rows ``chosen`` of every point's matrix."""
        direction = FITTING_DIRECTION[side]
        start = lin.far_end(direction)
        states = sweep(lin, lin.everywhere(self.basis[chosen]), start, direction)
        for point, (_, state) in zip(lin.points(start, direction), states, strict=True):
            self.sums[side, "full"][group, point, chosen] += position_sum(state)
            for module, at in self.homes.items():
                if side == "key" and at == point:
                    self.inside["full", module][group, chosen] += position_sum(lin.inside(module, at, state) * lin.mask)

    def add_first_order(self, lin: Linearised, group: int = 0) -> None:
        """Add each module's own term."""
        mask = lin.mask
        # A key enters at padded queries too, so its sum takes in the outputs there.
        outs = {"value": mask, "key": torch.ones_like(mask) if lin.padded else mask}
        for i, module in enumerate(lin.modules):
            if module is None:
                continue
            found: dict[int, Tensor] = {}
            for side in self.sides:
                weights = outs[side]
                if id(weights) not in found:
                    found[id(weights)] = self._module_sum(lin, i, weights)
                term = found[id(weights)]
                self.sums[side, "first_order"][group, i] += term if side == "value" else term.mT
        for i in self.homes:
            self.inside["first_order", i][group] += self._inside_sum(lin, i, outs["key"]).mT

    def _module_sum(self, lin: Linearised, i: int, outs: Tensor) -> Tensor:
        """[D, D]: module i's Jacobian summed over valid inputs and, with weights [B, S, 1], over outputs."""
        module = lin.modules[i]
        if has_closed_form(module, outs.shape[1]):
            return total(module, lin.mask, outs, self.n_directions)
        return torch.cat([position_sum(lin.apply(i, start, "forward") * outs) for start in self._starts(lin)]).mT

    def _inside_sum(self, lin: Linearised, i: int, outs: Tensor) -> Tensor:
        """[W, D]: the same up to what module i's output matrix reads."""
        module = lin.modules[i]
        if isinstance(module, LinearAttention | LinearMLP):
            return total_inside(module, lin.mask, outs, self.n_directions)
        return torch.cat([position_sum(lin.inside(i, i, start) * outs) for start in self._starts(lin)]).mT

    def _starts(self, lin: Linearised) -> Iterator[Tensor]:
        """The basis at valid positions, some directions at a time."""
        return (lin.everywhere(self.basis[c]) * lin.mask for c in batches(len(self.basis), self.n_directions))
