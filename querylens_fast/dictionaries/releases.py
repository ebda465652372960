"""Releases: dictionaries by the names that sae-lens's directory gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.files import Asked, from_file, from_object
from querylens_fast.dictionaries.formats import ANY_FILE, find_format, weights_in
from querylens_fast.dictionaries.tensor_files import open_tensors


def from_release(release: str, sae_id: str, asked: Asked) -> Dictionary:
    """A dictionary of a sae-lens release: read in part from its own file where that is possible, else by sae-lens.

    Raises:
        ImportError: sae-lens is not installed.
        FileNotFoundError: sae-lens cannot load it (the message says why).
    """
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
        hooks = {k: getattr(asked, k) or overrides.get(k) for k in ("hook_name", "hook_name_out")}
        dictionary = from_file(path, replace(asked, **hooks))
        dictionary.name = f"{release}/{sae_id}"
        return dictionary
    try:
        sae = sae_lens.SAE.from_pretrained(release=release, sae_id=sae_id, device="cpu")
    except Exception as error:
        raise FileNotFoundError(
            f"dictionary {release!r}/{sae_id!r} could not be loaded by sae-lens: {type(error).__name__}: {error}"
        ) from error
    sae = sae[0] if isinstance(sae, tuple) else sae
    dictionary = from_object(sae, asked)
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
