"""Transport: one matrix for each point of the residual stream, for every feature written or read there.

Query Lens (arXiv 2606.07617, §3) carries a feature's vector through the model's later (value) or earlier (key) modules
by Jacobians and averages over the N valid positions of a token sample. Every step is linear in the vector v, so the
result is M v for a matrix M that does not depend on the feature:

- value side: row j of N·M_p is the gradient of Σ_s out[s, j] with respect to a shared direction at point p. One
  backward sweep of the D basis cotangents gives M_p for **all** points p.
- key side: row j of N·K_p is Σ_s t_p[s] for the tangent e_j injected at every valid position of the embedding. One
  forward sweep of the D basis tangents gives K_p for **all** p.
- first order: every module i sees the same direction; its term T_i is kept, and M_p = I + Σ T_i over the modules after
  p (value) or before it (key).

``rel_var`` (how much of the transported direction depends on context) is 1 − ‖M v‖² / (vᵀ G v) with G = E[JᵀJ], from
`energy`. With ``groups=G`` the matrices are also kept for G disjoint groups of the sequences, which gives what the fit
would be without each of them: the jackknife behind standard errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from querylens_fast.models.model import Model
from querylens_fast.transport.files import FORMAT, Inside, read_transport, write_transport
from querylens_fast.transport.jacobians import Order, Side, counts

__all__ = ["FORMAT", "ORDERS", "SIDES", "Transport", "load_transport", "matrix_at", "point_name"]

SIDES: tuple[Side, ...] = ("value", "key")
ORDERS: tuple[Order, ...] = ("full", "first_order")


def point_name(point: int) -> str:
    """What users call a point of the stream: "resid_post of layer 3"; the first point is layer 0's resid_pre."""
    if point == 0:
        return "resid_pre of layer 0"
    return f"resid_{'mid' if point % 2 else 'post'} of layer {(point - 1) // 2}"


def inside_name(module: int) -> str:
    """The hook name of what a module's output matrix reads: "blocks.3.attn.hook_z" or "blocks.3.mlp.hook_post"."""
    return f"blocks.{module // 2}.{'mlp.hook_post' if module % 2 else 'attn.hook_z'}"


def matrix_at(kept: Tensor, side: Side, order: Order, at: int) -> Tensor:
    """[..., D, D] of what is kept for all points or modules, [..., P, D, D]; of the first order without the identity.

    ``at`` is an index of the full order's matrices; of the first order, the point.
    """
    if order == "full":
        return kept[..., at, :, :]
    modules = kept[..., at:, :, :] if side == "value" else kept[..., :at, :, :]
    return modules.sum(-3)


