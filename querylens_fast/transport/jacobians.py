"""Jacobians of the model at a batch of sequences, and the sweep that carries directions through them.

The residual stream has 2L + 1 **points**: 2l before layer l's attention, 2l + 1 between its attention and its MLP,
2L at the end; ``post`` of layer l is point 2l + 2. Module i (attention of layer l for i = 2l, its MLP for i = 2l + 1)
leads from point i to point i + 1.

A *sweep* carries directions from one point through the modules, one after the other: ``forward`` (tangents, t + J t)
towards the end, ``backward`` (cotangents, g + Jᵀ g) towards the embedding. Features' value vectors move forward and
their key vectors backward; fitting goes the other way, because one sweep of the basis from the far end gives the
matrices of every point.

- order *full* chains the modules, and sets masked (padding) positions to zero at the start and after every module.
- order *first_order* (the paper's approximation) gives every module the same direction and adds the results up. The
  reference masks the result but not the direction there, so a key also enters at padded queries. A sweep of this order
  masks nothing: mask the state of a feature's sweep, or the start of its transpose.

Axes: C directions, B sequences, S positions, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from querylens_fast.models.autodiff import graph_bytes
from querylens_fast.models.blocks import LinearPart
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens

Side = Literal["value", "key"]
Order = Literal["full", "first_order"]
Direction = Literal["forward", "backward"]
Submodule = Literal["both", "attn", "mlp"]

FEATURE_DIRECTION: dict[Side, Direction] = {"value": "forward", "key": "backward"}
"""How a feature's own vector travels."""
FITTING_DIRECTION: dict[Side, Direction] = {"value": "backward", "key": "forward"}
"""How the basis travels when all points' matrices are fitted at once: the transpose of `FEATURE_DIRECTION`."""
ENOUGH_ROWS = {"cpu": 4096, "cuda": 262_144}
"""GEMM rows (directions × positions) carried at once: on a CPU larger ones only leave the cache (measured)."""


@dataclass(frozen=True)
class Linearised:
    """The model linearised at a batch of sequences: 2L modules (None where left out) and the mask [B, S, 1]."""

    modules: list[LinearPart | None]
    mask: Tensor
    rows: slice
    padded: bool
    """Whether the mask hides anything."""

    def apply(self, i: int, t: Tensor, direction: Direction) -> Tensor:
        """J_i t (forward) or J_iᵀ t (backward) of t [C, B, S, D]; zeros for a module that is left out."""
        module = self.modules[i]
        if module is None:
            return torch.zeros_like(t)
        return module.jvp(t) if direction == "forward" else module.vjp(t)

    def step(self, i: int, t: Tensor, direction: Direction) -> Tensor:
        """One step of a full sweep: mask ∘ (t + J_i t)."""
        t = self.apply(i, t, direction).add_(t)
        return t.mul_(self.mask) if self.padded else t

    def inside(self, module: int, at: int, t: Tensor) -> Tensor:
        """The tangent of what the output matrix of ``module`` reads, [C, B, S, W], of t [C, B, S, D] at point ``at``.

        ``at`` is ``module`` itself, or where its layer is one unit, that (`models.inside.home`).
        """
        linear: Any = self.modules[at]
        return linear.inside(t, module)

    def everywhere(self, directions: Tensor) -> Tensor:
        """directions [C, D] put at every position, [C, B, S, D] (a view)."""
        return directions[:, None, None, :].expand(-1, *self.mask.shape[:2], -1)

    def far_end(self, direction: Direction) -> int:
        """The point where a sweep through all modules starts."""
        return 0 if direction == "forward" else len(self.modules)

    def points(self, start: int, direction: Direction) -> range:
        """The points that a sweep from ``start`` passes, ``start`` included."""
        return range(start, len(self.modules) + 1) if direction == "forward" else range(start, -1, -1)


