"""Walks: directions carried through the linearised model, up (tangents) or down (cotangents).

The residual stream has 2L + 1 **points**: 2l before layer l's attention, 2l + 1 between its attention and its MLP,
2L at the end; ``post`` of layer l is point 2l + 2. Module i (attention of layer l for i = 2l, its MLP for i = 2l + 1)
leads from point i to point i + 1. The value side looks from a point to the end, the key side from a point back to the
embedding. After every module a walk sets masked (padding) positions to zero.

- *full* chains the modules: t ← m ∘ (t + J_i t).
- *first order* (the paper's approximation) gives every module the same direction and adds the results up. The
  reference masks the result but not the direction there, so a key-side direction also enters at padded queries;
  `masked_vjp` and `masked_jvp` keep to that.

Axes: C directions, B sequences, S positions, D d_model, P = 2L + 1 points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from querylens_fast.models.autodiff import graph_bytes
from querylens_fast.models.blocks import LinearPart
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens

Side = Literal["value", "key"]
Order = Literal["full", "first_order"]
Submodule = Literal["both", "attn", "mlp"]


ENOUGH_ROWS = {"cpu": 4096, "cuda": 262_144}
"""GEMM rows (directions × positions) walked at once: on a CPU more of them only leave the cache (measured)."""


@dataclass(frozen=True)
class Linearised:
    """The model linearised at a batch of sequences: 2L modules (None where left out) and the mask [B, S, 1]."""

    modules: list[LinearPart | None]
    mask: Tensor
    rows: slice
    padded: bool
    """Whether the mask hides anything."""

    def jvp(self, i: int, t: Tensor) -> Tensor:
        module = self.modules[i]
        return torch.zeros_like(t) if module is None else module.jvp(t)

    def vjp(self, i: int, g: Tensor) -> Tensor:
        module = self.modules[i]
        return torch.zeros_like(g) if module is None else module.vjp(g)

    def everywhere(self, directions: Tensor) -> Tensor:
        """directions [C, D] put at every position, [C, B, S, D]."""
        return directions[:, None, None, :].expand(-1, *self.mask.shape[:2], -1)

    def push(self, i: int, t: Tensor) -> Tensor:
        """One step up: m ∘ (t + J_i t)."""
        t = self.jvp(i, t).add_(t)
        return t.mul_(self.mask) if self.padded else t

    def pull(self, i: int, g: Tensor) -> Tensor:
        """One step down: m ∘ (g + J_iᵀ g)."""
        g = self.vjp(i, g).add_(g)
        return g.mul_(self.mask) if self.padded else g


@dataclass(frozen=True)
class Budget:
    """How many sequences and directions are held at once, so that memory stays under ``max_memory_gib``."""

    rows: int
    directions: int

    @classmethod
    def plan(cls, model: Model, length: int, max_memory_gib: float) -> Budget:
        """Half of the memory for one batch's linearisation, half for the directions that walk through it.

        Raises:
            ValueError: Not even one sequence and one direction fit.
        """
        kept, moving = _bytes_per_sequence(model, length)
        available = max_memory_gib * 2**30 / 2
        if available < max(kept, moving):
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
        modules += [attention if submodule != "mlp" else None, mlp if submodule != "attn" else None]
    return Linearised(modules, valid[..., None].to(model.dtype), rows, padded)


def batches(n: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` covering range(n)."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def position_sum(t: Tensor) -> Tensor:
    """[C, D] sum of t [C, B, S, D] over sequences and positions, in float32 or wider."""
    return t.sum((1, 2), dtype=torch.promote_types(t.dtype, torch.float32))


def walk(lin: Linearised, start: Tensor, point: int, side: Side, order: Order) -> Tensor:
    """Carry ``start`` [C, B, S, D] from ``point`` to the end (value) or back to the embedding (key).

    Returns the transported directions at every position, [C, B, S, D], zero at masked ones.
    """
    total = None
    for _, total in walk_terms(lin, start, point, side, order):  # noqa: B007
        pass
    if total is None:
        raise ValueError(f"no walk from point {point}")
    return total


def walk_terms(
    lin: Linearised, start: Tensor, point: int, side: Side, order: Order
) -> Iterator[tuple[int | None, Tensor]]:
    """The walk of `walk`, step by step: (module index or None for the start, running total).

    For the first order the running total grows by each module's own term; for the full walk it is the chained state.
    """
    modules = range(point, len(lin.modules)) if side == "value" else range(point - 1, -1, -1)
    t = start * lin.mask
    yield None, t
    for i in modules:
        if order == "full":
            t = lin.push(i, t) if side == "value" else lin.pull(i, t)
        else:
            t = t + first_order_term(lin, start, i, side)
        yield i, t


def first_order_term(lin: Linearised, start: Tensor, i: int, side: Side) -> Tensor:
    """Module i's own contribution m ∘ J_i v (value) or m ∘ J_iᵀ v (key), [C, B, S, D]."""
    term = lin.jvp(i, start) if side == "value" else lin.vjp(i, start)
    return term * lin.mask
