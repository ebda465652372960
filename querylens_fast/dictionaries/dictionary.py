"""Dictionaries: the key and value vectors of a layer's features, and where in the model they act.

A `Dictionary` reads its vectors block by block, straight from its file when it has one. `load_dictionary` makes one
from a file, a release or an object; `directions` and `neuron_dictionary` from a matrix and from a model's MLP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.digest import SideDigest, content_digest, side_digests
from querylens_fast.dictionaries.hook_points import HookPoint, Kind, hook_point
from querylens_fast.dictionaries.rows import CarriedRows, FeatureIds, Rows
from querylens_fast.dictionaries.sae import Coder
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.inside import output_weight
from querylens_fast.models.model import Model


@dataclass(eq=False)
class Dictionary:
    """Features of one layer: their values (what they write) and keys (what they read).

    Attributes:
        name: Shown in results and errors.
        kind: "sae", "transcoder", "neurons" or "directions".
        layer: The layer whose stream the values are written to.
        n_features: How many features there are.
        d_model: The width of the residual stream; of its own vectors where they are not in the stream.
        value_rows: Values [n, D], or None.
        key_rows: Keys [n, D], or None.
        value_point: The point of the residual stream where the features write; None: see ``refusals``.
        key_point: The point of the residual stream that the features read, or None.
        hook_name: The name of the hook point that keys read.
        hook_name_out: The name of the hook point that values are written at.
        load_coder: Reads the encoder and decoder, where the dictionary can be run; given False, W_enc and W_dec are
            left without data (on the meta device).
        details: Architecture, model name and activation normalisation, as the source gives them.
        refusals: For a side ("value", "key") that acts at no point of the residual stream: why.
        no_direction: For a side whose vectors are no directions of the residual stream: why.
        key_module: The module whose output or inside the keys read, where they read no point (`HookPoint.module`).
        carried: The values have been carried into the residual stream by a weight of the model (`on`).
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
    hook_name: str
    hook_name_out: str
    load_coder: Callable[[bool], Coder] | None = None
    details: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    no_direction: dict[str, str] = field(default_factory=dict)
    carried: bool = False
    key_module: int | None = None

    @classmethod
    def at(
        cls,
        name: str,
        kind: Kind,
        layer: int,
        rows: tuple[Rows | None, Rows | None],
        hooks: tuple[HookPoint, HookPoint],
    ) -> Dictionary:
        """A dictionary of (values, keys) at the hook points (read, written)."""
        values, keys = rows
        n, d = (values or keys).shape  # type: ignore[union-attr]
        sides = {"key": hooks[0], "value": hooks[1]}
        return cls(
            name,
            kind,
            layer,
            n,
            d,
            values,
            keys,
            sides["value"].point("value"),
            sides["key"].point("key"),
            hooks[0].name,
            hooks[1].name,
            refusals={side: hook.refusal(side) for side, hook in sides.items() if hook.point(side) is None},
            no_direction={side: hook.refusal(side) for side, hook in sides.items() if not hook.is_direction(side)},
            key_module=hooks[0].module,
        )

    @property
    def reads(self) -> HookPoint:
        """The hook point that keys read."""
        return hook_point(self.hook_name)

    @property
    def writes(self) -> HookPoint:
        """The hook point that values are written at."""
        return hook_point(self.hook_name_out or self.hook_name)

    def point(self, side: str) -> int:
        """The point of the residual stream where the features write (value) or read (key).

        Raises:
            ValueError: That side does not act on the residual stream.
        """
        point = self.value_point if side == "value" else self.key_point
        if point is None:
            raise ValueError(f"dictionary {self.name!r}: {self.refusals.get(side, f'it has no {side} side')}")
        return point

    def check_direction(self, side: str) -> None:
        """Raise ValueError unless the side's vectors are directions of the residual stream.

        Presets without a transport, cosines and products with embeddings need that, although no point.
        """
        if side in self.no_direction:
            raise ValueError(f"dictionary {self.name!r}: {self.no_direction[side]}")

    def values(self, ids: FeatureIds) -> Tensor:
        """Value vectors [n, D] of the features ids (int64 tensor or slice)."""
        return self._read("value", self.value_rows, ids)

    def keys(self, ids: FeatureIds) -> Tensor:
        """Key vectors [n, D] of the features ids (int64 tensor or slice)."""
        return self._read("key", self.key_rows, ids)

    def vectors(self, side: str, ids: FeatureIds) -> Tensor:
        """`values` or `keys`."""
        return self.values(ids) if side == "value" else self.keys(ids)

    @cached_property
    def coder(self) -> Coder:
        """The encoder and decoder, read when first asked for.

        Raises:
            ValueError: The dictionary has vectors only, or an architecture that cannot be run here.
        """
        self.check_runs()
        assert self.load_coder is not None
        coder = self.load_coder(True)
        for name, weight in coder.weights.items():
            if not bool(weight.float().sum().isfinite()) and not bool(weight.float().isfinite().all()):
                raise ValueError(f"dictionary {self.name!r} cannot be run: its {name} holds NaN or inf; fetch it again")
        return coder

    def check_runs(self) -> None:
        """Raise ValueError when the dictionary has vectors only and cannot be run."""
        if self.load_coder is None:
            raise ValueError(
                f"dictionary {self.name!r} ({self.kind}) has vectors but no encoder configuration: it cannot be run; "
                "that needs a SAE or transcoder with its configuration, or MLP neurons"
            )

    @cached_property
    def fingerprint(self) -> str:
        """What tells the dictionary from others: "A-B", digests of 32 hexadecimal digits each.

        A is of the shape, of the points it acts at and of 16 rows a side, all that earlier versions recorded; B is of
        its whole content (`digest.content_digest`, which reads all vectors once). Compare by `runs.run_record.agree`.
        """
        shape = self.n_features, self.d_model, self.value_point, self.key_point
        digest = hashlib.sha256(",".join(map(str, shape)).encode())
        ids = torch.linspace(0, max(self.n_features - 1, 0), min(16, self.n_features)).long()
        for rows in (self.value_rows, self.key_rows):
            if rows is not None:
                digest.update(rows.read(ids).detach().float().cpu().contiguous().numpy().tobytes())
        return f"{digest.hexdigest()[:32]}-{content_digest(self._side_digests, self._settings())}"

    def check_finite(self, side: str, ids: Tensor) -> None:
        """Raise ValueError when a vector of the features ids holds NaN or inf; reads as much as `fingerprint`."""
        if side not in self._side_digests:
            raise ValueError(f"dictionary {self.name!r}: it holds no {side} vectors")
        broken = torch.tensor(self._side_digests[side].not_finite, dtype=torch.int64)
        self._refuse_broken(side, ids, broken[torch.isin(broken, ids)])

    @cached_property
    def _side_digests(self) -> dict[str, SideDigest]:
        return side_digests(self.value_rows, self.key_rows)

    def _settings(self) -> Coder | None:
        """The coder without its matrices; None where the dictionary cannot be run."""
        try:
            return None if self.load_coder is None else self.load_coder(False)
        except ValueError:
            return None

    def on(self, model: Model) -> Dictionary:
        """The dictionary with its values in the model's residual stream, checked against the model.

        Values at attn.hook_z and mlp.hook_post are carried by the layer's W_O or W_out; others are left as they are.

        Raises:
            ValueError: The dictionary cannot belong to the model.
        """
        if self.carried:
            return self
        for at in {self.reads.layer, self.writes.layer}:
            if not 0 <= at < model.n_layers:
                raise ValueError(
                    f"dictionary {self.name!r} is of layer {at}, but model {model.name!r} has layers "
                    f"0 to {model.n_layers - 1}"
                )
        if not self.writes.site.carried_by:
            _check_width(self, model, model.d_model)
        bound = self
        for side, hook in (("key", self.reads), ("value", self.writes)):
            module = hook.site.before_post_norm
            inside = side == "key" and hook.site.reads_inside  # a norm lies behind that
            if module and not inside and not getattr(model.blocks[hook.layer], module).adds_directly:
                why = (
                    f"its {side}s are of {hook.name!r}, which {model.name!r} ({model.architecture}) norms before it "
                    "adds it to the residual stream (or scales it); dictionaries on either side of that are supported"
                )
                bound = replace(
                    bound,
                    **{f"{side}_point": None},
                    refusals={**bound.refusals, side: why},
                    no_direction={**bound.no_direction, side: why},
                    key_module=None if side == "key" else bound.key_module,
                )
            elif side == "value" and hook.site.carried_by and self.value_rows is not None:
                bound = bound.carry(model)
        if model.parallel:
            bound = replace(bound, value_point=bound._beside("value"), key_point=bound._beside("key"))
        if bound is self or self.load_coder is None:
            return bound
        load = self.load_coder
        # The caller's own, so that it is read once.
        return replace(bound, load_coder=lambda matrices: self.coder if matrices else load(False))

    def _beside(self, side: str) -> int | None:
        """The point of a side where attention and MLP both read the stream before the layer and are added behind it."""
        point, hook = (self.value_point, self.writes) if side == "value" else (self.key_point, self.reads)
        if point is None or point % 2 == 0 or hook.site.name == "resid_mid":
            return point
        return point + 1 if side == "value" else point - 1

    def carry(self, model: Model, unit_norm: bool = False) -> Dictionary:
        """The dictionary with its values (at unit length) carried by W_O or W_out, whatever norm follows."""
        site, layer = self.writes.site, self.writes.layer
        assert self.writes.module is not None
        try:
            weight = output_weight(model, self.writes.module)
        except UnsupportedModelError as error:
            raise ValueError(
                f"dictionary {self.name!r} is written at {self.writes.name!r}, but there is no single "
                f"{site.carried_by} that would carry it into the residual stream: {error}"
            ) from None
        assert self.value_rows is not None
        _check_width(self, model, weight.shape[1])
        return replace(
            self,
            d_model=model.d_model,
            value_rows=CarriedRows(self.value_rows, weight, unit_norm),
            value_point=2 * layer + (site.value or 0),
            refusals={side: why for side, why in self.refusals.items() if side != "value"},
            no_direction={side: why for side, why in self.no_direction.items() if side != "value"},
            carried=True,
        )

    def check_model(self, model: Model) -> None:
        """Raise ValueError when the dictionary cannot belong to the model."""
        self.on(model)

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
        try:
            ids = torch.as_tensor(features)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"features is {str(features)[:80]!r}; expected a list of integer feature ids") from error
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim > 1:
            raise ValueError(f"features are {list(ids.shape)} of {ids.dtype}; expected a list of integer feature ids")
        ids = ids.reshape(-1).long().cpu()
        outside = ids[(ids < 0) | (ids >= n)]
        if len(outside):
            raise ValueError(f"feature {int(outside[0])} is not in {self.name!r}, which has features 0 to {n - 1}")
        return ids

    def _read(self, side: str, rows: Rows | None, ids: FeatureIds) -> Tensor:
        if rows is None:
            raise ValueError(f"dictionary {self.name!r}: it holds no {side} vectors")
        found = rows.read(ids)
        # Numbers of one byte have no isfinite of their own.
        bad = ~torch.isfinite(found.float() if found.dtype.itemsize == 1 else found).all(-1)
        if bool(bad.any()):
            wanted = torch.arange(self.n_features)[ids] if isinstance(ids, slice) else ids.cpu()
            self._refuse_broken(side, wanted, wanted[bad.cpu()])
        return found

    def _refuse_broken(self, side: str, wanted: Tensor, broken: Tensor) -> None:
        if len(broken):
            rows = self.value_rows if side == "value" else self.key_rows
            raise ValueError(
                f"dictionary {self.name!r}: the {side} vector of feature {int(broken[0])} holds NaN or inf "
                f"({len(broken)} such in rows {int(wanted.min())} to {int(wanted.max())} of {rows}); fetch the file "
                "again, or pass features= without them"
            )


def _parse_range(text: str, n: int) -> range | list[int]:
    """Ids from "a:b", "7" or "1,5,9"."""
    try:
        if ":" in text:
            start, stop = (int(x) if x else None for x in text.split(":"))
            return range(*slice(start, stop).indices(n))
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"features={text!r}; expected 'all', 'start:stop' or ids like '1,5,9'") from None


def _check_width(dictionary: Dictionary, model: Model, width: int) -> None:
    if dictionary.d_model != width:
        raise ValueError(
            f"dictionary {dictionary.name!r} has d_model {dictionary.d_model}, but model {model.name!r} has {width}"
            f"{'' if width == model.d_model else ' at ' + repr(dictionary.writes.name)}: is this dictionary from "
            "another model?"
        )