@dataclass(frozen=True)
class Budget:
    """How many sequences (rows) and directions are held at once, so that memory stays under ``max_memory_gib``."""

    rows: int
    directions: int

    @classmethod
    def plan(cls, model: Model, length: int, max_memory_gib: float, n_inside: int = 0) -> Budget:
        """Half of the memory for one batch's linearisation, half for the directions carried through it.

        By autodiff, what is read inside ``n_inside`` modules takes a second graph of each of them.

        Raises:
            ValueError: Not even one sequence and one direction fit.
        """
        kept, moving = _bytes_per_sequence(model, length)
        if model.own is not None:
            kept += kept * n_inside // model.n_layers
        available = max_memory_gib * 2**30 / 2
        if not available >= max(kept, moving):  # also NaN
            need = 2 * max(kept, moving) / 2**30
            raise ValueError(
                f"max_memory_gib is {max_memory_gib}, but one sequence of {length} tokens needs {need:.3g}; "
                "raise it or use shorter sequences"
            )
        # A few hundred positions fill a GEMM; beyond that more directions beat more sequences.
        rows = max(1, min(int(available // kept), -(-256 // length)))
        enough = ENOUGH_ROWS.get(model.device.type, ENOUGH_ROWS["cuda"]) // (rows * length)
        return cls(rows, max(1, min(int(available // (moving * rows)), max(enough, 8))))


def _bytes_per_sequence(model: Model, length: int) -> tuple[int, int]:
    """(kept by the linearisation of one sequence, moved by one direction through it), in bytes."""
    if model.own is not None:
        return graph_bytes(model, length)
    item = torch.finfo(model.dtype).bits // 8
    neurons = max(block.mlp.width for block in model.blocks)
    widths = max(block.attention.width for block in model.blocks)
    heads = max(block.attention.n_heads for block in model.blocks)
    layer = 6 * model.d_model + 5 * widths + 4 * neurons + 3 * heads * length
    return length * item * layer * model.n_layers, length * item * (
        8 * model.d_model + 6 * widths + 3 * neurons + 4 * heads * length
    )


def check_point(model: Model, point: int) -> None:
    """Raise ValueError for a point that the model does not have."""
    last = 2 * model.n_layers
    if not 0 <= point <= last:
        raise ValueError(f"point is {point}; expected 0 to {last}, as `jacobians` numbers them")
    if point % 2 and not model.has_submodules:
        raise ValueError(
            f"point is {point}, resid_mid of layer {point // 2}, but model {model.name!r} is linearised by whole "
            "layers: take resid_pre or resid_post"
        )


def check_submodules(model: Model, orders: Sequence[Order], submodule: Submodule = "both") -> None:
    """Raise ValueError when a model of opaque layers is asked for what needs attention and MLP apart."""
    if model.has_submodules:
        return
    for wrong, given in (("first_order" in orders, f"orders={tuple(orders)}"), (submodule != "both", f"{submodule=}")):
        if wrong:
            raise ValueError(
                f"model {model.name!r} is linearised by whole layers, without attention and MLP apart: {given} is not "
                "to be had; use orders=('full',) and submodule='both'"
            )


def counts(module: int, submodule: str) -> bool:
    """Whether ``submodule`` ("both", "attn" or "mlp") leaves the Jacobian of a module in."""
    return submodule in ("both", "mlp" if module % 2 else "attn")


@torch.no_grad()
def linearise(
    model: Model, tokens: Tokens, rows: slice, submodule: Submodule = "both", through_norms: bool = True
) -> Linearised:
    """Linearise every module at the residuals of tokens[rows].

    Residuals come from a plain forward pass without a mask; the Jacobians are taken with the padding mask as the
    attention mask. With padding in mid-row the two differ: this is the reference's rule.
    """
    ids, valid = tokens.ids[rows].to(model.device), tokens.valid_mask[rows].to(model.device)
    plain = model.masking(ids)
    padded = not bool(valid.all())
    masked = model.masking(ids, valid) if padded else plain
    x = model.first_residual(ids)
    modules: list[LinearPart | None] = []
    for block in model.blocks:
        attention = block.attention.linearise(x, masked, through_norms)
        x = x + (block.attention(x, plain) if padded else attention.output)
        mlp = block.mlp.linearise(x, through_norms)
        x = x + mlp.output
        modules += [part if counts(i, submodule) else None for i, part in enumerate((attention, mlp))]
    return Linearised(modules, valid[..., None].to(model.dtype), rows, padded)


def batches(n: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` covering range(n)."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def position_sum(t: Tensor) -> Tensor:
    """[C, D] sum of t [C, B, S, D] over sequences and positions, in float32 or wider."""
    return t.sum((1, 2), dtype=torch.promote_types(t.dtype, torch.float32))


def sweep(
    lin: Linearised, start: Tensor, point: int, direction: Direction, order: Order = "full"
) -> Iterator[tuple[int | None, Tensor]]:
    """Carry ``start`` [C, B, S, D] from ``point`` to the model's end (forward) or to its embedding (backward).

    Yields:
        (None, the state at ``point``), then (i, the state [C, B, S, D] after module i). Of the full order the state is
        zero at masked positions; of the first order it is ``start`` plus the modules' terms so far, unmasked (see the
        module's docstring). A yielded state is not changed afterwards.
    """
    modules = range(point, len(lin.modules)) if direction == "forward" else range(point - 1, -1, -1)
    state = start * lin.mask if order == "full" else start
    yield None, state
    for i in modules:
        if order == "full":
            state = lin.step(i, state, direction)
        else:
            state = state + lin.apply(i, start, direction)
        yield i, state


def walk(lin: Linearised, start: Tensor, point: int, side: Side, order: Order) -> Tensor:
    """The last state of a feature's sweep: ``start`` carried to the end (value) or to the embedding (key).

    Returns:
        [C, B, S, D], zero at masked positions.
    """
    state = start
    for _, state in sweep(lin, start, point, FEATURE_DIRECTION[side], order):  # noqa: B007
        pass
    return state if order == "full" else state * lin.mask
