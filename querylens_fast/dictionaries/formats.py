"""Formats: how the dictionaries of this field lie on disk, one entry of a table each.

A format is known by its file's name, by a configuration beside it and by the names of its tensors. Its entry says
which tensors hold the values and the keys and how they are turned, and turns its configuration into sae-lens's terms.
A new format is a new entry and, where its configuration is its own, a function of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from querylens_fast.dictionaries.config_files import read_mapping
from querylens_fast.dictionaries.format_settings import (
    Settings,
    as_they_are,
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    linear_layers,
    llama_scope,
    qwen_scope,
    sae_lens,
    sparsify,
)


@dataclass(frozen=True)
class Format:
    """One way a dictionary lies on disk.

    Attributes:
        name: For messages.
        weights: A regular expression for the weights file, matched at the end of its path ("/" between folders).
        values: Tensors that may hold the values, each with its axes: "W_dec [n,d]", "decoder.weight [d,n]";
            "[n,m,d]" is summed over m, "[?]" is decided by shape alone. "{1}" is the pattern's first group.
        keys: Tensors that may hold the keys, likewise.
        config: Where its configuration may lie, from the weights' folder; without one it is another format.
        optional_config: It is this format without a configuration too.
        beside: A second weights file in the same folder.
        settings: Turns (path of the weights, configuration) into sae-lens's terms (`format_settings`).
    """

    name: str
    weights: str
    values: tuple[str, ...]
    keys: tuple[str, ...]
    settings: Callable[[Path, Settings], Settings]
    config: tuple[str, ...] = ()
    optional_config: bool = False
    beside: str | None = None

    def match(self, path: Path) -> re.Match[str] | None:
        """Is this a weights file of this format, by its name and its configuration?"""
        if self.config and not self.optional_config and self._config_file(path) is None:
            return None
        return re.search(f"(?:^|/)(?:{self.weights})$", path.absolute().as_posix())

    def read_config(self, path: Path) -> Settings:
        """The configuration beside a weights file, or nothing. Raises ValueError for a damaged one."""
        file = self._config_file(path)
        if file is None:
            return {}
        return read_mapping(file)

    def _config_file(self, path: Path) -> Path | None:
        return next((path.parent / name for name in self.config if (path.parent / name).is_file()), None)


_LINEAR = ("decoder.weight [d,n]",), ("encoder.weight [n,d]",)

FORMATS = (
    Format("sae-lens", r"sae_weights\.safetensors", ("W_dec [n,d]",), ("W_enc [d,n]",), sae_lens, ("cfg.json",)),
    Format("Llama Scope R1", r"sae_weights\.safetensors", *_LINEAR, llama_scope, ("config.json",)),
    Format(
        "Llama Scope",
        r"checkpoints/final\.safetensors",
        *_LINEAR,
        llama_scope,
        ("../hyperparams.json",),
    ),
    Format(
        "sparsify",
        r"sae\.safetensors",
        ("W_dec [n,d]", "decoder.weight [d,n]"),
        ("encoder.weight [n,d]", "W_enc [d,n]"),
        sparsify,
        ("cfg.json",),
    ),
    Format(
        "dictionary_learning",
        r"ae\.pt",
        ("decoder.weight [d,n]", "W_dec [n,d]"),
        ("encoder.weight [n,d]", "W_enc [d,n]"),
        dictionary_learning,
        ("config.json",),
    ),
    Format("Qwen-Scope", r"layer\d+\.sae\.pt", ("W_dec [d,n]",), ("W_enc [n,d]",), qwen_scope),
    Format(
        "Gemma Scope",
        r"layer_\d+/width_\w+/average_l0_\d+/params\.npz",
        ("W_dec [n,d]", "w_dec [n,d]"),
        ("W_enc [d,n]", "w_enc [d,n]"),
        gemma_scope,
    ),
    Format(
        "Gemma Scope 2",
        r"(?:resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_\d+_\w+/params\.safetensors",
        ("w_dec [n,d]",),
        ("w_enc [d,n]",),
        gemma_scope_2,
        ("config.json",),
        optional_config=True,
    ),
    Format(
        "Gemma Scope 2 cross-layer transcoder",
        r"clt/(?:\w+/)?\w*layer_\d+\w*\.safetensors",
        ("w_dec [n,m,d]",),
        ("w_enc [d,n]",),
        gemma_scope_2,
        ("config.json",),
        optional_config=True,
    ),
    Format(
        "circuit-tracer transcoder",
        r"layer_\d+\.safetensors",
        ("W_dec [n,d]",),
        ("W_enc [n,d]",),
        circuit_tracer,
        ("config.yaml", "wandb-config.yaml", "wanb-config.yaml"),
    ),
    Format(
        "circuit-tracer cross-layer transcoder",
        r"W_enc_(\d+)\.safetensors",
        ("W_dec_{1} [n,m,d]",),
        ("W_enc_{1} [n,d]",),
        circuit_tracer,
        ("config.yaml",),
        beside="W_dec_{1}.safetensors",
    ),
    Format(
        "linear layers",
        r"[^/]*\.pth?",
        ("decoder.weight [d,n]", "decoder_linear.weight [d,n]"),
        ("encoder.weight [n,d]", "encoder_linear.weight [n,d]"),
        linear_layers,
    ),
    Format("plain safetensors", r"[^/]*\.safetensors", ("W_dec [n,d]",), ("W_enc [d,n]",), as_they_are),
    Format("plain tensors", r"[^/]*\.(?:pth?|npz)", ("W_dec [?]",), ("W_enc [?]",), as_they_are),
)
ANY_FILE = FORMATS[-3:]
"""Formats that any file might be; a folder is not searched for them."""


def weights_in(folder: Path) -> list[Path]:
    """The weights files in a folder that one of the formats knows by name."""
    candidates: Iterable[Path] = [*sorted(folder.iterdir()), folder / "checkpoints" / "final.safetensors"]
    known = [format for format in FORMATS if format not in ANY_FILE]
    return [path for path in candidates if path.is_file() and any(f.match(path) for f in known)]


def find_format(path: Path, names: Iterable[str]) -> tuple[Format, re.Match[str]]:
    """The first format of the table that a file with these tensors is of.

    Raises:
        ValueError: None is (the message lists the tensors and the formats).
    """
    names = set(names)
    for known in FORMATS:
        found = known.match(path)
        if found and any(split_axes(spec, found)[0] in names for spec in (*known.values, *known.keys)):
            return known, found
    wanted = "; ".join(f"{f.name}: {', '.join((*f.values, *f.keys))}" for f in FORMATS)
    raise ValueError(
        f"dictionary {str(path)!r} holds neither W_dec nor W_enc nor what another format calls them "
        f"(tensors: {', '.join(sorted(names)) or 'none'}); known are {wanted}"
    )


def split_axes(spec: str, found: re.Match[str]) -> tuple[str, str]:
    """("W_dec_3", "n,m,d") from "W_dec_{1} [n,m,d]" and a matched path."""
    name, axes = spec.rstrip("]").split(" [")
    return (name.replace("{1}", found[1]) if "{1}" in name else name), axes
