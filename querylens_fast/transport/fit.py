"""Fitting: the sweeps that make a transport (`transport` has the mathematics).

`Fit` holds the accumulators; each batch of sequences is linearised once, and directions walk through it in chunks, so
that memory keeps to the user's bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.runs import processes as ranks
from querylens_fast.runs.versions import versions
from querylens_fast.transport.first_order import has_closed_form, total
from querylens_fast.transport.jacobians import (
    Budget,
    Linearised,
    Order,
    Side,
    Submodule,
    batches,
    first_order_term,
    linearise,
    position_sum,
    walk,
)
from querylens_fast.transport.transport import FORMAT, ORDERS, SIDES, Transport

Energy = Literal["none", "probes", "exact"]
EMBEDDED_AT_ONCE = 1 << 12
"""Token embeddings held at a time."""


@torch.no_grad()
def fit_transport(
    model: Any,
    tokens: Tokens | Tensor,
    *,
    sides: Sequence[Side] = SIDES,
    orders: Sequence[Order] = ORDERS,
    energy: Energy = "none",
    n_probes: int = 64,
    seed: int = 0,
    max_memory_gib: float = 2.0,
    submodule: Submodule = "both",
    through_norms: bool = True,
    progress: bool = True,
) -> Transport:
    """Fit the transport of a model over a token sample: every layer and both sides, in about D walks.

    Within `ranks.joined` the sequences are dealt out to the processes; every one gets the whole transport, equal to
    that of one process but for the order of its sums.

    Args:
        model: From `load_model`, or any model `as_model` takes.
        tokens: From `load_tokens`, or ids [B, S].
        sides: "value", "key" or both.
        orders: "full", "first_order" or both.
        energy: "probes" or "exact" also fits E[JᵀJ], for rel_var. Exact costs D walks for each point.
        n_probes: Sign probes a sequence, for energy="probes".
        seed: Of the probes.
        max_memory_gib: Bound on the working memory (not on the result: P·D² numbers a side and order).
        submodule: "attn" or "mlp" leaves the other module's Jacobian out (reference's ``submodule``).
        through_norms: False takes Jacobians of the modules without their norms (reference's ``use_*_layer_norm``).
        progress: Show a progress bar.

    Raises:
        ValueError: Bad arguments, or max_memory_gib too small for one sequence (the message says how much is needed).
    """
    model = as_model(model)
    tokens = as_tokens(tokens, model)
    sides, orders = _once(sides), _once(orders)
    _check_choice("sides", sides, SIDES)
    _check_choice("orders", orders, ORDERS)
    _check_choice("energy", [energy], ("none", "probes", "exact"))
    _check_choice("submodule", [submodule], ("both", "attn", "mlp"))
    budget = Budget.plan(model, tokens.ids.shape[1], max_memory_gib)
    fit = Fit(model, tokens, sides, orders, energy, n_probes, seed, budget)
    group = ranks.current()
    with tqdm(total=fit.steps, desc="transport", unit="walk", disable=not (progress and group.leads)) as bar:
        for rows in group.share(list(batches(len(tokens.ids), fit.rows_each(group.size)))):
            lin = linearise(model, tokens, rows, submodule, through_norms)
            for done in fit.sweep(lin):
                bar.update(done * group.size)
                group.check()
    for sums in (*fit.matrices.values(), *fit.energies.values()):
        group.sum_(sums)
    return fit.finish(mean_embedding(model, tokens), submodule, through_norms)


def mean_embedding(model: Model, tokens: Tokens) -> Tensor:
    """The mean token embedding over the valid positions, [D] in float32 or wider."""
    wide = torch.promote_types(model.dtype, torch.float32)
    total = torch.zeros(model.d_model, dtype=wide, device=model.device)
    for ids in tokens.ids[tokens.valid_mask].split(EMBEDDED_AT_ONCE):
        total += model.embed(ids).to(wide).sum(0)
    return total / tokens.n_valid


def _once(chosen: Any) -> Any:
    """A choice, or several, each once."""
    return tuple(dict.fromkeys([chosen] if isinstance(chosen, str) else chosen))


def _check_choice(name: str, chosen: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [c for c in chosen if c not in allowed]
    if wrong or not chosen:
        raise ValueError(f"{name} is {list(chosen)}; expected some of {', '.join(allowed)}")


class Fit:
    """The accumulators of one fit. Sums are kept in float32 or wider, whatever the model's dtype."""

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        sides: Sequence[Side],
        orders: Sequence[Order],
        energy: Energy,
        n_probes: int,
        seed: int,
        budget: Budget,
    ) -> None:
        self.model, self.tokens, self.sides, self.orders = model, tokens, tuple(sides), tuple(orders)
        self.energy, self.n_probes, self.seed, self.budget = energy, n_probes, seed, budget
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self.n_groups = {"none": 0, "exact": 1, "probes": min(8, n_probes)}[energy]
        d, modules = model.d_model, 2 * model.n_layers
        if energy == "probes" and n_probes < 2:
            raise ValueError(f"n_probes is {n_probes}; expected at least 2, for a standard error")
        length = tokens.ids.shape[1]
        held = d * length * d * torch.finfo(model.dtype).bits // 8
        available = budget.directions * budget.rows * length * 8 * d * torch.finfo(model.dtype).bits // 8
        self.rows = budget.rows
        if energy == "exact":
            if held > 2 * available:
                raise ValueError(
                    f"energy='exact' holds every direction of one sequence at once, {held / 2**30:.3g} GiB here: raise "
                    "max_memory_gib, use shorter sequences, or use energy='probes'"
                )
            self.rows = max(1, min(budget.rows, int(2 * available // held)))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, d, d, dtype=self.dtype, device=model.device)

        pairs: list[tuple[Side, Order]] = list(itertools.product(self.sides, self.orders))
        self.matrices = {p: zeros(modules + 1 if p[1] == "full" else modules) for p in pairs}
        self.energies = {p: zeros(modules + 1, self.n_groups) for p in pairs} if self.n_groups else {}

    def rows_each(self, n_processes: int) -> int:
        """Sequences a batch, such that every process has some."""
        return max(1, min(self.rows, len(self.tokens.ids) // n_processes))

    @property
    def steps(self) -> int:
        """Progress units: directions walked, summed over batches."""
        n_batches = -(-len(self.tokens.ids) // self.rows)
        sweeps = len(self.sides) * ("full" in self.orders)
        d, points = self.model.d_model, 2 * self.model.n_layers + 1
        extra = {"none": 0, "probes": self.n_probes, "exact": d * (points if "full" in self.orders else 1)}
        first = int("first_order" in self.orders)
        return n_batches * (d * sweeps + first + extra[self.energy] * len(self.sides))

    def sweep(self, lin: Linearised) -> Iterator[int]:
        """Add one batch's share to every accumulator; yields the walks done."""
        for chosen in batches(self.model.d_model, self.budget.directions) if "full" in self.orders else ():
            for side in self.sides:
                self.add_full(lin, chosen, side)
                yield chosen.stop - chosen.start
        if "first_order" in self.orders:
            self.add_first_order(lin)
            yield 1
        if self.energy == "probes":
            yield from self._probe(lin)
        elif self.energy == "exact":
            yield from self._exact(lin)

    def _basis(self, chosen: slice) -> Tensor:
        """Rows of the identity, [C, D]."""
        return torch.eye(self.model.d_model, dtype=self.model.dtype, device=self.model.device)[chosen]

    def add_full(self, lin: Linearised, chosen: slice, side: Side) -> None:
        """Walk the chosen basis directions through all modules; each point's position sum is its matrices' rows."""
        t = lin.everywhere(self._basis(chosen)) * lin.mask
        total, last = self.matrices[side, "full"], len(lin.modules)
        total[last if side == "value" else 0, chosen] += position_sum(t)
        for i in range(last - 1, -1, -1) if side == "value" else range(last):
            t = lin.pull(i, t) if side == "value" else lin.push(i, t)
            total[i if side == "value" else i + 1, chosen] += position_sum(t)

    def add_first_order(self, lin: Linearised) -> None:
        """Each module's own term: in closed form, or by walking the basis where it has none."""
        mask = lin.mask
        outs = {"value": mask, "key": torch.ones_like(mask) if lin.padded else mask}
        for i, module in enumerate(lin.modules):
            if module is None:
                continue
            found: dict[int, Tensor] = {}
            for side in self.sides:
                # A key-side cotangent enters unmasked: its sum takes in the outputs at padded queries too.
                weights = outs[side]
                if id(weights) not in found:
                    found[id(weights)] = self._total(lin, i, weights)
                term = found[id(weights)]
                self.matrices[side, "first_order"][i] += term if side == "value" else term.mT

    def _total(self, lin: Linearised, i: int, outs: Tensor) -> Tensor:
        """[D, D]: module i's Jacobian summed over valid inputs and, with weights [B, S, 1], over outputs."""
        module = lin.modules[i]
        if has_closed_form(module, outs.shape[1]):
            return total(module, lin.mask, outs, self.budget.directions)
        chunks = batches(self.model.d_model, self.budget.directions)
        starts = (lin.everywhere(self._basis(c)) * lin.mask for c in chunks)
        return torch.cat([position_sum(lin.jvp(i, start) * outs) for start in starts]).mT

    def _probe(self, lin: Linearised) -> Iterator[int]:
        for chosen in batches(self.n_probes, self.budget.directions):
            signs = self._signs(lin, chosen)
            for pair in self.energies:
                self._probe_pair(lin, signs, chosen, *pair)
            yield len(signs) * len(self.sides)

    def _signs(self, lin: Linearised, chosen: slice) -> Tensor:
        """Random signs at valid positions, [C, B, S, D]; drawn for each sequence by itself, whatever the batching."""
        shape = (self.n_probes, lin.mask.shape[1], self.model.d_model)
        drawn = []
        for row in range(lin.rows.start, lin.rows.stop):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
            drawn.append(torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)[chosen])
        return (torch.stack(drawn, 1).to(lin.mask) * 2 - 1) * lin.mask

    def _probe_pair(self, lin: Linearised, signs: Tensor, chosen: slice, side: Side, order: Order) -> None:
        last = len(lin.modules)

        def add(point: int, u: Tensor) -> None:
            for group in range(self.n_groups):
                members = [c for c in range(len(signs)) if (chosen.start + c) % self.n_groups == group]
                flat = u[members].to(self.dtype).flatten(0, 1)
                self.energies[side, order][point, group] += flat.mT @ flat

        t, u = signs, signs.sum(2)
        add(last if side == "value" else 0, u)
        for i in range(last - 1, -1, -1) if side == "value" else range(last):
            if order == "full":
                t = lin.pull(i, t) if side == "value" else lin.push(i, t)
                u = t.sum(2)
            else:
                u = u + (lin.vjp(i, signs) if side == "value" else lin.jvp(i, signs)).sum(2)
            add(i if side == "value" else i + 1, u)

    def _exact(self, lin: Linearised) -> Iterator[int]:
        basis, last = self._basis(slice(None)), len(lin.modules)
        for side, order in self.energies:
            gram = self.energies[side, order][:, 0]
            if order == "full":
                for point in range(last + 1):
                    moved = [
                        walk(lin, lin.everywhere(basis[c]), point, side, order)
                        for c in batches(len(basis), self.budget.directions)
                    ]
                    gram[point] += _gram(torch.cat(moved))
                    yield len(basis)
                continue
            total = lin.everywhere(basis) * lin.mask
            gram[last if side == "value" else 0] += _gram(total)
            for i in range(last - 1, -1, -1) if side == "value" else range(last):
                for c in batches(len(basis), self.budget.directions):
                    total[c] += first_order_term(lin, lin.everywhere(basis[c]), i, side)
                gram[i if side == "value" else i + 1] += _gram(total)
            yield len(basis) if "full" not in self.orders else 0

    def finish(self, centre: Tensor, submodule: str, through_norms: bool) -> Transport:
        """The averages, with the metadata that says what they are averages of."""
        model, tokens = self.model, self.tokens
        for matrices in self.matrices.values():
            matrices /= tokens.n_valid
        for pair, energies in self.energies.items():
            counts = [
                len(range(g, self.n_probes, self.n_groups)) if self.energy == "probes" else 1
                for g in range(self.n_groups)
            ]
            self.energies[pair] = energies / (
                tokens.n_valid * torch.tensor(counts, device=energies.device)[:, None, None]
            )
        for (side, order), matrices in self.matrices.items():
            if not torch.isfinite(matrices).all():
                raise ValueError(
                    f"the {side}/{order} transport of {model.name!r} overflowed {model.dtype}; use float32"
                )
        metadata = {
            "format": FORMAT,
            "model": model.name,
            "fingerprint": model.fingerprint,
            "convention": model.convention,
            "linearisation": model.linearisation,
            "routing": "held fixed: experts and weights" if model.mixture_of_experts else "none",
            "dtype": str(model.dtype).removeprefix("torch."),
            "n_layers": str(model.n_layers),
            "d_model": str(model.d_model),
            "n_valid": str(tokens.n_valid),
            "n_sequences": str(len(tokens.ids)),
            "tokens": tokens.source,
            "tokens_digest": tokens.digest,
            "submodule": submodule,
            "through_norms": str(through_norms),
            "energy": self.energy,
            "n_probes": str(self.n_probes if self.energy == "probes" else 0),
            **({"seed": str(self.seed)} if self.energy == "probes" else {}),
            **versions("querylens_fast", "torch", "transformers"),
        }
        return Transport(self.matrices, centre, metadata, self.energies)


def _gram(moved: Tensor) -> Tensor:
    """[D, D] of Σ_s ⟨t_i[s], t_j[s]⟩ for moved [D, B, S, D]."""
    flat = at_least_float32(moved.flatten(1))
    return flat @ flat.mT
