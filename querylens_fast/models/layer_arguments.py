"""What a model passes one of its layers beside the hidden states."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """What a model passes one of its layers beside the hidden states, and the queries that see any key there."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    sees: Tensor | None
    """[B or 1, S, 1] bool; None: all of them."""


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(hidden states, other positional arguments, other named ones) of a layer's call."""
    if args:
        return args[0], args[1:], dict(kwargs)
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def alike(a: Any, b: Any) -> bool:
    """Whether two layers' arguments are alike; what is no tensor counts as alike."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    return True


def repaired(positional: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
    """The arguments with a query that sees no key seeing all (for a finite softmax), and marked to give zero."""
    sees = None

    def repair(value: Any) -> Any:
        nonlocal sees
        if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-1] != value.shape[-2]:
            return value
        if value.dtype != torch.bool and not value.is_floating_point():
            return value
        if value.dtype == torch.bool:
            # The first query never sees the last key: some models mark what is hidden, most what is seen.
            marks_hidden = value.shape[-1] > 1 and bool(value[..., 0, -1].any())
            blind = ~(value ^ marks_hidden).any(-1, keepdim=True)
        else:
            blind = (value <= torch.finfo(value.dtype).min / 2).all(-1, keepdim=True)
        if not bool(blind.any()):
            return value
        sees = ~blind[:, 0]
        if value.dtype == torch.bool:
            return value & ~blind if marks_hidden else value | blind
        return value.masked_fill(blind, 0.0)

    # What the layers fill as they run is kept as it was at this layer.
    positional = tuple(copy.copy(v) if isinstance(v, Mapping) else repair(v) for v in positional)
    named = {name: copy.copy(v) if isinstance(v, Mapping) else repair(v) for name, v in named.items()}
    return Arguments(positional, named, sees)
