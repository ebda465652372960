"""Every weight of a model that reads a direction of the residual stream, or writes one, by name.

Readers (downstream of a value v) and writers (upstream of a key u), for every layer l and head h:

    blocks.l.mlp.W_in, W_gate          neurons: ⟨v, w⟩ for the row w of each neuron
    blocks.l.attn.W_Q, W_K, W_V        rows, row h·E + e of head h: ⟨v, w⟩
    blocks.l.attn.W_Q.heads, …         heads: ‖W_Q^h v‖ (W_K, W_V: key/value heads where they are grouped)
    blocks.l.attn.OV.h                 tokens: head h carries v on to the unembedding, unembed(W_O^h W_V^h v)
    unembed                            tokens, by the direct path: the logit lens of v
    blocks.l.mlp.W_out                 neurons: ⟨u, w⟩ for the column w of each neuron
    blocks.l.attn.W_O                  columns, column h·E + e of head h: ⟨u, w⟩
    blocks.l.attn.W_O.heads            heads: ‖W_O^hᵀ u‖
    blocks.l.attn.OV.h                 tokens: head h carries a token's embedding to u, ⟨embed, (W_O^h W_V^h)ᵀ u⟩
    embed                              tokens, by the direct path: ⟨embed, u⟩

A weight behind a norm is taken with that norm's scale (and LayerNorm's centring) folded in, W ∘ γ − its row means;
one in front of a norm (Gemma's post-norms) with that norm's on the other side. What depends on the position is left
out: the norm's division by the size of the stream, biases, attention patterns, activation functions, rotations, and
the norms of queries and keys inside attention (their scale too).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from querylens_fast.lens import readouts
from querylens_fast.models.blocks import Attention
from querylens_fast.models.model import Model
from querylens_fast.models.moe import NoSingleWeights
from querylens_fast.models.norms import AnyNorm, Norm, at_least_float32
from querylens_fast.topk.api import TopK, streamed_topk
from querylens_fast.transport.jacobians import Side

SCORES_AT_ONCE = 1 << 24
"""Projections held at a time when their norms are taken."""


Search = Callable[[Tensor, int, str], TopK]
"""(vectors [n, D], k, backend) → the k strongest and weakest of a target for each vector."""


@dataclass(frozen=True)
class Target:
    """Something that reads (or writes) directions at a point of the residual stream."""

    name: str
    layer: int | None
    point: int | None
    open: Callable[[], Search]
    """Reads or folds the weights; they are held as long as what is returned."""
    size: int
    """How many it can return."""
    fingerprint: str | None = None
    """Of a matrix from outside the model."""


def rows_target(
    name: str,
    layer: int | None,
    point: int | None,
    size: int,
    read: Callable[[], Tensor],
    fingerprint: str | None = None,
) -> Target:
    """A target whose score is the product with each row of the matrix [size, D] that ``read`` gives."""

    def opened() -> Search:
        matrix = read()
        return lambda vectors, k, backend: streamed_topk(vectors, matrix.to(vectors), k, backend=backend)

    return Target(name, layer, point, opened, size, fingerprint)


def weight_names(model: Model, side: Side) -> list[str]:
    """Every name of the module's table that this model has, readers for "value", writers for "key"."""
    names = []
    for layer, block in enumerate(model.blocks):
        attention, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        if not isinstance(block.attention, NoSingleWeights):
            weights = ("W_Q", "W_K", "W_V") if side == "value" else ("W_O",)
            names += [f"{attention}.{w}{kind}" for w in weights for kind in ("", ".heads")]
            names += [f"{attention}.OV.{head}" for head in range(block.attention.n_heads)]
        if not isinstance(block.mlp, NoSingleWeights):
            weights = ("W_in", "W_gate") if side == "value" else ("W_out",)
            names += [f"{mlp}.{w}" for w in weights if getattr(block.mlp, w) is not None]
    return [*names, "unembed"] if side == "value" else ["embed", *names]


def find_weights(model: Model, side: Side, pattern: str, final_norm: bool) -> list[Target]:
    """The weights that a name or a pattern with ``*``, ``?`` and ``[…]`` stands for.

    Raises:
        ValueError: There is none (the message lists what there is).
        UnsupportedModelError: That layer's module has no such single weight (a mixture of experts).
    """
    names = weight_names(model, side)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if found:
        return [_weight(model, side, name, final_norm) for name in found]
    layer, _, rest = pattern.removeprefix("blocks.").partition(".")
    if layer.isdigit() and int(layer) < model.n_layers:
        part = model.blocks[int(layer)].attention if rest.startswith("attn.") else model.blocks[int(layer)].mlp
        if isinstance(part, NoSingleWeights):
            part.refuse(rest.partition(".")[2] or "weight")
    last = model.n_layers - 1
    kinds = sorted({re.sub(r"\d+$", "*", name.split(".", 2)[2]) for name in names if "." in name})
    examples = ("W_in", "W_Q", "unembed") if side == "value" else ("W_out", "W_O", "embed")
    raise ValueError(
        f"targets is {pattern!r}; expected a Dictionary, a matrix, or a weight of layers 0 to {last} like "
        f"'blocks.{last}.mlp.{examples[0]}', 'blocks.*.attn.{examples[1]}.heads' or {examples[2]!r}; each layer has "
        f"{', '.join(kinds)}"
    )


