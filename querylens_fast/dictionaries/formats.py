"""Formats: how the dictionaries of this field lie on disk, one entry of a table each.

A format is known by its file's name, by a configuration beside it and by the names of its tensors. Its entry says
which tensors hold the values and the keys and how they are turned, and turns its configuration into sae-lens's terms.
A new format is a new entry and, where its configuration is its own, a function of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from querylens_fast.dictionaries.config_files import read_mapping, section
from querylens_fast.dictionaries.hook_points import hook_point

Settings = Mapping[str, Any]


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
        settings: From (path of the weights, configuration) to sae-lens's terms: hook_name, hook_name_out, architecture,
            model_name, k, …; only what is known. "unknown_site" says where the hook would have stood.
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


def _as_they_are(path: Path, config: Settings) -> Settings:
    return config


def _sae_lens(path: Path, config: Settings) -> Settings:
    """sae-lens's own, and what versions before 6 called otherwise or took for granted."""
    version = config.get("sae_lens_version") or section(config, "metadata", path).get("sae_lens_version")
    major = re.match(r"\d+", str(version or 0))
    if major is None:
        raise ValueError(
            f"the configuration of {str(path)!r} has sae_lens_version={version!r}; expected one like '6.0'"
        )
    if int(major[0]) >= 6:
        return {"apply_b_dec_to_input": "transcoder" not in str(config.get("architecture")), **config}
    settings = {"architecture": "standard", "apply_b_dec_to_input": True, **config}
    settings["hook_name"] = config.get("hook_name", config.get("hook_point"))
    if isinstance(config.get("normalize_activations"), bool):
        settings["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    options = section(config, "activation_fn_kwargs", path)
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk" and "k" in options:
        settings |= {"architecture": "topk", "k": options["k"]}
    return settings


def _qwen_scope(path: Path, config: Settings) -> Settings:
    layer = _number(r"layer(\d+)\.sae\.pt$", path)
    released = re.search(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)", path.absolute().as_posix())
    settings = {"hook_name": f"blocks.{layer}.hook_resid_post", "apply_b_dec_to_input": False}
    if released:
        settings |= {"architecture": "topk", "k": int(released[2]), "model_name": f"Qwen/{released[1]}"}
    return settings


def _gemma_scope(path: Path, config: Settings) -> Settings:
    """The site is in the repository's name: gemma-scope-2b-pt-res, -mlp, -att or -transcoders."""
    text = path.absolute().as_posix()
    layer = _number(r"layer_(\d+)/", path)
    released = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b", text)
    if released is None:
        return {
            "architecture": "jumprelu",
            "layer": layer,
            "unknown_site": "a folder named gemma-scope-2b-pt-res, -mlp, …",
        }
    size, tuned, site = released.groups()
    hooks = {
        "res": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "att": "attn.hook_z",
        "transcoders": "ln2.hook_normalized",
    }
    settings = {
        "architecture": "jumprelu",
        "hook_name": f"blocks.{layer}.{hooks[site]}",
        "model_name": f"gemma-2-{size}" + ("-it" if tuned == "it" else ""),
    }
    if site == "transcoders":
        settings |= {"architecture": "jumprelu_transcoder", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    return settings


def _gemma_scope_2(path: Path, config: Settings) -> Settings:
    """The site is the folder above: resid_post, attn_out, mlp_out, transcoder or clt (each also with _all)."""
    sites = {
        "resid_post": ("hook_resid_post", ""),
        "attn_out": ("attn.hook_z", ""),
        "mlp_out": ("hook_mlp_out", ""),
        "transcoder": ("mlp.hook_in", "hook_mlp_out"),
        "clt": ("mlp.hook_in", "hook_mlp_out"),
    }
    folders = [folder.name.removesuffix("_all") for folder in list(path.absolute().parents)[:3]]
    site = next(folder for folder in folders if folder in sites)
    layer, (read, written) = _number(r"layer_(\d+)", path), sites[site]
    settings = {
        "architecture": "jumprelu",
        "hook_name": f"blocks.{layer}.{read}",
        "model_name": config.get("model_name"),
    }
    if written:
        skip = config.get("affine_connection", "affine" in f"{path.parent.name}/{path.name}")
        settings["hook_name_out"] = f"blocks.{layer}.{written}"
        settings["architecture"] = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    return settings


def _llama_scope(path: Path, config: Settings) -> Settings:
    """Trained on activations scaled to norm √d, so it can be run only after the scale is folded in."""
    read, written = config.get("hook_point_in"), config.get("hook_point_out")
    return {
        "architecture": "jumprelu",
        "hook_name": read,
        "hook_name_out": written if written != read else None,
        "model_name": "meta-llama/Llama-3.1-8B",
        "normalize_activations": "dataset-wise",
    }


def _sparsify(path: Path, config: Settings) -> Settings:
    """The module's name is the folder's: layers.5 (the block's output), layers.5.mlp, …"""
    folder = path.absolute().parent.name.replace("layers_", "layers.")
    transcode = bool(config.get("transcode"))
    settings: dict[str, Any] = {
        "architecture": str(config.get("activation", "topk")) + ("_transcoder" if transcode else ""),
        "k": config.get("k"),
        "apply_b_dec_to_input": not transcode,
    }
    try:
        hook = hook_point(folder)
    except ValueError:
        return {**settings, "unknown_site": "a folder named like layers.5 or layers.5.mlp"}
    if not transcode:
        return {**settings, "hook_name": folder}
    if hook.site.name != "mlp_raw":
        raise ValueError(
            f"dictionary {str(path)!r} is a sparsify transcoder of {folder!r}; transcoders of an mlp are supported"
        )
    return {**settings, "hook_name": f"layers.{hook.layer}.mlp.input", "hook_name_out": folder}


_LEARNED = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
}
"""dictionary_learning's classes in sae-lens's terms. Others are read, but not run."""
_SUBMODULES = {
    "mlp": ("mlp.hook_in", "mlp.hook_out"),
    "att": ("attn.hook_in", "attn.hook_out"),
    "": ("hook_resid_pre", "hook_resid_post"),
}
"""Hook points of the input and the output of the submodule that a name with this text stands for."""


def _dictionary_learning(path: Path, config: Settings) -> Settings:
    """The submodule is in the trainer's settings; the buffer's ``io`` says whether its input or output is read."""
    trainer, buffer = (section(config, name, path) for name in ("trainer", "buffer"))
    kind, submodule = trainer.get("dict_class", "AutoEncoder"), str(trainer.get("submodule_name") or "resid_post")
    settings = {
        "architecture": _LEARNED.get(kind, kind),
        "model_name": trainer.get("lm_name"),
        "k": trainer.get("k"),
        "apply_b_dec_to_input": kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"),
    }
    if "layer" not in trainer:
        return settings
    before, after = next(hooks for part, hooks in _SUBMODULES.items() if part in submodule)
    io = buffer.get("io", "out")
    if io not in ("in", "out", "in_and_out"):
        raise ValueError(f"{str(path.parent / 'config.json')!r}: buffer io is {io!r}; expected in, out or in_and_out")
    if "resid_pre" in submodule:
        after = before
    read = f"blocks.{trainer['layer']}.{after if io == 'out' else before}"
    written = f"blocks.{trainer['layer']}.{before if io == 'in' else after}"
    return {**settings, "hook_name": read, "hook_name_out": written if written != read else None}


def _circuit_tracer(path: Path, config: Settings) -> Settings:
    layer = _number(r"_(\d+)\.safetensors$", path)
    return {
        "architecture": "transcoder",
        "hook_name": f"blocks.{layer}.{config.get('feature_input_hook', 'mlp.hook_in')}",
        "hook_name_out": f"blocks.{layer}.{config.get('feature_output_hook', 'hook_mlp_out')}",
        "model_name": config.get("model_name"),
    }


def _linear_layers(path: Path, config: Settings) -> Settings:
    """DeepSeek-R1's and Goodfire's files end in the layer: …-SAE-l19.pt."""
    layer = _number(r"-l(\d+)\.pth?$", path)
    hook = {} if layer is None else {"hook_name": f"blocks.{layer}.hook_resid_post"}
    return {"architecture": "standard", "apply_b_dec_to_input": False, **hook}


def _number(pattern: str, path: Path) -> int | None:
    found = re.findall(pattern, path.absolute().as_posix())
    return int(found[-1]) if found else None


_LINEAR = ("decoder.weight [d,n]",), ("encoder.weight [n,d]",)

FORMATS = (
    Format("sae-lens", r"sae_weights\.safetensors", ("W_dec [n,d]",), ("W_enc [d,n]",), _sae_lens, ("cfg.json",)),
    Format("Llama Scope R1", r"sae_weights\.safetensors", *_LINEAR, _llama_scope, ("config.json",)),
    Format(
        "Llama Scope",
        r"checkpoints/final\.safetensors",
        *_LINEAR,
        _llama_scope,
        ("../hyperparams.json",),
    ),
    Format(
        "sparsify",
        r"sae\.safetensors",
        ("W_dec [n,d]", "decoder.weight [d,n]"),
        ("encoder.weight [n,d]", "W_enc [d,n]"),
        _sparsify,
        ("cfg.json",),
    ),
    Format(
        "dictionary_learning",
        r"ae\.pt",
        ("decoder.weight [d,n]", "W_dec [n,d]"),
        ("encoder.weight [n,d]", "W_enc [d,n]"),
        _dictionary_learning,
        ("config.json",),
    ),
    Format("Qwen-Scope", r"layer\d+\.sae\.pt", ("W_dec [d,n]",), ("W_enc [n,d]",), _qwen_scope),
    Format(
        "Gemma Scope",
        r"layer_\d+/width_\w+/average_l0_\d+/params\.npz",
        ("W_dec [n,d]", "w_dec [n,d]"),
        ("W_enc [d,n]", "w_enc [d,n]"),
        _gemma_scope,
    ),
    Format(
        "Gemma Scope 2",
        r"(?:resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_\d+_\w+/params\.safetensors",
        ("w_dec [n,d]",),
        ("w_enc [d,n]",),
        _gemma_scope_2,
        ("config.json",),
        optional_config=True,
    ),
    Format(
        "Gemma Scope 2 cross-layer transcoder",
        r"clt/(?:\w+/)?\w*layer_\d+\w*\.safetensors",
        ("w_dec [n,m,d]",),
        ("w_enc [d,n]",),
        _gemma_scope_2,
        ("config.json",),
        optional_config=True,
    ),
    Format(
        "circuit-tracer transcoder",
        r"layer_\d+\.safetensors",
        ("W_dec [n,d]",),
        ("W_enc [n,d]",),
        _circuit_tracer,
        ("config.yaml", "wandb-config.yaml", "wanb-config.yaml"),
    ),
    Format(
        "circuit-tracer cross-layer transcoder",
        r"W_enc_(\d+)\.safetensors",
        ("W_dec_{1} [n,m,d]",),
        ("W_enc_{1} [n,d]",),
        _circuit_tracer,
        ("config.yaml",),
        beside="W_dec_{1}.safetensors",
    ),
    Format(
        "linear layers",
        r"[^/]*\.pth?",
        ("decoder.weight [d,n]", "decoder_linear.weight [d,n]"),
        ("encoder.weight [n,d]", "encoder_linear.weight [n,d]"),
        _linear_layers,
    ),
    Format("plain safetensors", r"[^/]*\.safetensors", ("W_dec [n,d]",), ("W_enc [d,n]",), _as_they_are),
    Format("plain tensors", r"[^/]*\.(?:pth?|npz)", ("W_dec [?]",), ("W_enc [?]",), _as_they_are),
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
