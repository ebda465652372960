"""Sources: dictionaries from files, folders, releases and objects.

`load_dictionary` reads sae-lens folders, releases and objects, plain safetensors, Qwen-Scope ``.pt`` and Gemma Scope
``.npz`` files. Orientation differs by format (sae-lens keeps W_enc as [D, n], Qwen-Scope as [n, D]); it is decided by
name and shape, and refused where neither decides. No file runs code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.coders import Coder, coder_from
from querylens_fast.dictionaries import Dictionary
from querylens_fast.hooks import Kind, place
from querylens_fast.rows import FileRows, MemoryRows, Rows


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
