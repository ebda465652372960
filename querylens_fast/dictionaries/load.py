"""Load dictionaries from files, folders, releases and objects.

`load_dictionary` reads any file of the table in `formats`, sae-lens releases and sae-lens objects. Matrices stay in
their files and are read in part; no file runs code.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.files import SAE_LENS_WEIGHTS, Asked, from_file, from_object
from querylens_fast.dictionaries.formats import weights_in
from querylens_fast.dictionaries.hook_points import Kind
from querylens_fast.dictionaries.releases import from_release


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
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ValueError(f"layer is {layer!r}; expected a layer number from 0")
    asked = Asked(layer, kind, hook_name, hook_name_out)
    if isinstance(source, Dictionary):
        if sae_id is not None or replace(asked, layer=None) != Asked() or layer not in (None, source.layer):
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
        return from_object(source, asked)
    path = Path(source)
    if path.is_dir():
        path = _weights_of(path, layer)
    if path.is_file():
        return from_file(path, asked)
    if sae_id is None:
        raise FileNotFoundError(
            f"dictionary {str(source)!r}: no such file or folder; for a sae-lens release pass sae_id= too"
        )
    return from_release(str(source), sae_id, asked)


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
