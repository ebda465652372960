"""Dictionaries: keys and values of features, and where in the model they act.

A `Dictionary` gives rows of values (what a feature writes) and keys (what it reads), block by block, straight from a
memory-mapped file when it has one, and names the point of the residual stream each side acts at (`walks` numbers the
points). `sources.load_dictionary` reads them; `directions` and `neuron_dictionary` make one from a matrix and from a
model's MLP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.hook_points import BEFORE_POST_NORM, STREAM, Kind, parse_hook
from querylens_fast.dictionaries.rows import FeatureIds, MemoryRows, Rows
from querylens_fast.dictionaries.sae import Coder
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model


@dataclass
class Dictionary:
    """Features of one layer: their values and keys, and the points of the residual stream they act at.

    value_point and key_point are None, with the reason in ``refusals``, where that side has no vector in the residual
    stream. `coder` runs the dictionary, where it is one that can be run.
    """

    name: str
    kind: Kind
    layer: int
    n_features: int
    d_model: int
    value_rows: Rows | None
    key_rows: Rows | None
    value_point: int | None
    key_point: int | None
    hook_name: str = ""
    hook_name_out: str = ""
    load_coder: Callable[[], Coder] | None = None
    details: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def values(self, ids: FeatureIds) -> Tensor:
        """Value vectors [n, D] of the features ids (int64 tensor or slice)."""
        return self._read("value", self.value_rows, ids)

    def keys(self, ids: FeatureIds) -> Tensor:
        """Key vectors [n, D] of the features ids (int64 tensor or slice)."""
        return self._read("key", self.key_rows, ids)

    def vectors(self, side: str, ids: FeatureIds) -> Tensor:
        """`values` or `keys`."""
        return self.values(ids) if side == "value" else self.keys(ids)

    def point(self, side: str) -> int:
        """The point of the residual stream where the features write (value) or read (key).

        Raises:
            ValueError: That side does not act on the residual stream, or the dictionary does not have it.
        """
        point = self.value_point if side == "value" else self.key_point
        if point is None:
            raise ValueError(f"dictionary {self.name!r}: {self.refusals.get(side, f'it has no {side} side')}")
        return point

    @cached_property
    def coder(self) -> Coder:
        """The encoder and decoder, read when first asked for.

        Raises:
            ValueError: The dictionary has vectors only, or an architecture that cannot be run here.
        """
        self.check_runs()
        assert self.load_coder is not None
        return self.load_coder()

    def check_runs(self) -> None:
        """Raise ValueError when the dictionary has vectors only and cannot be run."""
        if self.load_coder is None:
            raise ValueError(
                f"dictionary {self.name!r} ({self.kind}) has vectors but no encoder configuration: it cannot be run; "
                "that needs a sae-lens SAE or transcoder, or MLP neurons"
            )

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the dictionary's shape, of the points it acts at and of some of its rows.

        It tells a replaced file from the old one, and one matrix at two places.
        """
        shape = self.n_features, self.d_model, self.value_point, self.key_point
        digest = hashlib.sha256(",".join(map(str, shape)).encode())
        ids = torch.linspace(0, max(self.n_features - 1, 0), min(16, self.n_features)).long()
        for rows in (self.value_rows, self.key_rows):
            if rows is not None:
                digest.update(rows.read(ids).detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def check_model(self, model: Model) -> None:
        """Raise ValueError when the dictionary cannot belong to the model."""
        if self.d_model != model.d_model:
            raise ValueError(
                f"dictionary {self.name!r} has d_model {self.d_model}, but model {model.name!r} has {model.d_model}: "
                "is this dictionary from another model?"
            )
        if not 0 <= self.layer < model.n_layers:
            raise ValueError(
                f"dictionary {self.name!r} is of layer {self.layer}, but model {model.name!r} has layers "
                f"0 to {model.n_layers - 1}"
            )
        for side, hook in (("key", self.hook_name), ("value", self.hook_name_out or self.hook_name)):
            at = (parse_hook(hook) or (0, ""))[1]
            module = BEFORE_POST_NORM[side].get(at)
            if module and not getattr(model.blocks[self.layer], module).adds_directly:
                raise ValueError(
                    f"dictionary {self.name!r}: its {side}s are of {hook!r}, which {model.name!r} "
                    f"({model.architecture}) norms before it adds it to the residual stream (or scales it); dictionaries "
                    "on either side of that are supported"
                )

    def select(self, features: Any = None) -> Tensor:
        """Feature ids, int64, from None or "all", a slice, a range "a:b", an int, a list or a tensor.

        Raises:
            ValueError: An id outside the dictionary (the message gives it).
        """
        n = self.n_features
        if features is None or (isinstance(features, str) and features == "all"):
            return torch.arange(n)
        if isinstance(features, str):
            features = _parse_range(features, n)
        if isinstance(features, slice):
            features = range(*features.indices(n))
        if isinstance(features, range):
            features = features.start + features.step * torch.arange(len(features))
        ids = torch.as_tensor(features)
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim > 1:
            raise ValueError(f"features are {list(ids.shape)} of {ids.dtype}; expected a list of integer feature ids")
        ids = ids.reshape(-1).long().cpu()
        outside = ids[(ids < 0) | (ids >= n)]
        if len(outside):
            raise ValueError(f"feature {int(outside[0])} is not in {self.name!r}, which has features 0 to {n - 1}")
        return ids

    def _read(self, side: str, rows: Rows | None, ids: FeatureIds) -> Tensor:
        if rows is None:
            raise ValueError(f"dictionary {self.name!r}: {self.refusals.get(side, f'it holds no {side} vectors')}")
        found = rows.read(ids)
        # Numbers of one byte have no isfinite of their own.
        bad = ~torch.isfinite(found.float() if found.dtype.itemsize == 1 else found).all(-1)
        if bool(bad.any()):
            wanted = torch.arange(self.n_features)[ids] if isinstance(ids, slice) else ids.cpu()
            broken = wanted[bad.cpu()]
            raise ValueError(
                f"dictionary {self.name!r}: the {side} vector of feature {int(broken[0])} holds NaN or inf "
                f"({len(broken)} such in rows {int(wanted.min())} to {int(wanted.max())} of {rows}); fetch the file "
                "again, or pass features= without them"
            )
        return found


def _parse_range(text: str, n: int) -> range | list[int]:
    """Ids from "a:b", "7" or "1,5,9"."""
    try:
        if ":" in text:
            start, stop = (int(x) if x else None for x in text.split(":"))
            return range(*slice(start, stop).indices(n))
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"features={text!r}; expected 'all', 'start:stop' or ids like '1,5,9'") from None


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
    if f"hook_{point}" not in STREAM:
        raise ValueError(f"point is {point!r}; expected resid_pre, resid_mid or resid_post")
    at = 2 * layer + STREAM[f"hook_{point}"]
    rows, key_rows = MemoryRows(matrix), MemoryRows(keys)
    hook = f"blocks.{layer}.hook_{point}"
    return Dictionary(name, "directions", layer, *rows.shape, rows, key_rows, at, at, hook, hook)


def neuron_dictionary(model: Any, layer: int) -> Dictionary:
    """The MLP neurons of a layer: values are W_out's columns, keys W_in's rows (the up projection of a gated MLP)."""
    model = as_model(model)
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer is {layer}, but model {model.name!r} has layers 0 to {model.n_layers - 1}")
    mlp = model.blocks[layer].mlp
    values = MemoryRows(mlp.W_out.mT)
    hooks = f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"
    keys = MemoryRows(mlp.W_in)
    name = f"neurons of layer {layer}"
    return Dictionary(name, "neurons", layer, *values.shape, values, keys, 2 * layer + 2, 2 * layer + 1, *hooks)