@dataclass
class Transport:
    """Fitted transport matrices of one model over one token sample. Built by `fit_transport` or `load_transport`.

    Attributes:
        matrices: (side, "full") → [P, D, D], the matrix of each of `points`; (side, "first_order") → [2L, D, D], each
            module's term. Rows of a vector batch V [n, D] move as V Mᵀ.
        centre: The mean token embedding over the valid positions, [D]; None where it is not known.
        metadata: What was fitted, on which model and sample.
        energies: (side, order) → [P, R, D, D], R sets of estimates of E[JᵀJ] (R = 1: exact).
        groups: Like matrices, with a leading axis of G groups of sequences; each is its group's share of the mean, so
            that they sum up to the matrices. Empty where groups were not kept.
        group_centres: The groups' shares of the centre, [G, D].
        group_energies: ("value", "full") → [G, P, D, D], the groups' shares of the energies' mean over the R sets.
            Empty where energies or groups were not fitted, and in files of earlier versions.
        inside: (order, module) → [G, D, W], for keys that read what the module's output matrix does (`reading`): each
            group's share (G = 1 without groups), which sum up to the matrix.
    """

    matrices: dict[tuple[Side, Order], Tensor]
    centre: Tensor | None
    metadata: dict[str, str]
    energies: dict[tuple[Side, Order], Tensor] = field(default_factory=dict)
    groups: dict[tuple[Side, Order], Tensor] = field(default_factory=dict)
    group_centres: Tensor | None = None
    group_energies: dict[tuple[Side, Order], Tensor] = field(default_factory=dict)
    inside: Inside = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return int(self.metadata["n_layers"])

    @property
    def d_model(self) -> int:
        return int(self.metadata["d_model"])

    @property
    def points(self) -> list[int]:
        """The points that "full" matrices are held for, in order; all 2L + 1 of most transports.

        One imported from a Jacobian lens, or fitted on a model of opaque layers, holds fewer.
        """
        given = self.metadata.get("points")
        return list(range(2 * self.n_layers + 1)) if given is None else [int(p) for p in given.split(",")]

    @property
    def n_valid(self) -> int:
        """N, the number of valid positions averaged over."""
        return int(self.metadata["n_valid"])

    @property
    def n_groups(self) -> int:
        """G, the number of groups kept; 1 when none are."""
        return len(self.group_sizes)

    @property
    def group_sizes(self) -> list[int]:
        """The valid positions of each group."""
        return [int(n) for n in self.metadata.get("group_n_valid", self.metadata["n_valid"]).split(",")]

    def to(self, device: torch.device | str) -> Transport:
        """A copy whose tensors live on device."""
        return Transport(
            {k: m.to(device) for k, m in self.matrices.items()},
            None if self.centre is None else self.centre.to(device),
            self.metadata,
            {k: g.to(device) for k, g in self.energies.items()},
            {k: m.to(device) for k, m in self.groups.items()},
            None if self.group_centres is None else self.group_centres.to(device),
            {k: g.to(device) for k, g in self.group_energies.items()},
            {at: m.to(device) for at, m in self.inside.items()},
        )

    def matrix(self, side: Side, order: Order, point: int) -> Tensor:
        """M of the point, [D, D]; a row vector v moves as v Mᵀ.

        Raises:
            ValueError: This transport was fitted without that side or order, or has no such point.
        """
        return self._at(self._kept(side, order), side, order, point)

    def leave_one_out(self, side: Side, order: Order, point: int) -> Tensor:
        """[G, D, D]: the matrix of the point as it would be without each of the groups.

        Raises:
            ValueError: This transport was fitted with groups=1, or as for `matrix`.
        """
        self._need_groups()
        kept = self._kept(side, order)
        whole = self._at(kept, side, order, point, identity=False)
        shares = self._at(self.groups[side, order], side, order, point, identity=False)
        return (whole - shares) * self.n_valid / self._others(shares) + self._identity(kept, order)

    def leave_one_out_energies(self, side: Side, order: Order, point: int) -> Tensor:
        """[G, D, D]: E[JᵀJ] of the point as it would be without each of the groups.

        Raises:
            ValueError: The groups' energies were not kept.
        """
        if (side, order) not in self.group_energies:
            raise ValueError(f"this transport keeps no energies of groups for ({side}, {order}); fit it again")
        at = self.points.index(point)
        whole, shares = self.energies[side, order][at].mean(0), self.group_energies[side, order][:, at]
        return (whole - shares) * self.n_valid / self._others(shares)

    def leave_one_out_centres(self) -> Tensor | None:
        """[G, D]: the centre as it would be without each of the groups; None where it is not known."""
        if self.centre is None or self.group_centres is None:
            return None
        return (self.centre - self.group_centres) * self.n_valid / self._others(self.group_centres)

    def _others(self, shares: Tensor) -> Tensor:
        """The valid positions that are not of each group, to divide shares [G, ...] by."""
        rest = torch.tensor([self.n_valid - n for n in self.group_sizes]).to(shares)
        return rest.reshape(-1, *[1] * (shares.ndim - 1))

    def group(self, index: int) -> Transport:
        """The transport that group ``index`` alone would have given: independent of those of the other groups.

        Raises:
            ValueError: This transport was fitted with groups=1, or has no such group.
        """
        self._need_groups()
        if not 0 <= index < self.n_groups:
            raise ValueError(f"group is {index}; this transport has groups 0 to {self.n_groups - 1}")
        n = self.group_sizes[index]
        scale = self.n_valid / n
        metadata = {name: value for name, value in self.metadata.items() if not name.startswith("group")}
        metadata |= {"n_valid": str(n), "group": f"{index} of {self.n_groups}"}
        centre = None if self.group_centres is None else self.group_centres[index] * scale
        inside = {at: kept[index : index + 1] * scale for at, kept in self.inside.items()}
        matrices = {pair: kept[index] * scale for pair, kept in self.groups.items()}
        return Transport(matrices, centre, metadata, inside=inside)

    def without_mid_points(self) -> Transport:
        """A copy with the matrices of the even points alone (`resid_pre`, `resid_post`), for opaque layers."""
        even = range(0, 2 * self.n_layers + 1, 2)
        return replace(
            self,
            matrices={pair: kept[::2].contiguous() for pair, kept in self.matrices.items()},
            energies={pair: kept[::2].contiguous() for pair, kept in self.energies.items()},
            groups={pair: kept[:, ::2].contiguous() for pair, kept in self.groups.items()},
            group_energies={pair: kept[:, ::2].contiguous() for pair, kept in self.group_energies.items()},
            metadata={**self.metadata, "points": ",".join(map(str, even))},
        )

    def reading(self, module: int, inside: bool) -> Transport:
        """A copy for keys that read a module: its one key matrix of each order, at point module + 1, is theirs.

        A key that reads the module's output has its gradient go through the module's Jacobian and on from its input:
        K_{i+1} − K_i, exactly, as both carry the key on from that input alike; of the first order that is T′_i. With
        ``inside`` the key reads what the module's output matrix reads, [D, W], which has to have been fitted.

        Raises:
            ValueError: The transport holds nothing of that kind for the module.
        """
        shares: dict[Order, Tensor] = {}
        counted = counts(module, self.metadata.get("submodule", "both"))
        if inside:
            shares = {order: kept for (order, at), kept in self.inside.items() if at == module}
        elif counted and module in self.points and module + 1 in self.points:
            for (side, order), kept in (self.groups or {k: m[None] for k, m in self.matrices.items()}).items():
                if side == "key" and order == "full":
                    at, before = (self.points.index(p) for p in (module + 1, module))
                    shares[order] = kept[:, at] - kept[:, before]
                elif side == "key":
                    shares[order] = kept[:, module]
        if not shares:
            name = inside_name(module) if inside else f"{'mlp' if module % 2 else 'attn'} {module // 2}'s output"
            remedy = f"inside=[{name!r}]" if inside else "sides=('key',) or both, and submodule='both'"
            raise ValueError(
                f"this transport of {self.metadata['model']!r} ({self.metadata['tokens']}) cannot carry keys that read "
                f"{name}: fit it with {remedy}"
            )
        return replace(
            self,
            matrices={("key", order): kept.sum(0)[None] for order, kept in shares.items()},
            energies={},
            group_energies={},
            groups={("key", order): kept[:, None] for order, kept in shares.items()} if self.groups else {},
            metadata={**self.metadata, "points": str(module + 1), "keys_read": "modules"},
        )

    @property
    def _of_module(self) -> bool:
        """Whether this is what `reading` gives: both orders hold one matrix, without an identity."""
        return "keys_read" in self.metadata

    def layer_terms(self, side: Side, point: int, layer: int) -> list[tuple[int, Tensor | None]]:
        """The first-order terms by layer, in the reference's order: (label, matrix [D, D], None for the identity).

        Value: the identity under ``layer``, then each later layer. Key: the identity under ``layer + 1``, then layer,
        layer − 1, …, 0. A module of the feature's own layer that lies past its point belongs to that layer's term.
        """
        kept = self._kept(side, "first_order")
        if self._of_module:
            return [(layer, kept[0])]
        modules = range(point, 2 * self.n_layers) if side == "value" else range(point)
        terms: dict[int, Tensor] = {}
        for i in modules:
            terms[i // 2] = terms[i // 2] + kept[i] if i // 2 in terms else kept[i]
        layers: list[tuple[int, Tensor | None]] = [(k, terms[k]) for k in sorted(terms, reverse=side == "key")]
        if side == "key":
            return [(layer + 1, None), *layers]
        if layers and layers[0][0] == layer:
            return [(layer, self._identity(kept, "first_order") + terms[layer]), *layers[1:]]
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
        sets = self.energies[side, order][self.points.index(point)]
        vectors = vectors.to(sets)
        energy = torch.einsum("nd,rde,ne->rn", vectors, sets, vectors)
        mean = energy.mean(0).clamp_min(torch.finfo(energy.dtype).tiny)
        direct = self.apply(vectors, side, order, point).square().sum(-1)
        ratio = direct / mean
        error = torch.zeros_like(mean) if len(sets) == 1 else energy.std(0) / len(sets) ** 0.5
        return (1 - ratio).clamp(0, 1), ratio * error / mean

    def check_model(self, model: Model) -> None:
        """Raise ValueError when the transport was fitted on another model."""
        found = (model.n_layers, model.d_model)
        if found != (self.n_layers, self.d_model):
            raise ValueError(
                f"transport of {self.metadata['model']!r} has (layers, d_model) = {(self.n_layers, self.d_model)}, but "
                f"model {model.name!r} has {found}; fit a transport on this model"
            )
        difference = model.difference_from(self.metadata)
        if difference is not None:
            raise ValueError(f"transport was fitted on {self.metadata['model']!r} with {difference}; fit it again")

    def save(self, path: str | Path) -> Path:
        """Write the transport to a safetensors file, completely or not at all. Returns the path.

        Raises:
            OSError: The file could not be written.
        """
        tensors = {"centre": self.centre, "group_centres": self.group_centres}
        # With groups, the matrices are their sum.
        tables = {"group": self.groups} if self.groups else {"matrix": self.matrices}
        for kind, table in {**tables, "energy": self.energies, "group_energy": self.group_energies}.items():
            tensors |= {f"{kind}.{side}.{order}": tensor for (side, order), tensor in table.items()}
        tensors |= {f"inside.{order}.{module}": tensor for (order, module), tensor in self.inside.items()}
        return write_transport(Path(path), {n: t for n, t in tensors.items() if t is not None}, self.metadata)

    def _at(self, kept: Tensor, side: Side, order: Order, point: int, identity: bool = True) -> Tensor:
        """[..., D, D] of the point from what is kept, [..., P, D, D]."""
        if not 0 <= point <= 2 * self.n_layers:
            raise ValueError(f"point {point} is outside a model of {self.n_layers} layers")
        if order == "full" or self._of_module:
            if point not in self.points:
                raise ValueError(
                    f"this transport of {self.metadata['model']!r} ({self.metadata['tokens']}) holds no matrix for "
                    f"{point_name(point)}, only for {', '.join(map(point_name, self.points))}; fit_transport makes "
                    "one with every point"
                )
            return matrix_at(kept, side, "full", self.points.index(point))
        found = matrix_at(kept, side, order, point)
        return found + self._identity(kept, order) if identity else found

    def _identity(self, kept: Tensor, order: Order) -> Tensor:
        """What an order adds to the sum of its kept terms: I for the first order, 0 for the full one."""
        if order == "full" or self._of_module:
            return kept.new_zeros(())
        return torch.eye(self.d_model, dtype=kept.dtype, device=kept.device)

    def _need_groups(self) -> None:
        if not self.groups:
            raise ValueError("this transport keeps no groups of sequences: fit it with groups=8")

    def _kept(self, side: Side, order: Order) -> Tensor:
        if (side, order) not in self.matrices:
            have = ", ".join("/".join(key) for key in self.matrices)
            raise ValueError(f"this transport holds {have}, not {side}/{order}; fit it with sides and orders to match")
        return self.matrices[side, order]


def load_transport(path: str | Path) -> Transport:
    """Read a transport written by `Transport.save`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, truncated, no transport, or holds NaN or infinite values.
    """
    tables, inside, others, metadata = read_transport(Path(path))
    matrices = tables["matrix"] or {pair: kept.sum(0) for pair, kept in tables["group"].items()}
    centres = others.get("centre"), others.get("group_centres")
    return Transport(
        matrices, centres[0], metadata, tables["energy"], tables["group"], centres[1], tables["group_energy"], inside
    )