def _weight(model: Model, side: Side, name: str, final_norm: bool) -> Target:
    if "." not in name:
        return _end(model, side, final_norm)
    _, number, part, weight, *more = name.split(".")
    layer = int(number)
    if part == "mlp":
        mlp = model.blocks[layer].mlp
        if side == "value":
            matrix = getattr(mlp, weight)
            return rows_target(name, layer, 2 * layer + 1, len(matrix), lambda: fold_in(mlp.norm, matrix))
        return rows_target(name, layer, 2 * layer + 2, mlp.width, lambda: fold_out(mlp.post_norm, mlp.W_out).mT)
    attention, point = model.blocks[layer].attention, 2 * layer + (side == "key")
    if weight == "OV":
        return _circuit(model, side, name, layer, int(more[0]), final_norm)

    def read() -> Tensor:
        if side == "key":
            return fold_out(attention.post_norm, attention.W_O).mT
        return fold_in(attention.norm, getattr(attention, weight))

    n_rows = attention.width if weight in ("W_Q", "W_O") else len(attention.W_K)
    if not more:
        return rows_target(name, layer, point, n_rows, read)
    n_heads = attention.n_heads if weight in ("W_Q", "W_O") else attention.n_kv_heads

    def opened() -> Search:
        matrix = read()
        return lambda vectors, k, backend: heads_topk(vectors, matrix.to(vectors), n_heads, k, backend)

    return Target(name, layer, point, opened, n_heads)


def heads_topk(vectors: Tensor, weight: Tensor, n_heads: int, k: int, backend: str) -> TopK:
    """The heads by ‖W^h x‖ for vectors x [n, D] and weight [H·E, D]: a block of projections at a time, then its norms.

    Returns k of the H heads a side; equal norms by the lower head.
    """
    weight = at_least_float32(weight)
    eye = torch.eye(n_heads, dtype=weight.dtype, device=vectors.device)
    found = []
    for block in vectors.split(max(1, SCORES_AT_ONCE // len(weight))):
        norms = (block.to(weight) @ weight.mT).unflatten(1, (n_heads, -1)).norm(dim=-1)
        found.append(streamed_topk(norms, eye, k, backend=backend, precision="float32"))
    return TopK.concatenate(found)


def head_weights(attention: Attention, head: int) -> tuple[Tensor, Tensor]:
    """(W_V [E, D], W_O [D, E]) of one query head, norms folded, in float32 or wider; its OV matrix is W_O W_V."""
    groups = attention.n_heads // attention.n_kv_heads
    E = attention.width // attention.n_heads
    W_V = at_least_float32(attention.W_V.unflatten(0, (-1, E))[head // groups])
    W_O = at_least_float32(attention.W_O[:, head * E : (head + 1) * E])
    return fold_in(attention.norm, W_V), fold_out(attention.post_norm, W_O)


def fold_in(norm: AnyNorm, weight: Tensor) -> Tensor:
    """Rows [n, D] that read the stream as the weight reads the normed stream, up to the norm's size at a position."""
    if not isinstance(norm, Norm):
        return weight
    scaled = weight if norm.weight is None else weight * norm.weight.to(weight)
    return scaled - scaled.mean(-1, keepdim=True) if norm.centred else scaled


def fold_out(norm: AnyNorm, weight: Tensor) -> Tensor:
    """Columns [D, n] that write to the stream what the weight's do through the norm, up to its size at a position."""
    if not isinstance(norm, Norm):
        return weight
    centred = weight - weight.mean(0) if norm.centred else weight
    return centred if norm.weight is None else centred * norm.weight.to(weight)[:, None]


def _circuit(model: Model, side: Side, name: str, layer: int, head: int, final_norm: bool) -> Target:
    attention = model.blocks[layer].attention
    scorer = readouts.unembed(model, final_norm) if side == "value" else readouts.embed(model)

    def opened() -> Search:
        W_V, W_O = head_weights(attention, head)
        first, second = (W_V.mT, W_O.mT) if side == "value" else (W_O, W_V)
        return lambda vectors, k, backend: scorer.topk((vectors.to(W_V) @ first @ second).to(vectors), k, backend)

    return Target(name, layer, 2 * layer + (side == "key"), opened, len(scorer.W))


def _end(model: Model, side: Side, final_norm: bool) -> Target:
    """Where the stream ends (value) or begins (key): the tokens by the direct path."""
    if side == "value":
        scorer, name, point = readouts.unembed(model, final_norm), "unembed", 2 * model.n_layers
    else:
        scorer, name, point = readouts.embed(model), "embed", 0
    return Target(name, None, point, lambda: scorer.topk, len(scorer.W))
