"""Stream transitions: what happens to a feature's vector between where it acts and where it is read out.

Each is a function of vectors [n, D] at one point: nothing (identity), a fitted transport (first_order, full), a choice
between them for each feature (adaptive), or a tuned lens's translator. The ablations are in `ablations`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from querylens_fast.transport.jacobians import Order, Side
from querylens_fast.transport.transport import Transport

ADAPTIVE_CHOICES = ("identity", "first_order", "full")


@dataclass(frozen=True)
class Adaptive:
    """Adaptive fidelity: the most faithful transition whose mean still speaks for the contexts.

    The full transport counts every indirect path but averages over contexts; where its relative variance is high the
    average stands for none of them. So a feature takes ``full`` when rel_var(full) ≤ threshold, else ``first_order``
    when rel_var(first_order) ≤ threshold, else ``identity``, which has no variance. At the default of 0.5 the mean
    direction carries at least half of the energy. The paper leaves the choice open (Appendix E).
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"adaptive_threshold is {self.threshold}; expected a relative variance between 0 and 1")

    def __call__(self, transport: Transport, vectors: Tensor, side: Side, point: int) -> tuple[Tensor, Tensor]:
        """(moved [n, D], index into ADAPTIVE_CHOICES [n]) of vectors [n, D].

        Raises:
            ValueError: The transport has no energies (fit it with energy="probes" or "exact").
        """
        orders: tuple[Order, ...] = ("first_order", "full")
        moved = vectors.to(transport.matrix(side, "full", point))
        choice = torch.zeros(len(vectors), dtype=torch.int64, device=moved.device)
        for index, order in enumerate(orders, start=1):
            spread, _ = transport.rel_var(vectors, side, order, point)
            taken = spread <= self.threshold
            moved = torch.where(taken[:, None], transport.apply(vectors, side, order, point), moved)
            choice[taken] = index
        return moved, choice


@dataclass(frozen=True)
class TunedLens:
    """A tuned lens (arXiv 2303.08112): v + W_l v + b_l for a value written in layer l, identity at the last layer."""

    params: dict[str, Tensor]
    path: str
    digest: str = ""
    """Of the file."""

    @property
    def identity(self) -> dict[str, str]:
        """What tells this lens from another, for a result's metadata."""
        return {"path": self.path, "digest": self.digest}

    def __call__(self, vectors: Tensor, layer: int, n_layers: int) -> Tensor:
        """Translated vectors [n, D].

        Raises:
            ValueError: The file has no translator for the layer, or one of another width.
        """
        if layer == n_layers - 1:
            return vectors
        missing = [name for name in (f"{layer}.weight", f"{layer}.bias") if name not in self.params]
        if missing:
            raise ValueError(
                f"tuned lens {self.path!r} has no {' and '.join(missing)}; it holds {len(self.params)} tensors"
            )
        weight, bias = (self.params[f"{layer}.{part}"].to(vectors) for part in ("weight", "bias"))
        if weight.shape != (vectors.shape[1],) * 2:
            raise ValueError(
                f"tuned lens {self.path!r}: {layer}.weight is {list(weight.shape)}, but d_model is {vectors.shape[1]}"
            )
        return vectors + torch.nn.functional.linear(vectors, weight, bias)


def load_tuned_lens(path: str | Path) -> TunedLens:
    """Read the params file of the tuned-lens library; only tensors are admitted.

    Raises:
        FileNotFoundError: No such file: a missing lens is never taken for the identity.
        ValueError: The file is damaged or holds more than tensors.
    """
    import pickle

    if not Path(path).is_file():
        raise FileNotFoundError(f"tuned-lens params file {str(path)!r} does not exist")
    try:
        params = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"tuned-lens params file {str(path)!r} is damaged, or holds more than tensors: {error}"
        ) from error
    if not isinstance(params, dict) or not all(isinstance(v, Tensor) for v in params.values()):
        raise ValueError(f"tuned-lens params file {str(path)!r} does not hold named tensors")
    return TunedLens(dict(params), str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32])
