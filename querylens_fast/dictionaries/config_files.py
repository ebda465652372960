"""Configuration files of dictionaries: JSON or YAML mappings, checked before anything is taken from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 24
"""No configuration of a dictionary is larger."""
MAX_YAML_BRACKETS = 1000


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a ``.json`` or ``.yaml`` file.

    Raises:
        ValueError: The file is damaged, no JSON or YAML, larger than `MAX_BYTES`, or holds something else.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes; expected a configuration of a few kilobytes")
    language = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if language == "JSON" else _safe_yaml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid {language}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}; expected a mapping of settings by name")
    return found


def _safe_yaml(text: str) -> Any:
    import yaml

    depth = 0
    try:
        for token in yaml.scan(text):
            # Aliases let a few lines stand for gigabytes; the parser's time grows with the square of the depth.
            depth += isinstance(token, (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken))
            if isinstance(token, yaml.AliasToken) or depth > MAX_YAML_BRACKETS:
                raise ValueError(
                    "it uses aliases or thousands of brackets, which configurations of dictionaries do not"
                )
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def section(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    """A mapping within a configuration; empty where it is missing. Raises ValueError when it is something else."""
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise ValueError(
            f"the configuration of {str(path)!r} has {name}={found!r} ({type(found).__name__}); expected a mapping"
        )
    return found
