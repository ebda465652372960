"""Dictionaries: where keys and values come from, and where in the model they act.

A `Dictionary` gives rows of values (what a feature writes) and keys (what it reads), block by block, straight from a
memory-mapped file when it has one, and names the point of the residual stream each side acts at (`walks` numbers the
points). `load_dictionary` reads sae-lens folders, releases and objects, plain safetensors, Qwen-Scope ``.pt`` and
Gemma Scope ``.npz`` files; `directions` and `neuron_dictionary` make one from a matrix and from a model's MLP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.coders import Coder, coder_from
from querylens_fast.hooks import STREAM, Kind, place
from querylens_fast.models import Model, as_model
from querylens_fast.rows import FeatureIds, FileRows, MemoryRows, Rows


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
        if self.load_coder is None:
            raise ValueError(
                f"dictionary {self.name!r} ({self.kind}) has vectors but no encoder configuration: it cannot be run; "
                "token_change and zero_out need a sae-lens SAE or transcoder, or MLP neurons"
            )
        return self.load_coder()

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
        if isinstance(features, (slice, range)):
            features = list(range(*features.indices(n))) if isinstance(features, slice) else list(features)
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
        bad = ~torch.isfinite(found).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            feature = row + (ids.start or 0) if isinstance(ids, slice) else int(ids[row])
            raise ValueError(f"dictionary {self.name!r}: the {side} vector of feature {feature} holds NaN or inf")
        return found


def _parse_range(text: str, n: int) -> list[int]:
    """Ids from "a:b", "7" or "1,5,9"."""
    try:
        if ":" in text:
            start, stop = (int(x) if x else None for x in text.split(":"))
            return list(range(*slice(start, stop).indices(n)))
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"features={text!r}; expected 'all', 'start:stop' or ids like '1,5,9'") from None


def load_dictionary(
    source: Any,
    sae_id: str | None = None,
    layer: int | None = None,
    *,
    kind: Kind | None = None,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
) -> Dictionary:
    """A dictionary from a file, a folder, a release, or an object.

    Args:
        source: A folder in sae-lens's format (cfg.json, sae_weights.safetensors); a safetensors file with W_dec [n, D]
            and/or W_enc [D, n]; a Qwen-Scope ``.sae.pt`` or Gemma Scope ``.npz`` file; a sae-lens release (with
            ``sae_id``; needs sae-lens); a sae-lens object; or a `Dictionary`.
        sae_id: The id within a release.
        layer: The layer, where the source does not say.
        kind: "sae" or "transcoder", where the source does not say.
        hook_name: The hook it reads, where the source does not say (default: the residual stream after the layer, or
            the MLP's input for a transcoder).
        hook_name_out: The hook it writes, likewise.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: Damaged or truncated file, wrong or contradicting shapes, unknown layer or hook.
    """
    if isinstance(source, Dictionary):
        return source
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "W_dec"):
            raise ValueError(
                f"dictionary is a {type(source).__name__}; expected a path, a release or an object with W_dec"
            )
        return _from_object(source, layer)
    path = Path(source)
    if path.is_dir():
        if not (path / "cfg.json").is_file():
            raise FileNotFoundError(f"{str(path)!r} has no cfg.json: it is not a folder in sae-lens's format")
        return _from_folder(path, layer, kind, hook_name, hook_name_out)
    if path.suffix == ".safetensors" and path.is_file():
        if path.name == "sae_weights.safetensors" and (path.parent / "cfg.json").is_file():
            return _from_folder(path.parent, layer, kind, hook_name, hook_name_out)
        return _from_safetensors(path, {}, layer, kind, hook_name, hook_name_out)
    if path.suffix in (".pt", ".npz") and path.is_file():
        return _from_tensors(str(path), _read_tensors(path), {}, layer, kind, hook_name, hook_name_out)
    if sae_id is None:
        raise FileNotFoundError(
            f"dictionary {str(source)!r}: no such file or folder; for a sae-lens release pass sae_id= too"
        )
    return _from_release(str(source), sae_id, layer)


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


def _from_folder(
    path: Path, layer: int | None, kind: Kind | None, hook_name: str | None, hook_name_out: str | None
) -> Dictionary:
    try:
        cfg = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path / 'cfg.json')!r} is not valid JSON: {error}") from error
    weights = path / "sae_weights.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{str(path)!r} has a cfg.json but no sae_weights.safetensors")
    return _from_safetensors(weights, cfg, layer, kind, hook_name, hook_name_out, name=str(path))


def _from_safetensors(
    path: Path,
    cfg: Mapping[str, Any],
    layer: int | None,
    kind: Kind | None,
    hook_name: str | None,
    hook_name_out: str | None,
    name: str | None = None,
) -> Dictionary:
    from safetensors import SafetensorError, safe_open

    name = name or str(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            hook_name = hook_name or (file.metadata() or {}).get("hook_name")
            small = {key: file.get_tensor(key) for key, shape in shapes.items() if len(shape) < 2}
    except SafetensorError as error:
        raise ValueError(f"dictionary file {str(path)!r} is damaged or truncated: {error}") from error
    for key, tensor in small.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"dictionary {name!r}: {key} holds NaN or inf")

    def rows(key: str) -> Rows | None:
        shape = shapes.get(key)
        if shape is None:
            return None
        transposed = _is_transposed(name, key, shapes)
        n, d = (shape[1], shape[0]) if transposed else shape
        return FileRows(str(path), key, (n, d), transposed)

    def coder() -> Coder:
        from safetensors.torch import load_file

        return coder_from(cfg, load_file(str(path)))

    return _assemble(
        name, cfg, rows("W_dec"), rows("W_enc"), coder if cfg else None, layer, kind, hook_name, hook_name_out
    )


def _is_transposed(name: str, key: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Does the file hold this matrix as [D, n]? By its name, and by the other matrix where the two disagree."""
    shape = shapes[key]
    if len(shape) != 2:
        raise ValueError(f"dictionary {name!r}: {key} is {list(shape)}; expected a matrix")
    if key == "W_enc" and "W_dec" in shapes:
        n, d = shapes["W_dec"]
        if tuple(shape) == (d, n):
            return True
        if tuple(shape) == (n, d):
            return False
        raise ValueError(f"dictionary {name!r}: W_enc is {list(shape)} but W_dec is {[n, d]}; expected {[d, n]}")
    return key == "W_enc"


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.pt`` (weights only) or ``.npz`` (no pickles) file."""
    import pickle
    import zipfile

    try:
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"dictionary file {str(path)!r} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"dictionary file {str(path)!r} holds a {type(loaded).__name__}; expected named tensors")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def _from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    cfg: Mapping[str, Any],
    layer: int | None,
    kind: Kind | None,
    hook_name: str | None,
    hook_name_out: str | None,
) -> Dictionary:
    n_features = next((len(tensors[k]) for k in ("b_enc", "threshold") if k in tensors), None)

    def rows(key: str) -> Rows | None:
        if key not in tensors:
            return None
        matrix = tensors[key]
        if matrix.ndim != 2:
            raise ValueError(f"dictionary {name!r}: {key} is {list(matrix.shape)}; expected a matrix")
        if n_features is None:
            turned = key == "W_enc"
        elif matrix.shape[0] == matrix.shape[1]:
            raise ValueError(
                f"dictionary {name!r}: {key} is square {list(matrix.shape)}, so its orientation is not known; "
                "store it as safetensors with W_dec [n, d] and W_enc [d, n]"
            )
        elif n_features not in matrix.shape:
            raise ValueError(f"dictionary {name!r}: {key} is {list(matrix.shape)}, no side of which is {n_features}")
        else:
            turned = matrix.shape[0] != n_features
        return MemoryRows(matrix.mT if turned else matrix)

    return _assemble(name, cfg, rows("W_dec"), rows("W_enc"), None, layer, kind, hook_name, hook_name_out)


def _from_object(sae: Any, layer: int | None) -> Dictionary:
    cfg = sae.cfg.to_dict() if hasattr(getattr(sae, "cfg", None), "to_dict") else {}
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    hooks = {k: getattr(metadata, k, None) or getattr(sae.cfg, k, None) for k in ("hook_name", "hook_name_out")}
    architecture = getattr(sae.cfg, "architecture", "standard")
    cfg = {**cfg, "architecture": architecture() if callable(architecture) else architecture, "metadata": hooks}
    weights = {k: v.detach() for k, v in sae.state_dict().items()}
    W_enc = getattr(sae, "W_enc", None)
    name = f"{getattr(metadata, 'model_name', None) or 'model'}/{hooks['hook_name'] or cfg['architecture']}"
    return _assemble(
        name,
        cfg,
        MemoryRows(sae.W_dec.detach()),
        None if W_enc is None else MemoryRows(W_enc.detach().mT),
        lambda: coder_from(cfg, weights),
        layer,
        None,
        None,
        None,
    )


def _from_release(release: str, sae_id: str, layer: int | None) -> Dictionary:
    try:
        import sae_lens
    except ImportError as error:
        raise ImportError(
            f"{release!r} is no local file, so it is taken for a sae-lens release; loading one needs "
            "`pip install querylens-fast[sae-lens]`"
        ) from error
    try:
        sae = sae_lens.SAE.from_pretrained(release=release, sae_id=sae_id, device="cpu")
    except Exception as error:
        raise FileNotFoundError(
            f"dictionary {release!r}/{sae_id!r} could not be loaded by sae-lens: {type(error).__name__}: {error}"
        ) from error
    dictionary = _from_object(sae[0] if isinstance(sae, tuple) else sae, layer)
    dictionary.name = f"{release}/{sae_id}"
    return dictionary


def _assemble(
    name: str,
    cfg: Mapping[str, Any],
    values: Rows | None,
    keys: Rows | None,
    coder: Callable[[], Coder] | None,
    layer: int | None,
    kind: Kind | None,
    hook_name: str | None,
    hook_name_out: str | None,
) -> Dictionary:
    if values is None and keys is None:
        raise ValueError(f"dictionary {name!r} holds neither W_dec nor W_enc")
    metadata = cfg.get("metadata") or {}
    architecture = str(cfg.get("architecture", ""))
    hook_name = str(hook_name or metadata.get("hook_name") or cfg.get("hook_name") or "")
    hook_name_out = str(hook_name_out or metadata.get("hook_name_out") or cfg.get("hook_name_out") or "")
    if kind is None and "transcoder" in architecture:
        kind = "transcoder"
    if values is not None and keys is not None and values.shape[0] != keys.shape[0]:
        raise ValueError(f"dictionary {name!r} has {values.shape[0]} values but {keys.shape[0]} keys")
    n, d = (values or keys).shape  # type: ignore[union-attr]
    if architecture == "matching_pursuit" and keys is None:
        keys = values
    layer, kind, points, refusals = place(name, hook_name, hook_name_out, layer, kind)
    return Dictionary(
        name,
        kind,
        layer,
        n,
        d,
        values,
        keys,
        points["value"],
        points["key"],
        hook_name,
        hook_name_out or hook_name,
        details={
            "architecture": architecture,
            "model_name": str(metadata.get("model_name") or ""),
            "normalize_activations": str(cfg.get("normalize_activations") or "none"),
        },
        refusals=refusals,
        load_coder=coder,
    )
