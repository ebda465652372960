"""Transport: one matrix for each point of the residual stream, good for every feature written or read there.

Query Lens (arXiv 2606.07617, §3) carries a feature's vector through the model's later (value) or earlier (key) modules
by Jacobians and averages over the N valid positions of a token sample. Every step is linear in the vector v, so the
result is M v for a matrix M that does not depend on the feature:

- value side: row j of N·M_p is the gradient of Σ_s out[s, j] with respect to a shared direction at point p. One walk
  down with the D basis cotangents gives M_p for **all** points p.
- key side: row j of N·K_p is Σ_s t_p[s] for the tangent e_j injected at every valid position of the embedding. One
  walk up with the D basis tangents gives K_p for **all** p.
- first order: every module i sees the same direction; its term T_i is kept, and M_p = I + Σ T_i over the modules after
  p (value) or before it (key).

Cost: about D walks in all, nearly all of it matrix products; the reference needs one walk a feature. The value side is
the Jacobian lens (arXiv 2607.15495) with another averaging rule.

``rel_var`` (how much of the transported direction depends on context) is 1 − ‖M v‖² / (vᵀ G v) with G = E[JᵀJ]. G is
had exactly (``energy="exact"``, D walks for each point) or estimated without bias by random signs
(``energy="probes"``): u = Σ_s of a walked sign vector has E[Σ u uᵀ] = N·G. The probes are kept in groups, so that
every figure comes with its standard error.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.models import Model, as_model
from querylens_fast.tokens import Tokens, as_tokens
from querylens_fast.walks import (
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

SIDES: tuple[Side, ...] = ("value", "key")
ORDERS: tuple[Order, ...] = ("full", "first_order")
Energy = Literal["none", "probes", "exact"]
FORMAT = "querylens_fast.transport/1"


@dataclass
class Transport:
    """Fitted transport matrices of one model over one token sample. Built by `fit_transport` or `load_transport`.

    matrices: (side, "full") → [2L + 1, D, D], the matrix of each point; (side, "first_order") → [2L, D, D], each
    module's term. Rows of a vector batch V [n, D] move as V Mᵀ. energies: (side, order) → [2L + 1, R, D, D], R groups
    of estimates of E[JᵀJ] (R = 1: exact). centre [D] is the mean token embedding over the valid positions.
    """

    matrices: dict[tuple[Side, Order], Tensor]
    centre: Tensor
    metadata: dict[str, str]
    energies: dict[tuple[Side, Order], Tensor] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return int(self.metadata["n_layers"])

    @property
    def d_model(self) -> int:
        return self.centre.shape[0]

    @property
    def n_valid(self) -> int:
        """N, the number of valid positions averaged over."""
        return int(self.metadata["n_valid"])

    def to(self, device: torch.device | str) -> Transport:
        """A copy whose tensors live on device."""
        return Transport(
            {k: m.to(device) for k, m in self.matrices.items()},
            self.centre.to(device),
            self.metadata,
            {k: g.to(device) for k, g in self.energies.items()},
        )

    def matrix(self, side: Side, order: Order, point: int) -> Tensor:
        """M of the point, [D, D]; a row vector v moves as v Mᵀ.

        Raises:
            ValueError: This transport was fitted without that side or order, or has no such point.
        """
        kept = self._kept(side, order)
        if not 0 <= point <= 2 * self.n_layers:
            raise ValueError(f"point {point} is outside a model of {self.n_layers} layers")
        if order == "full":
            return kept[point]
        modules = kept[point:] if side == "value" else kept[:point]
        return torch.eye(self.d_model, dtype=kept.dtype, device=kept.device) + modules.sum(0)

    def layer_terms(self, side: Side, point: int, layer: int) -> list[tuple[int, Tensor | None]]:
        """The first-order terms by layer, in the reference's order: (label, matrix [D, D], None for the identity).

        Value: the identity under ``layer``, then each later layer. Key: the identity under ``layer + 1``, then layer,
        layer − 1, …, 0. A module of the feature's own layer that lies past its point belongs to that layer's term.
        """
        kept = self._kept(side, "first_order")
        modules = range(point, 2 * self.n_layers) if side == "value" else range(point)
        terms: dict[int, Tensor] = {}
        for i in modules:
            terms[i // 2] = terms[i // 2] + kept[i] if i // 2 in terms else kept[i]
        layers: list[tuple[int, Tensor | None]] = [(k, terms[k]) for k in sorted(terms, reverse=side == "key")]
        if side == "key":
            return [(layer + 1, None), *layers]
        if layers and layers[0][0] == layer:
            own = torch.eye(self.d_model, dtype=kept.dtype, device=kept.device) + terms[layer]
            return [(layer, own), *layers[1:]]
        return [(layer, None), *layers]

    def apply(self, vectors: Tensor, side: Side, order: Order, point: int) -> Tensor:
        """Transported vectors [n, D], in the transport's dtype, of vectors [n, D]."""
        matrix = self.matrix(side, order, point)
        return vectors.to(matrix) @ matrix.mT

    def rel_var(self, vectors: Tensor, side: Side, order: Order, point: int) -> tuple[Tensor, Tensor]:
        """Relative variance of each vector's transport and its standard error, both [n] (paper, Appendix; Table 8).

        rel_var = 1 − ‖M v‖² / E‖J v‖², clamped to [0, 1]. The standard error is 0 where the energies are exact.

        Raises:
            ValueError: The transport was fitted with energy="none".
        """
        if (side, order) not in self.energies:
            raise ValueError(
                f"this transport holds no energies for ({side}, {order}); fit it with energy='probes' or energy='exact'"
            )
        groups = self.energies[side, order][point]
        vectors = vectors.to(groups)
        energy = torch.einsum("nd,rde,ne->rn", vectors, groups, vectors)
        mean = energy.mean(0).clamp_min(torch.finfo(energy.dtype).tiny)
        direct = self.apply(vectors, side, order, point).square().sum(-1)
        ratio = direct / mean
        error = torch.zeros_like(mean) if len(groups) == 1 else energy.std(0) / len(groups) ** 0.5
        return (1 - ratio).clamp(0, 1), ratio * error / mean

    def check_model(self, model: Model) -> None:
        """Raise ValueError when the transport was fitted on another model."""
        found = (model.n_layers, model.d_model)
        if found != (self.n_layers, self.d_model):
            raise ValueError(
                f"transport of {self.metadata['model']!r} has (layers, d_model) = {(self.n_layers, self.d_model)}, but "
                f"model {model.name!r} has {found}; fit a transport on this model"
            )
        if self.metadata["fingerprint"] != model.fingerprint:
            raise ValueError(
                f"transport was fitted on {self.metadata['model']!r} with other weights than {model.name!r} has "
                f"(fingerprints {self.metadata['fingerprint'][:8]} and {model.fingerprint[:8]}); fit it again"
            )

    def save(self, path: str | Path) -> Path:
        """Write the transport to a safetensors file, whole or not at all. Returns the path."""
        from safetensors.torch import save_file

        tensors = {"centre": self.centre.cpu().contiguous()}
        for kind, table in (("matrix", self.matrices), ("energy", self.energies)):
            for (side, order), tensor in table.items():
                tensors[f"{kind}.{side}.{order}"] = tensor.cpu().contiguous()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, str(partial), metadata=self.metadata)
            os.replace(partial, path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"transport could not be written to {str(path)!r}: {error}") from error
        return path

    def _kept(self, side: Side, order: Order) -> Tensor:
        if (side, order) not in self.matrices:
            have = ", ".join("/".join(key) for key in self.matrices)
            raise ValueError(f"this transport holds {have}, not {side}/{order}; fit it with sides and orders to match")
        return self.matrices[side, order]


