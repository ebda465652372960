"""Published Jacobian lenses: a transport by path, or by a model's name through transformer-lens's registry.

transformer-lens lists fitted lenses in a JSON file, by short name ("gemma-2-2b") and by the model's id on the Hub
("google/gemma-2-2b"). The file is read where transformer-lens is installed; transformer-lens itself is not imported.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from querylens_fast.models.model import Model
from querylens_fast.transport.jacobian_lens import import_jacobian_lens
from querylens_fast.transport.transport import Transport, load_transport

logger = logging.getLogger(__name__)

REGISTRY = "tools/analysis/jacobian_lens_registry.json"
LENS_SUFFIXES = (".pt", ".pth")


def find_transport(source: str | Path, model: Model) -> Transport:
    """A transport from a file, or from a published lens.

    Args:
        source: A transport (.safetensors), a Jacobian-lens file (.pt), or the name of a model in the registry.
        model: The model, which a Jacobian lens has to fit.

    Raises:
        FileNotFoundError: No such file, and no lens of that name can be had.
        ValueError: The file does not fit.
    """
    path = Path(source)
    if path.suffix in LENS_SUFFIXES:
        return import_jacobian_lens(path, model)
    if path.suffix == ".safetensors" or path.exists():
        return load_transport(path)
    return import_jacobian_lens(published_lens(str(source)), model)


def published_lens(name: str) -> Path:
    """The file of a published lens, from the Hub or its cache, at the commit that transformer-lens pins.

    Raises:
        FileNotFoundError: transformer-lens with a registry is not installed, it does not know the name, or the file
            cannot be fetched.
    """
    registry = _registry()
    if registry is None:
        raise FileNotFoundError(
            f"transport {name!r} is no file; for a published Jacobian lens by a model's name install a "
            f"transformer-lens that has {REGISTRY.rsplit('/', 1)[1]}, or pass the lens's .pt file"
        )
    entry = next(
        (e for key, e in registry.items() if isinstance(e, dict) and name in (key, *e.get("aliases", []))), None
    )
    if entry is None:
        known = ", ".join(sorted(key for key, e in registry.items() if isinstance(e, dict)))
        raise FileNotFoundError(f"transport {name!r} is no file and no published Jacobian lens; known are {known}")
    pinned = registry.get("revision")
    found = _fetched(entry, pinned)
    if isinstance(found, Exception) and pinned is not None:
        logger.warning(
            "the Jacobian lens of %r cannot be had at the commit that transformer-lens pins (%s): trying the newest",
            name,
            type(found).__name__,
        )
        found = _fetched(entry, None)
    if isinstance(found, Path):
        return found
    first = (str(found).splitlines() or [""])[0]
    raise FileNotFoundError(
        f"the Jacobian lens of {name!r} ({entry['filename']} of {entry['repo_id']}) cannot be fetched "
        f"({type(found).__name__}: {first}); download it and pass the .pt file"
    ) from found


def _fetched(entry: dict[str, Any], revision: str | None) -> Path | Exception:
    """The file in the Hub's cache, fetched where it is not there yet, or why it cannot be."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(entry["repo_id"], entry["filename"], revision=revision))
    except Exception as error:
        return error


def _registry() -> dict[str, Any] | None:
    spec = importlib.util.find_spec("transformer_lens")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / REGISTRY
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return None
