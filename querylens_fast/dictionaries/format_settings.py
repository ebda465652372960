"""Settings: the configuration beside a dictionary's weights, turned into sae-lens's terms, a function for each format.

Each takes (path of the weights, configuration) and gives hook_name, hook_name_out, architecture, model_name, k, …; only
what is known. "unknown_site" says where the hook would have stood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from querylens_fast.dictionaries.config_files import section
from querylens_fast.dictionaries.hook_points import hook_point

Settings = Mapping[str, Any]


def as_they_are(path: Path, config: Settings) -> Settings:
    return config


def sae_lens(path: Path, config: Settings) -> Settings:
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


def qwen_scope(path: Path, config: Settings) -> Settings:
    layer = _number(r"layer(\d+)\.sae\.pt$", path)
    released = re.search(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)", path.absolute().as_posix())
    settings = {"hook_name": f"blocks.{layer}.hook_resid_post", "apply_b_dec_to_input": False}
    if released:
        settings |= {"architecture": "topk", "k": int(released[2]), "model_name": f"Qwen/{released[1]}"}
    return settings


def gemma_scope(path: Path, config: Settings) -> Settings:
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


def gemma_scope_2(path: Path, config: Settings) -> Settings:
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


def llama_scope(path: Path, config: Settings) -> Settings:
    """Trained on activations scaled to norm √d, so it can be run only after the scale is folded in."""
    read, written = config.get("hook_point_in"), config.get("hook_point_out")
    return {
        "architecture": "jumprelu",
        "hook_name": read,
        "hook_name_out": written if written != read else None,
        "model_name": "meta-llama/Llama-3.1-8B",
        "normalize_activations": "dataset-wise",
    }


def sparsify(path: Path, config: Settings) -> Settings:
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


def dictionary_learning(path: Path, config: Settings) -> Settings:
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


def circuit_tracer(path: Path, config: Settings) -> Settings:
    layer = _number(r"_(\d+)\.safetensors$", path)
    return {
        "architecture": "transcoder",
        "hook_name": f"blocks.{layer}.{config.get('feature_input_hook', 'mlp.hook_in')}",
        "hook_name_out": f"blocks.{layer}.{config.get('feature_output_hook', 'hook_mlp_out')}",
        "model_name": config.get("model_name"),
    }


def linear_layers(path: Path, config: Settings) -> Settings:
    """DeepSeek-R1's and Goodfire's files end in the layer: …-SAE-l19.pt."""
    layer = _number(r"-l(\d+)\.pth?$", path)
    hook = {} if layer is None else {"hook_name": f"blocks.{layer}.hook_resid_post"}
    return {"architecture": "standard", "apply_b_dec_to_input": False, **hook}


def _number(pattern: str, path: Path) -> int | None:
    found = re.findall(pattern, path.absolute().as_posix())
    return int(found[-1]) if found else None
