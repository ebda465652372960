"""Run configurations: a named YAML file over ``configs/base.yaml``, then ``key=value`` overrides.

``configs/base.yaml`` has every key with its default and its meaning; the keys that are options of `signatures` have
their types from `LensOptions`. A file may be one of the package's, the reference's (Hydra's ``defaults: [_self_]`` is
understood), or a user's own. A value may refer to another key (``${model}``); OmegaConf's resolvers, which read
environment variables and run functions, are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from querylens_fast.lens.options import LensOptions, plain_type
from querylens_fast.lens.presets import Preset

CONFIGS = Path(__file__).parent / "configs"
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 20, 1 << 20, 32
"""Of a configuration: its file, and what it holds once aliases are followed."""


REFERENCE_NAMES = {"preset": "baseline", "out": "output_filename", "tuned_lens": "params_path"} | {
    "final_norm": "use_unembed_layer_norm"
}
"""Options of `signatures` that the reference's configurations have under another name."""
_OWN: dict[str, Any] = {
    "model": str,
    "features_pkl": str | None,
    "num_samples": int,
    "max_length": int,
    "seed": int,
    "logs_dir": str,
    "resid_device": str,
    "dtype": str,
    "use_jvp_layer_norm": bool,
    "use_vjp_layer_norm": bool,
    "accumulation_steps": int,
    "pad_token_id": int | None,
    "feature_vector": str,
    "stream_transition": str,
    "readout": str | None,
    "dictionary": str | None,
    "sae_id": str | None,
    "layer": Any,
    "device": str | None,
}
"""Keys that are no option of `signatures`: model, sample, dictionary, the preset's components, and keys kept for the
reference's files."""
_WIDER = {"features": Any, "stats": str | None, "output_filename": str, "baseline": str | None}
_NOT_KEYS = ("vectors", "through_norms")
"""Options of `signatures` without a key: of results in memory; and two keys of the reference, by side."""


def _key_types() -> dict[str, Any]:
    """Every key of a run and its type: `_OWN` and the fields of `LensOptions`."""
    hints = get_type_hints(LensOptions)
    options = {
        REFERENCE_NAMES.get(f.name, f.name): hints[f.name] for f in fields(LensOptions) if f.name not in _NOT_KEYS
    }
    return {**_OWN, **{key: plain_type(hint) for key, hint in options.items()}, **_WIDER}


RunConfig = make_dataclass("RunConfig", [(key, kind, MISSING) for key, kind in _key_types().items()])
"""Every key of a run with its type; the values come from base.yaml."""
_REFERENCE = re.compile(r"\$\{\w+\}")
"""A value that is another key's."""
KEYS = tuple(f.name for f in fields(RunConfig))


def lens_options(cfg: DictConfig, preset: Preset, **changed: Any) -> LensOptions:
    """The options of `signatures` that a configuration means, under a preset that was found in it."""
    given = {f.name: cfg[REFERENCE_NAMES.get(f.name, f.name)] for f in fields(LensOptions) if f.name not in _NOT_KEYS}
    norms = cfg.use_jvp_layer_norm if preset.feature_vector == "value" else cfg.use_vjp_layer_norm
    given |= {"preset": preset, "through_norms": norms, "stats": cfg.stats or "auto", "features": None}
    given["layers"] = cfg.layers and preset.stream_transition == "first_order"
    if preset.stream_transition != "tuned_lens":
        given["tuned_lens"] = None
    return LensOptions(**{**given, **changed})


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
