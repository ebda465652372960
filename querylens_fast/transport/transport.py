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

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from querylens_fast.models.model import Model
from querylens_fast.runs.atomic_write import whole
from querylens_fast.transport.jacobians import Order, Side

SIDES: tuple[Side, ...] = ("value", "key")
ORDERS: tuple[Order, ...] = ("full", "first_order")
FORMAT = "querylens_fast.transport/1"


def point_name(point: int) -> str:
    """What users call a point of the stream: "resid_post of layer 3"; the first point is layer 0's resid_pre."""
    if point == 0:
        return "resid_pre of layer 0"
    return f"resid_{'mid' if point % 2 else 'post'} of layer {(point - 1) // 2}"


@dataclass
class Transport:
    """Fitted transport matrices of one model over one token sample. Built by `fit_transport` or `load_transport`.

    matrices: (side, "full") → [2L + 1, D, D], the matrix of each point; (side, "first_order") → [2L, D, D], each
    module's term. Rows of a vector batch V [n, D] move as V Mᵀ. energies: (side, order) → [2L + 1, R, D, D], R groups
    of estimates of E[JᵀJ] (R = 1: exact). centre [D] is the mean token embedding over the valid positions, None where
    it is not known. An imported one (`jacobian_lens`) holds the matrices of its `points` alone.
    """

    matrices: dict[tuple[Side, Order], Tensor]
    centre: Tensor | None
    metadata: dict[str, str]
    energies: dict[tuple[Side, Order], Tensor] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return int(self.metadata["n_layers"])

    @property
    def d_model(self) -> int:
        return int(self.metadata["d_model"])

    @property
    def points(self) -> list[int]:
        """The points that "full" matrices are held for, in order; all 2L + 1 of a fitted transport."""
        given = self.metadata.get("points")
        return list(range(2 * self.n_layers + 1)) if given is None else [int(p) for p in given.split(",")]

    @property
    def n_valid(self) -> int:
        """N, the number of valid positions averaged over."""
        return int(self.metadata["n_valid"])

    def to(self, device: torch.device | str) -> Transport:
        """A copy whose tensors live on device."""
        return Transport(
            {k: m.to(device) for k, m in self.matrices.items()},
            None if self.centre is None else self.centre.to(device),
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
            if point not in self.points:
                raise ValueError(
                    f"this transport of {self.metadata['model']!r} ({self.metadata['tokens']}) holds no matrix for "
                    f"{point_name(point)}, only for {', '.join(map(point_name, self.points))}; fit_transport makes "
                    "one with every point"
                )
            return kept[self.points.index(point)]
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

        tensors = {} if self.centre is None else {"centre": self.centre.cpu().contiguous()}
        for kind, table in (("matrix", self.matrices), ("energy", self.energies)):
            for (side, order), tensor in table.items():
                tensors[f"{kind}.{side}.{order}"] = tensor.cpu().contiguous()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole(path) as partial:
                save_file(tensors, str(partial), metadata=self.metadata)
        except Exception as error:
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
            centre = file.get_tensor("centre") if "centre" in file.keys() else None
    except SafetensorError as error:
        raise ValueError(f"transport file {str(path)!r} is damaged or truncated: {error}") from error
    return Transport(matrices, centre, metadata, energies)
