"""Energies G = E[JᵀJ] of every point, from which ``Transport.rel_var`` has the spread of a feature's transport.

- *exact*: the Gram matrix of all D basis directions, carried from each point; D directions for every point.
- *probes*: for random signs z at the output positions, carried by the transpose and summed over the positions of a
  sequence to u, E[Σ u uᵀ] = N·G (Hutchinson). One sweep of ``n_probes`` directions for all points, unbiased; the
  relative error falls with 1/√(probes × sequences). Probes are kept in up to eight sets, whose spread gives the
  standard error.

With groups of sequences, each group's share of the value side's full energies is kept too, over all sets: the adaptive
preset mixes by them, so its standard errors need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.transport.jacobians import (
    FEATURE_DIRECTION,
    FITTING_DIRECTION,
    Budget,
    Linearised,
    Order,
    Side,
    batches,
    sweep,
    walk,
)

Energy = Literal["none", "probes", "exact"]
PROBE_SETS = 8
GROUPED: tuple[Side, Order] = ("value", "full")
"""The energies that are kept by groups of sequences, too."""


class EnergySums:
    """N times E[JᵀJ] of every side and order: (side, order) → [2L + 1, R, D, D], R sets of probes (1: exact)."""

    def __init__(
        self,
        model: Model,
        pairs: Sequence[tuple[Side, Order]],
        energy: Energy,
        n_probes: int,
        seed: int,
        n_directions: int,
        groups: int = 1,
    ) -> None:
        """Args are as in `fit_transport`; n_directions is how many directions are carried at once."""
        if energy == "probes" and n_probes < 2:
            raise ValueError(f"n_probes is {n_probes}; expected at least 2, for a standard error")
        self.energy, self.n_probes, self.seed, self.n_directions = energy, n_probes, seed, n_directions
        self.n_sets = {"none": 0, "exact": 1, "probes": min(PROBE_SETS, n_probes)}[energy]
        d, points = model.d_model, 2 * model.n_layers + 1
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self.basis = torch.eye(d, dtype=model.dtype, device=model.device)
        self.sums: dict[tuple[Side, Order], Tensor] = {
            pair: torch.zeros(points, self.n_sets, d, d, dtype=self.dtype, device=model.device)
            for pair in pairs
            if self.n_sets
        }
        self.groups: dict[tuple[Side, Order], Tensor] = {
            pair: torch.zeros(groups, points, d, d, dtype=self.dtype, device=model.device)
            for pair in self.sums
            if pair == GROUPED and groups > 1
        }
        """[G, 2L + 1, D, D]: N times each group's share of the mean over the sets."""
        self._group = 0

    @property
    def steps_per_batch(self) -> int:
        """Progress units that `add` yields for a batch."""
        if self.energy == "probes":
            return self.n_probes * len(self.sums)
        points = sum(len(sums) if order == "full" else 1 for (_, order), sums in self.sums.items())
        return len(self.basis) * points

    def add(self, lin: Linearised, group: int = 0) -> Iterator[int]:
        """Add the share of one batch, which is of a group; yields the number of directions done."""
        self._group = group
        if self.energy == "probes":
            for chosen in batches(self.n_probes, self.n_directions):
                signs = self._signs(lin, chosen)
                for side, order in self.sums:
                    self._add_probes(lin, signs, chosen, side, order)
                    yield len(signs)
        for side, order in self.sums if self.energy == "exact" else ():
            yield from self._exact_full(lin, side) if order == "full" else self._exact_first_order(lin, side)

    def means(self, n_valid: int) -> dict[tuple[Side, Order], Tensor]:
        """E[JᵀJ] from the sums over n_valid positions."""
        counts = torch.tensor([self._probes_of(kept) for kept in range(self.n_sets)])[:, None, None]
        return {pair: sums / (n_valid * counts.to(sums.device)) for pair, sums in self.sums.items()}

    def _probes_of(self, kept: int) -> int:
        """How many probes a set has."""
        return len(range(kept, self.n_probes, self.n_sets)) if self.energy == "probes" else 1

    def _keep(self, pair: tuple[Side, Order], point: int, gram: Tensor, kept: int = 0) -> None:
        """Add a batch's Gram matrix [D, D] of one set to the sums of a point."""
        self.sums[pair][point, kept] += gram
        if pair in self.groups:
            self.groups[pair][self._group, point] += gram / (self._probes_of(kept) * self.n_sets)

    def _signs(self, lin: Linearised, chosen: slice) -> Tensor:
        """Random signs at valid positions, [C, B, S, D]; drawn for each sequence by itself, whatever the batching."""
        shape = (self.n_probes, lin.mask.shape[1], len(self.basis))
        drawn = []
        for row in range(lin.rows.start, lin.rows.stop):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
            drawn.append(torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)[chosen])
        return (torch.stack(drawn, 1).to(lin.mask) * 2 - 1) * lin.mask

    def _add_probes(self, lin: Linearised, signs: Tensor, chosen: slice, side: Side, order: Order) -> None:
        direction = FITTING_DIRECTION[side]
        start = lin.far_end(direction)
        for point, (_, state) in zip(
            lin.points(start, direction), sweep(lin, signs, start, direction, order), strict=True
        ):
            u = state.sum(2).to(self.dtype)
            for kept in range(self.n_sets):
                members = [c for c in range(len(signs)) if (chosen.start + c) % self.n_sets == kept]
                flat = u[members].flatten(0, 1)
                self._keep((side, order), point, flat.mT @ flat, kept)

    def _exact_full(self, lin: Linearised, side: Side) -> Iterator[int]:
        for point in range(len(lin.modules) + 1):
            chunks = batches(len(self.basis), self.n_directions)
            moved = [walk(lin, lin.everywhere(self.basis[c]), point, side, "full") for c in chunks]
            self._keep((side, "full"), point, _gram(torch.cat(moved)))
            yield len(self.basis)

    def _exact_first_order(self, lin: Linearised, side: Side) -> Iterator[int]:
        """From the far end to each point: a point's terms are those of the point before it and one more."""
        direction, sums = FEATURE_DIRECTION[side], self.sums[side, "first_order"]
        points = lin.points(lin.far_end(FITTING_DIRECTION[side]), FITTING_DIRECTION[side])
        moved = lin.everywhere(self.basis) * lin.mask
        sums[points[0], 0] += _gram(moved)
        for before, point in zip(points, points[1:], strict=False):
            for c in batches(len(self.basis), self.n_directions):
                moved[c] += lin.apply(min(before, point), lin.everywhere(self.basis[c]), direction) * lin.mask
            sums[point, 0] += _gram(moved)
        yield len(self.basis)


def rows_for_energy(model: Model, energy: Energy, budget: Budget, length: int) -> int:
    """Sequences linearised at once: exact energies hold every direction of a batch.

    Raises:
        ValueError: Not even one sequence fits.
    """
    if energy != "exact":
        return budget.rows
    item = torch.finfo(model.dtype).bits // 8
    held = model.d_model**2 * length * item
    available = 2 * budget.directions * budget.rows * length * 8 * model.d_model * item
    if held > available:
        raise ValueError(
            f"energy='exact' holds every direction of one sequence at once, {held / 2**30:.3g} GiB here: raise "
            "max_memory_gib, use shorter sequences, or use energy='probes'"
        )
    return max(1, min(budget.rows, int(available // held)))


def _gram(moved: Tensor) -> Tensor:
    """[D, D] of Σ_s ⟨t_i[s], t_j[s]⟩ for moved [D, B, S, D]."""
    flat = at_least_float32(moved.flatten(1))
    return flat @ flat.mT
