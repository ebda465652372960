"""Dictionaries from one weights file or one object: tensors and configuration put together and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.config_files import section
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.formats import Format, Settings, find_format
from querylens_fast.dictionaries.hook_points import Kind, place
from querylens_fast.dictionaries.orientation import Sides
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
_VECTORS = ("b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "threshold", "log_threshold", "log_jumprelu_threshold",
            "topk_threshold")  # fmt: skip
"""The vectors that a coder may need; others, such as an optimiser's, are left in the file."""


@dataclass(frozen=True)
class Asked:
    """What the caller of `load_dictionary` says about a dictionary; None: nothing."""

    layer: int | None = None
    kind: Kind | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None


def from_file(path: Path, asked: Asked) -> Dictionary:
    """A dictionary from its weights file, of any format of the table. Errors as in `load_dictionary`."""
    tensors, metadata = open_tensors(path)
    known, match = find_format(path, tensors)
    if known.beside:
        tensors |= open_tensors(path.parent / known.beside.replace("{1}", match[1]))[0]
    name = str(path.parent) if path.name == SAE_LENS_WEIGHTS else str(path)
    ending = f"_{match[1]}" if match.re.groups else ""
    vectors = _vectors(name, tensors, ending)
    sides = Sides(name, known, match, tensors, vectors)
    values, keys = sides.of(known.values), sides.of(known.keys)
    settings = _settings(known, path)
    if "threshold" in vectors:
        # Some write it in the weights alone.
        jumps = {"standard": "jumprelu", "transcoder": "jumprelu_transcoder"}
        named = str(settings.get("architecture", ""))
        settings = {**settings, "architecture": jumps[named]} if named in jumps else settings
    if asked.hook_name is None and "unknown_site" in settings:
        raise ValueError(
            f"dictionary {name!r} ({known.name}) does not say what it reads: that would be in "
            f"{settings['unknown_site']} above it; pass hook_name= (and hook_name_out= for a transcoder)"
        )

    def coder(matrices: bool) -> Coder:
        return coder_from(settings, _coder_weights(tensors, vectors, values, keys, matrices))

    load_coder = coder if "architecture" in settings else None
    asked = replace(asked, hook_name=asked.hook_name or metadata.get("hook_name"))
    return _assemble(name, settings, values, keys, load_coder, asked)


def _vectors(name: str, tensors: Mapping[str, StoredTensor], ending: str) -> dict[str, Tensor]:
    """Biases and thresholds under sae-lens's names, without the layer that cross-layer files end them in."""
    found = {}
    for key, tensor in tensors.items():
        bare = key.removesuffix(ending) if ending else key
        bare = _SAE_LENS_NAMES.get(bare, bare)
        if bare in _VECTORS and len(tensor.shape) < 2:
            found[bare] = tensor.read()
            if not torch.isfinite(found[bare].float()).all():
                raise ValueError(f"dictionary {name!r}: {bare} holds NaN or inf")
    return found


def _settings(known: Format, path: Path) -> Settings:
    """The configuration beside a weights file in sae-lens's terms."""
    config = known.read_config(path)
    try:
        return known.settings(path, config)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"the configuration of {str(path)!r} is not one of {known.name} ({type(error).__name__}: {error}); "
            f"expected its settings in {' or '.join(known.config)}"
        ) from error


def _coder_weights(
    tensors: Mapping[str, StoredTensor],
    vectors: Mapping[str, Tensor],
    values: Rows | None,
    keys: Rows | None,
    matrices: bool,
) -> dict[str, Tensor]:
    """All of a dictionary's tensors, under sae-lens's names and turned as it has them; see `Dictionary.load_coder`."""
    weights = dict(vectors)
    for name, rows in (("W_dec", values), ("W_enc", keys)):
        if rows is not None:
            found = rows.read(slice(None)) if matrices else torch.empty(rows.shape, device="meta")
            weights[name] = found if name == "W_dec" else found.T.contiguous()
    weights |= {name: tensor.read() for name, tensor in tensors.items() if name.startswith("attn_layers.")}
    if "W_skip" in tensors:
        weights["W_skip"] = tensors["W_skip"].read()
    if "affine_skip_connection" in tensors:
        weights["W_skip"] = tensors["affine_skip_connection"].read().T
    return weights


def from_object(sae: Any, asked: Asked) -> Dictionary:
    """A dictionary from a sae-lens object, whose tensors it shares. Errors as in `load_dictionary`."""
    cfg = sae.cfg.to_dict() if hasattr(getattr(sae, "cfg", None), "to_dict") else {}
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    hooks = {k: getattr(metadata, k, None) or getattr(sae.cfg, k, None) for k in ("hook_name", "hook_name_out")}
    architecture = getattr(sae.cfg, "architecture", "standard")
    cfg = {**cfg, "architecture": architecture() if callable(architecture) else architecture, "metadata": hooks}
    weights = {k: v.detach() for k, v in sae.state_dict().items()}
    W_enc = getattr(sae, "W_enc", None)
    name = f"{getattr(metadata, 'model_name', None) or 'model'}/{hooks['hook_name'] or cfg['architecture']}"
    keys = None if W_enc is None else MemoryRows(W_enc.detach().mT)

    def coder(matrices: bool) -> Coder:
        bare = {k: v.to("meta") for k, v in weights.items() if k in ("W_enc", "W_dec") and not matrices}
        return coder_from(cfg, weights | bare)

    return _assemble(name, cfg, MemoryRows(sae.W_dec.detach()), keys, coder, asked)


def _assemble(
    name: str,
    cfg: Settings,
    values: Rows | None,
    keys: Rows | None,
    coder: Callable[[bool], Coder] | None,
    asked: Asked,
) -> Dictionary:
    if values is None and keys is None:
        raise ValueError(f"dictionary {name!r} holds neither W_dec nor W_enc")
    metadata, architecture = section(cfg, "metadata", Path(name)), str(cfg.get("architecture", ""))
    layer = asked.layer if asked.layer is not None else cfg.get("layer")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ValueError(f"the configuration of {name!r} has layer={layer!r}; expected a layer number from 0")
    hooks = [
        str(given or metadata.get(key) or cfg.get(key) or "")
        for key, given in (("hook_name", asked.hook_name), ("hook_name_out", asked.hook_name_out))
    ]
    kind = asked.kind or ("transcoder" if "transcoder" in architecture else None)
    tied = architecture == "matching_pursuit" or (architecture == "temporal" and cfg.get("tied_weights", True))
    keys = values if tied and keys is None else keys
    _check_sides(name, cfg, values, keys)
    layer, kind, reads, writes = place(name, hooks[0], hooks[1], layer, kind)
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


def _check_sides(name: str, cfg: Settings, values: Rows | None, keys: Rows | None) -> None:
    """Raise ValueError for vectors that are no directions of what the model computes, or sides that do not agree."""
    if "whiten" in str(cfg.get("normalize_activations")):
        raise ValueError(
            f"dictionary {name!r} was trained on whitened activations (normalize_activations "
            f"{cfg['normalize_activations']!r}): its vectors are not directions of the residual stream; fold the "
            "whitening into them first"
        )
    if values is None or keys is None:
        return
    if values.shape[1] != keys.shape[1]:
        raise ValueError(
            f"dictionary {name!r} has values of width {values.shape[1]} but keys of width {keys.shape[1]}: it does not "
            "read and write one residual stream"
        )
    if values.shape[0] != keys.shape[0]:
        raise ValueError(f"dictionary {name!r} has {values.shape[0]} values but {keys.shape[0]} keys")