def load_transport(path: str | Path) -> Transport:
    """Read a transport written by `Transport.save`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, truncated, or no transport.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"transport file {str(path)!r} does not exist; make one with fit_transport(...).save")
    matrices, energies = {}, {}
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{str(path)!r} is a safetensors file but no transport (format {metadata.get('format')!r})"
                )
            for key in file.keys():
                kind, *rest = key.split(".")
                if rest:
                    table = matrices if kind == "matrix" else energies
                    table[cast(Side, rest[0]), cast(Order, rest[1])] = file.get_tensor(key)
            centre = file.get_tensor("centre")
    except SafetensorError as error:
        raise ValueError(f"transport file {str(path)!r} is damaged or truncated: {error}") from error
    return Transport(matrices, centre, metadata, energies)


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
    model, tokens = as_model(model), as_tokens(tokens, model)
    _check_choice("sides", sides, SIDES)
    _check_choice("orders", orders, ORDERS)
    _check_choice("energy", [energy], ("none", "probes", "exact"))
    _check_choice("submodule", [submodule], ("both", "attn", "mlp"))
    budget = Budget.plan(model, tokens.ids.shape[1], max_memory_gib)
    fit = _Fit(model, tokens, sides, orders, energy, n_probes, seed, budget)
    with tqdm(total=fit.steps, desc="transport", unit="walk", disable=not progress) as bar:
        for rows in batches(len(tokens.ids), fit.rows):
            lin = linearise(model, tokens, rows, submodule, through_norms)
            for done in fit.sweep(lin):
                bar.update(done)
    valid = tokens.valid_mask.to(model.device)
    embedded = model.embed(tokens.ids).to(fit.dtype)[valid]
    return fit.finish(embedded.mean(0), submodule, through_norms)


def _check_choice(name: str, chosen: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [c for c in chosen if c not in allowed]
    if wrong or not chosen:
        raise ValueError(f"{name} is {list(chosen)}; expected some of {', '.join(allowed)}")


class _Fit:
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

    @property
    def steps(self) -> int:
        """Progress units: directions walked, summed over batches."""
        n_batches = -(-len(self.tokens.ids) // self.rows)
        sweeps = len(self.sides) * ("full" in self.orders) + ("first_order" in self.orders)
        d, points = self.model.d_model, 2 * self.model.n_layers + 1
        extra = {"none": 0, "probes": self.n_probes, "exact": d * (points if "full" in self.orders else 1)}
        return n_batches * (d * sweeps + extra[self.energy] * len(self.sides))

    def sweep(self, lin: Linearised) -> Iterator[int]:
        """Add one batch's share to every accumulator; yields the walks done."""
        basis = torch.eye(self.model.d_model, dtype=self.model.dtype, device=self.model.device)
        for chosen in batches(self.model.d_model, self.budget.directions):
            start = lin.everywhere(basis[chosen]) * lin.mask
            if "full" in self.orders:
                for side in self.sides:
                    self._full(lin, start, chosen, side)
                    yield len(start)
            if "first_order" in self.orders:
                self._first_order(lin, start, chosen)
                yield len(start)
        if self.energy == "probes":
            yield from self._probe(lin)
        elif self.energy == "exact":
            yield from self._exact(lin, basis)

    def _full(self, lin: Linearised, t: Tensor, chosen: slice, side: Side) -> None:
        total, last = self.matrices[side, "full"], len(lin.modules)
        total[last if side == "value" else 0, chosen] += position_sum(t)
        for i in range(last - 1, -1, -1) if side == "value" else range(last):
            t = lin.pull(i, t) if side == "value" else lin.push(i, t)
            total[i if side == "value" else i + 1, chosen] += position_sum(t)

    def _first_order(self, lin: Linearised, start: Tensor, chosen: slice) -> None:
        # One tangent serves both sides: its sum over valid outputs is a column of the value term; its sum over all
        # outputs, padded queries too, is a row of the key term (a cotangent enters there unmasked).
        for i in range(len(lin.modules)):
            t = lin.jvp(i, start)
            if "value" in self.sides:
                self.matrices["value", "first_order"][i, :, chosen] += position_sum(t * lin.mask).mT
            if "key" in self.sides:
                self.matrices["key", "first_order"][i, chosen] += position_sum(t)

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

    def _exact(self, lin: Linearised, basis: Tensor) -> Iterator[int]:
        last = len(lin.modules)
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
        import transformers

        import querylens_fast

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
            "querylens_fast": querylens_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return Transport(self.matrices, centre, metadata, self.energies)


def _gram(moved: Tensor) -> Tensor:
    """[D, D] of Σ_s ⟨t_i[s], t_j[s]⟩ for moved [D, B, S, D]."""
    flat = moved.flatten(1)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    return flat @ flat.mT
