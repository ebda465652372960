"""Sources: dictionaries from files, folders, releases and objects.

`load_dictionary` reads any file of the table in `formats`, sae-lens releases and sae-lens objects. Orientation differs
by format (sae-lens keeps W_enc as [D, n], Qwen-Scope as [n, D]); it is decided by shape and name, and refused where
neither decides. Matrices stay in their files and are read in part; no file runs code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.formats import ANY_FILE, Format, find_format, split_axes, weights_in
from querylens_fast.dictionaries.hook_points import Kind, place
from querylens_fast.dictionaries.rows import MemoryRows, Rows, SummedRows
from querylens_fast.dictionaries.sae import Coder, coder_from
from querylens_fast.dictionaries.tensor_files import StoredTensor, open_tensors

SAE_LENS_WEIGHTS = "sae_weights.safetensors"
_SAE_LENS_NAMES = {
    "encoder.bias": "b_enc",
    "encoder_linear.bias": "b_enc",
    "decoder.bias": "b_dec",
    "decoder_linear.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "mag_bias": "b_mag",
    "gate_bias": "b_gate",
    "activation_function.threshold": "threshold",
}
"""What other formats call sae-lens's vectors."""


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
        source: A file or folder of sae-lens, Qwen-Scope, Gemma Scope 1 or 2, Llama Scope, EleutherAI sparsify,
            dictionary_learning or circuit-tracer; a safetensors file with W_dec [n, D] and/or W_enc [D, n]; a sae-lens
            release (with ``sae_id``; needs sae-lens); a sae-lens object; or a `Dictionary`.
        sae_id: The id within a release.
        layer: The layer, where the source does not say.
        kind: "sae" or "transcoder", where the source does not say.
        hook_name: The hook it reads, where the source does not say (default: the residual stream after the layer, or
            the MLP's input for a transcoder); where it does, this one counts.
        hook_name_out: The hook it writes, likewise.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: Damaged or truncated file, wrong or contradicting shapes, unknown layer or hook.
    """
    if isinstance(source, Dictionary):
        if any(given is not None for given in (sae_id, kind, hook_name, hook_name_out)) or layer not in (
            None,
            source.layer,
        ):
            raise ValueError(
                f"dictionary {source.name!r} of layer {source.layer} is loaded already; layer, kind and hook names are "
                "for what has yet to be loaded"
            )
        return source
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "W_dec"):
            raise ValueError(
                f"dictionary is a {type(source).__name__}; expected a path, a release or an object with W_dec"
            )
        return _from_object(source, layer, kind, hook_name, hook_name_out)
    path = Path(source)
    if path.is_dir():
        path = _weights_of(path, layer)
    if path.is_file():
        return _from_file(path, layer, kind, hook_name, hook_name_out)
    if sae_id is None:
        raise FileNotFoundError(
            f"dictionary {str(source)!r}: no such file or folder; for a sae-lens release pass sae_id= too"
        )
    return _from_release(str(source), sae_id, layer, kind, hook_name, hook_name_out)


def _weights_of(folder: Path, layer: int | None) -> Path:
    """The weights file a folder is about; ``layer`` chooses where it holds one for each."""
    found = weights_in(folder)
    if layer is not None and len(found) > 1:
        found = [path for path in found if re.findall(r"\d+", path.name)[-1:] == [str(layer)]] or found
    if not found:
        missing = [name for name in ("cfg.json", SAE_LENS_WEIGHTS) if not (folder / name).is_file()]
        raise FileNotFoundError(
            f"{str(folder)!r} has no {' and no '.join(missing)}, so it is not in sae-lens's format, and no weights "
            "file of another known format; if it holds a dictionary, name the file itself"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise ValueError(f"{str(folder)!r} holds {len(found)} dictionaries ({names}, …); name one, or pass layer=")
    return found[0]


def _from_file(
    path: Path, layer: int | None, kind: Kind | None, hook_name: str | None, hook_name_out: str | None
) -> Dictionary:
    tensors, metadata = open_tensors(path)
    known, match = find_format(path, tensors)
    if known.beside:
        tensors |= open_tensors(path.parent / known.beside.replace("{1}", match[1]))[0]
    name = str(path.parent) if path.name == SAE_LENS_WEIGHTS else str(path)
    small = {_SAE_LENS_NAMES.get(bare, bare): tensors[key] for key, bare in _bare_names(tensors, match).items()}
    small = {key: tensor.read() for key, tensor in small.items() if len(tensor.shape) < 2}
    for key, tensor in small.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"dictionary {name!r}: {key} holds NaN or inf")
    rows = _Sides(name, known, match, tensors, small)
    values, keys = rows.of(known.values), rows.of(known.keys)
    settings = known.settings(path, known.read_config(path))
    if "threshold" in small:
        # Written in the weights alone by some.
        jumps = {"standard": "jumprelu", "transcoder": "jumprelu_transcoder"}
        named = str(settings.get("architecture", ""))
        settings = {**settings, "architecture": jumps[named]} if named in jumps else settings
    if hook_name is None and "unknown_site" in settings:
        raise ValueError(
            f"dictionary {name!r} ({known.name}) does not say what it reads: that would be in "
            f"{settings['unknown_site']} above it; pass hook_name= (and hook_name_out= for a transcoder)"
        )

    def coder() -> Coder:
        return coder_from(settings, _coder_weights(tensors, small, values, keys))

    return _assemble(
        name,
        settings,
        values,
        keys,
        coder if "architecture" in settings else None,
        layer,
        kind,
        hook_name or metadata.get("hook_name"),
        hook_name_out,
    )


def _bare_names(tensors: Mapping[str, StoredTensor], match: re.Match[str]) -> dict[str, str]:
    """Tensor names without the layer that files of cross-layer transcoders end them in."""
    ending = f"_{match[1]}" if match.re.groups else ""
    return {name: name.removesuffix(ending) if ending else name for name in tensors}


@dataclass(frozen=True)
class _Sides:
    """The matrices of a dictionary file, turned to [n, D]."""

    name: str
    format: Format
    match: re.Match[str]
    tensors: Mapping[str, StoredTensor]
    small: Mapping[str, Tensor]

    def of(self, specs: Sequence[str]) -> Rows | None:
        """The rows of the first of these tensors that the file holds."""
        for spec in specs:
            key, axes = split_axes(spec, self.match)
            if key in self.tensors:
                tensor = self.tensors[key]
                if axes == "n,m,d" and len(tensor.shape) == 3:
                    return SummedRows(tensor.rows(False), tensor.shape[1])
                return tensor.rows(self._is_transposed(key, tensor.shape, axes))
        return None

    def _is_transposed(self, key: str, shape: tuple[int, ...], axes: str) -> bool:
        """Does the file hold this matrix as [D, n]? By its shape where that tells, else as the format has it."""
        if len(shape) != 2:
            raise ValueError(f"dictionary {self.name!r}: {key} is {list(shape)}; expected a matrix")
        n, known_by = self._n_features()
        if n is not None and n not in shape:
            raise ValueError(
                f"dictionary {self.name!r}: {key} is {list(shape)} but {known_by}; expected one axis of {n}"
            )
        if n is not None and shape[0] != shape[1]:
            return shape[0] != n
        if axes == "?" and shape[0] == shape[1]:
            raise ValueError(
                f"dictionary {self.name!r}: {key} is square {list(shape)}, so its orientation is not known; "
                "store it as safetensors with W_dec [n, d] and W_enc [d, n]"
            )
        return key == "W_enc" if axes == "?" else axes == "d,n"

    def _n_features(self) -> tuple[int | None, str]:
        """How many features there are, and what says so."""
        for name in ("b_enc", "b_gate", "threshold"):
            if name in self.small and self.small[name].ndim == 1:
                return len(self.small[name]), f"{name} has {len(self.small[name])} entries"
        for spec in self.format.values:
            key, axes = split_axes(spec, self.match)
            if key in self.tensors and axes != "?" and len(self.tensors[key].shape) >= 2:
                shape = self.tensors[key].shape
                return shape[axes.split(",").index("n")], f"{key} is {list(shape)}"
        return None, ""


def _coder_weights(
    tensors: Mapping[str, StoredTensor], small: Mapping[str, Tensor], values: Rows | None, keys: Rows | None
) -> dict[str, Tensor]:
    """All of a dictionary's tensors, under sae-lens's names and turned as it has them."""
    weights = dict(small)
    if values is not None:
        weights["W_dec"] = values.read(slice(None))
    if keys is not None:
        weights["W_enc"] = keys.read(slice(None)).T.contiguous()
    weights |= {name: tensor.read() for name, tensor in tensors.items() if name.startswith("attn_layers.")}
    if "W_skip" in tensors:
        weights["W_skip"] = tensors["W_skip"].read()
    if "affine_skip_connection" in tensors:
        weights["W_skip"] = tensors["affine_skip_connection"].read().T
    return weights


def _from_object(
    sae: Any, layer: int | None, kind: Kind | None, hook_name: str | None, hook_name_out: str | None
) -> Dictionary:
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
        kind,
        hook_name,
        hook_name_out,
    )


def _from_release(
    release: str,
    sae_id: str,
    layer: int | None,
    kind: Kind | None,
    hook_name: str | None,
    hook_name_out: str | None,
) -> Dictionary:
    try:
        import sae_lens
    except ImportError as error:
        raise ImportError(
            f"{release!r} is no local file, so it is taken for a sae-lens release; loading one needs "
            "`pip install querylens-fast[sae-lens]`"
        ) from error
    raw = _release_file(release, sae_id)
    if raw is not None:
        path, overrides = raw
        hooks = hook_name or overrides.get("hook_name"), hook_name_out or overrides.get("hook_name_out")
        dictionary = _from_file(path, layer, kind, *hooks)
        dictionary.name = f"{release}/{sae_id}"
        return dictionary
    try:
        sae = sae_lens.SAE.from_pretrained(release=release, sae_id=sae_id, device="cpu")
    except Exception as error:
        raise FileNotFoundError(
            f"dictionary {release!r}/{sae_id!r} could not be loaded by sae-lens: {type(error).__name__}: {error}"
        ) from error
    sae = sae[0] if isinstance(sae, tuple) else sae
    dictionary = _from_object(sae, layer, kind, hook_name, hook_name_out)
    dictionary.name = f"{release}/{sae_id}"
    if _is_cross_layer(release):
        dictionary.value_point = None
        dictionary.refusals["value"] = (
            "it is a layer of a cross-layer transcoder, and its values are the sum of what it writes to several "
            "layers; logit_lens_value reads that sum"
        )
    return dictionary


def _is_cross_layer(release: str) -> bool:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    return known is not None and "clt" in (known.conversion_func or "")


def _release_file(release: str, sae_id: str) -> tuple[Path, Mapping[str, Any]] | None:
    """(its weights file in the hub cache, sae-lens's own overrides) of a release whose file can be read in part.

    None where sae-lens changes the weights or their configuration as it loads them, or where the format is not in the
    table: then sae-lens loads it whole. Also None where nothing can be had: sae-lens says why.
    """
    from huggingface_hub import snapshot_download
    from sae_lens.loading.pretrained_saes_directory import get_config_overrides, get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    if (
        known is None
        or _is_cross_layer(release)
        or sae_id not in known.saes_map
        or known.norm_scaling_factor.get(sae_id) is not None
    ):
        return None
    place = known.saes_map[sae_id]
    try:
        wanted = [place, f"{place}/*", f"{place}.safetensors", "*.yaml"]
        root = Path(snapshot_download(known.repo_id, allow_patterns=wanted))
    except (OSError, ValueError):
        return None
    found = weights_in(root / place) if (root / place).is_dir() else [root / place, root / f"{place}.safetensors"]
    found = [path for path in found if path.is_file()]
    overrides = get_config_overrides(release, sae_id) or {}
    if len(found) != 1 or "normalize_activations" in overrides:
        return None
    known_format, _ = find_format(found[0], open_tensors(found[0])[0])
    return None if known_format in ANY_FILE else (found[0], overrides)


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
    layer = cfg.get("layer") if layer is None else layer
    architecture = str(cfg.get("architecture", ""))
    hook_name = str(hook_name or metadata.get("hook_name") or cfg.get("hook_name") or "")
    hook_name_out = str(hook_name_out or metadata.get("hook_name_out") or cfg.get("hook_name_out") or "")
    if kind is None and "transcoder" in architecture:
        kind = "transcoder"
    if "whiten" in str(cfg.get("normalize_activations")):
        raise ValueError(
            f"dictionary {name!r} was trained on whitened activations (normalize_activations "
            f"{cfg['normalize_activations']!r}): its vectors are not directions of the residual stream; fold the "
            "whitening into them first"
        )
    if values is not None and keys is not None and values.shape[1] != keys.shape[1]:
        raise ValueError(
            f"dictionary {name!r} has values of width {values.shape[1]} but keys of width {keys.shape[1]}: it does not "
            "read and write one residual stream"
        )
    if values is not None and keys is not None and values.shape[0] != keys.shape[0]:
        raise ValueError(f"dictionary {name!r} has {values.shape[0]} values but {keys.shape[0]} keys")
    tied = architecture == "temporal" and cfg.get("tied_weights", True)
    if keys is None and (tied or architecture == "matching_pursuit"):
        keys = values
    layer, kind, reads, writes = place(name, hook_name, hook_name_out, layer, kind)
    dictionary = Dictionary.at(name, kind, layer, (values, keys), (reads, writes))
    dictionary.load_coder = coder
    dictionary.details = {
        "architecture": architecture,
        "model_name": str(metadata.get("model_name") or cfg.get("model_name") or ""),
        "normalize_activations": str(cfg.get("normalize_activations") or "none"),
    }
    if isinstance(values, SummedRows):
        dictionary.value_point = None
        dictionary.refusals["value"] = (
            f"its features write to {values.m} layers, so no single transport carries them; "
            "logit_lens_value reads the sum of what they write"
        )
    return dictionary
