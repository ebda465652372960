"""Run configurations: a named YAML file over `configs/base.yaml`, then ``key=value`` overrides.

The keys, their defaults and what they mean stand in ``configs/base.yaml``; `RunConfig` has their types. A file may be
one of the package's, the reference's (Hydra's ``defaults: [_self_]`` is understood), or a user's own. A value may refer
to another key (``${model}``); OmegaConf's resolvers, which read environment variables and run functions, are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

CONFIGS = Path(__file__).parent / "configs"
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 20, 1 << 20, 32
"""Of a configuration: its file, and what it holds once aliases are followed."""


@dataclass
class RunConfig:
    """Every key of a run and its type; the values come from base.yaml."""

    model: str = MISSING
    features_pkl: str | None = MISSING
    num_samples: int = MISSING
    max_length: int = MISSING
    seed: int = MISSING
    logs_dir: str = MISSING
    output_filename: str = MISSING
    resid_device: str = MISSING
    k: int = MISSING
    submodule: str = MISSING
    use_unembed_layer_norm: bool = MISSING
    use_jvp_layer_norm: bool = MISSING
    use_vjp_layer_norm: bool = MISSING
    dtype: str = MISSING
    accumulation_steps: int = MISSING
    pad_token_id: int | None = MISSING
    baseline: str | None = MISSING
    feature_vector: str = MISSING
    stream_transition: str = MISSING
    readout: str | None = MISSING
    params_path: str | None = MISSING
    token_change_value: float = MISSING
    features: Any = MISSING
    dictionary: str | None = MISSING
    sae_id: str | None = MISSING
    layer: Any = MISSING
    tokens: str | None = MISSING
    transport: str | None = MISSING
    stats: str | None = MISSING
    layers: bool = MISSING
    adaptive_threshold: float = MISSING
    format: str | None = MISSING
    device: str | None = MISSING
    max_memory_gib: float = MISSING


_REFERENCE = re.compile(r"\$\{\w+\}")
"""A value that is another key's."""
KEYS = tuple(f.name for f in fields(RunConfig))


class _Loader(yaml.SafeLoader):
    """YAML without base-60 numbers: a range 10:50 is text, not 650."""


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)


def config_names() -> list[str]:
    """The package's configurations, by name."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")


def compose(
    config_name: str | Path, overrides: Sequence[str] = (), config_path: str | Path | None = None
) -> DictConfig:
    """A checked configuration.

    Args:
        config_name: A name of `config_names`, of a file in ``config_path``, or a path to a YAML file.
        overrides: ``key=value``, the value in YAML ("features=[1,2]", "baseline=null").
        config_path: A folder to look in first.

    Raises:
        FileNotFoundError: No such configuration.
        ValueError: A key that is not known (those known are listed), or a value of the wrong type.
    """
    path = _find(str(config_name), config_path)
    cfg = checked(_read(path, ()), str(path))
    return _merge(cfg, parse_overrides(overrides), "an override")


def checked(given: Any, source: str = "the configuration") -> DictConfig:
    """A configuration over base.yaml, with every key known and of its type."""
    base = _merge(OmegaConf.structured(RunConfig), _load(CONFIGS / "base.yaml"), "base.yaml")
    return _merge(base, given, source)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides by key. Raises ValueError for one that is no ``key=value`` or whose key is not known."""
    found: dict[str, Any] = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        key = key.lstrip("+").strip()
        if not sign:
            raise ValueError(f"override {override!r} is no key=value")
        _check_keys([key], f"override {override!r}")
        try:
            found[key] = yaml.load(value, _Loader)
        except Exception as error:  # whatever the parser raises: it is the value that is wrong
            raise ValueError(f"override {override!r} has a value that is no YAML: {_brief(error)}") from error
    return found


def _find(name: str, config_path: str | Path | None) -> Path:
    candidates = [Path(name)] if name.endswith((".yaml", ".yml")) else []
    for folder in (config_path, CONFIGS):
        if folder is not None:
            candidates += [Path(folder) / name, Path(folder) / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    where = f" in {str(config_path)!r}" if config_path else ""
    raise FileNotFoundError(
        f"no configuration {name!r}{where}; the package has {', '.join(config_names())}, or give a path to a YAML file"
    )


def _load(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"configuration {str(path)!r} is of {path.stat().st_size} bytes; expected at most {MAX_BYTES}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError:
        raise
    except Exception as error:  # whatever the parser raises: it is the file that is wrong
        raise ValueError(f"configuration {str(path)!r} is no valid YAML: {_brief(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"configuration {str(path)!r} holds a {type(found).__name__}; expected keys and values")
    return found


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file's keys with those of the files its defaults list names; later ones win, its own where _self_ stands."""
    if path in above:
        raise ValueError(f"configuration {str(path)!r} includes itself")
    own = _load(path)
    defaults = own.pop("defaults", [])
    own.pop("hydra", None)
    if not isinstance(defaults, list):
        raise ValueError(f"configuration {str(path)!r}: defaults is {defaults!r}; expected a list")
    if "_self_" not in defaults:
        defaults = [*defaults, "_self_"]
    merged: dict[str, Any] = {}
    for entry in defaults:
        if isinstance(entry, dict) and all("hydra/" in str(key) for key in entry):
            continue
        if not isinstance(entry, str):
            raise ValueError(f"configuration {str(path)!r}: defaults may name files only, not {entry!r}")
        merged |= own if entry == "_self_" else _read(_find(entry, path.parent), (*above, path))
    return merged


def _check_keys(keys: Sequence[Any], source: str) -> None:
    unknown = [str(key) for key in keys if key not in KEYS]
    if unknown:
        raise ValueError(f"{source}: unknown key {', '.join(unknown)}; known are {', '.join(KEYS)}")


def _merge(cfg: Any, given: Any, source: str) -> DictConfig:
    if isinstance(given, DictConfig):
        given = OmegaConf.to_container(given, resolve=False)
    if not isinstance(given, dict):
        given = {key: plain(getattr(given, key)) for key in KEYS if hasattr(given, key)}
    _check_keys(list(given), source)
    for key, value in given.items():
        _check_value(value, f"{source}: {key}")
        if value == MISSING and key != "model":
            raise ValueError(f"{source}: {key} is {MISSING}, which stands for a value that is missing")
    try:
        merged = cast(DictConfig, OmegaConf.merge(cfg, given))
        OmegaConf.resolve(merged)
    except Exception as error:  # whatever OmegaConf raises: it is a value that is wrong
        key = getattr(error, "full_key", None)
        raise ValueError(f"{source}: {_brief(error)}{f' (key {key})' if key else ''}") from error
    for key, value in merged.items_ex(resolve=False):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{source}: {key} is {value}; expected a finite number")
    return merged


def _check_value(value: Any, name: str) -> None:
    """Raise ValueError for a resolver anywhere in a value, and for what would not fit in memory once it is copied."""
    waiting, n = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        n += 1
        if n > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"{name} holds more than {MAX_VALUES} values, or is nested more than {MAX_DEPTH} deep")
        if isinstance(part, str) and "${" in _REFERENCE.sub("", part):
            raise ValueError(
                f"{name} is {part!r}: environment variables and other resolvers are not read from a configuration; "
                "write the value itself"
            )
        inner = [*part.keys(), *part.values()] if isinstance(part, dict) else part if isinstance(part, list) else ()
        waiting += [(x, depth + 1) for x in inner]


def _brief(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def plain(value: Any) -> Any:
    """A configuration's value as plain Python."""
    return OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value
