"""Dictionaries of matrices in memory: any directions, and the neurons of a model's MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.hook_points import hook_point
from querylens_fast.dictionaries.rows import MemoryRows
from querylens_fast.models.load import as_model


def directions(
    matrix: Tensor, *, layer: int, keys: Tensor | None = None, point: str = "resid_post", name: str = "directions"
) -> Dictionary:
    """A dictionary over any matrix of directions [n, D]: probes, steering vectors, matrix factors.

    Args:
        matrix: The value vectors; they serve as keys too unless ``keys`` is given.
        layer: The layer they live in.
        keys: Key vectors [n, D].
        point: "resid_pre", "resid_mid" or "resid_post" of that layer.
        name: Shown in results.
    """
    matrix = torch.as_tensor(matrix)
    keys = matrix if keys is None else torch.as_tensor(keys)
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"matrix is {list(matrix.shape)} of {matrix.dtype}; expected a float matrix [n, d_model]")
    if keys.shape != matrix.shape:
        raise ValueError(f"keys are {list(keys.shape)} but values are {list(matrix.shape)}; they must agree")
    if point not in ("resid_pre", "resid_mid", "resid_post"):
        raise ValueError(f"point is {point!r}; expected resid_pre, resid_mid or resid_post")
    hook = hook_point(f"blocks.{layer}.hook_{point}")
    return Dictionary.at(name, "directions", layer, (MemoryRows(matrix), MemoryRows(keys)), (hook, hook))


def neuron_dictionary(model: Any, layer: int) -> Dictionary:
    """The MLP neurons of a layer: values are W_out's columns, keys W_in's rows (the up projection of a gated MLP)."""
    model = as_model(model)
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer is {layer}, but model {model.name!r} has layers 0 to {model.n_layers - 1}")
    mlp = model.blocks[layer].mlp
    hooks = hook_point(f"blocks.{layer}.mlp.hook_in"), hook_point(f"blocks.{layer}.hook_mlp_out")
    rows = MemoryRows(mlp.W_out.mT), MemoryRows(mlp.W_in)
    return Dictionary.at(f"neurons of layer {layer}", "neurons", layer, rows, hooks)
