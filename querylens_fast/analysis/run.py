"""A whole run: features of one or many dictionaries under one lens, into one result file (reference ``analysis.run``).

`run` composes a configuration as the reference's command line does; `main` takes one already composed. Everything is
loaded and checked before the first byte is written: model, features, dictionaries, tokens, transport, tuned lens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from querylens_fast.analysis.calls import analyze, check_sample, preset_of
from querylens_fast.analysis.common import load_model, resolve_baseline
from querylens_fast.analysis.configuration import checked, compose, lens_options, parse_overrides
from querylens_fast.analysis.processes import distribute_batch
from querylens_fast.analysis.selection import Selected, Selection, select_features
from querylens_fast.lens.options import Stats
from querylens_fast.lens.planning import fit_if_cheaper, inside_names, open_transport, plan
from querylens_fast.lens.presets import PRESETS, Preset
from querylens_fast.lens.storage import FORMATS
from querylens_fast.lens.stream import Batch, write
from querylens_fast.lens.tuned_lens import TunedLens
from querylens_fast.models.folders import parse_dtype
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, load_tokens
from querylens_fast.runs import processes
from querylens_fast.runs.atomic_write import write_whole
from querylens_fast.runs.run_record import DESCRIBING
from querylens_fast.transport.transport import Transport

__all__ = [
    "analyze_identity",
    "analyze_token_change",
    "analyze_tuned_lens",
    "apply_layer_params_to_feature",
    "distribute_batch",
    "main",
    "run",
]

CORPUS = "NeelNanda/pile-10k"
"""The reference's corpus, and the default of ``tokens``."""
BLOCK_ROWS = 2048
"""Features computed at a time, by default; files of earlier versions were begun with it."""


def apply_layer_params_to_feature(
    f_dir: Tensor,
    layer_idx: int,
    num_layers: int,
    params_state: Mapping[str, Tensor] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """v + W_l v + b_l by a tuned lens's parameters, [d]; v itself at the last layer.

    Raises:
        ValueError: No parameters for the layer: they are never taken for the identity.
    """
    lens = TunedLens(dict(params_state or {}), "params_state")
    return lens(f_dir.to(device=device, dtype=dtype)[None], layer_idx, num_layers)[0]


def analyze_identity(
    model: Any, f: Any, sae: Any, feature_vector: str, readout: str, k: int, use_unembed_layer_norm: bool
) -> dict[str, Any]:
    """A feature's vector, read out as it is: layer, top and bottom tokens and ids."""
    preset = preset_of(feature_vector, "identity", readout)
    return analyze(model, f, sae, preset, k=k, final_norm=use_unembed_layer_norm)


def analyze_token_change(
    model: Any,
    f: Any,
    sae: Any,
    pile_sample: Tensor,
    rank: int,
    world_size: int,
    cfg: Any,
    resid_cache: Any,
    k: int,
    invert_sign: bool = False,
) -> dict[str, Any]:
    """The tokens whose logits move when a feature is set to cfg.token_change_value (or, inverted, to 0)."""
    preset = PRESETS["zero_out" if invert_sign else "token_change"]
    value = float(getattr(cfg, "token_change_value", 10.0))
    return analyze(model, f, sae, preset, pile_sample, rank, world_size, k=k, token_change_value=value)


def analyze_tuned_lens(
    model: Any, f: Any, sae: Any, k: int, use_unembed_layer_norm: bool, params_state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """A feature's value through a tuned lens's translator, then the unembedding."""
    lens = TunedLens(dict(params_state or {}), "params_state")
    return analyze(model, f, sae, PRESETS["tuned_lens"], k=k, final_norm=use_unembed_layer_norm, tuned_lens=lens)


def run(config_name: str | Path, overrides: Sequence[str] = (), config_path: str | Path | None = None) -> Path:
    """Compose a configuration and run it. Returns the result file; under `torchrun` the processes share the work.

    Args:
        config_name: A name of the package's configurations, a file's name in ``config_path``, or a path.
        overrides: ``key=value``; see ``configs/base.yaml`` for the keys.
        config_path: A folder of configurations.

    Raises:
        ValueError: An unknown key, or anything that does not fit together; nothing has been written then.
        FileNotFoundError: A missing configuration, model, feature list, dictionary, corpus or params file; likewise.
        FileExistsError: The result file belongs to another run.
    """
    given = parse_overrides(overrides)
    cfg = compose(config_name, overrides, config_path)
    for key in ("sae_id", "layer"):  # the named configuration's are of its own dictionary
        if "dictionary" in given and key not in given:
            cfg[key] = None
    if "dictionary" in given and not {"features", "features_pkl"} & given.keys():
        cfg.features = "all"
    if "features_pkl" in given and "features" not in given:
        cfg.features = None
    return _run(cfg, set(given))


def main(cfg: Any) -> int:
    """Run a composed configuration (a mapping, an OmegaConf object, or one with attributes). Returns 0.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: As `run`.
    """
    _run(checked(cfg), set())
    return 0


def _run(cfg: DictConfig, explicit: set[str]) -> Path:
    with processes.joined() as group:
        return _shared(cfg, explicit, group)


def _shared(cfg: DictConfig, explicit: set[str], group: processes.Ranks) -> Path:
    """The run, or under `torchrun` this process's share of it."""
    preset = _preset(cfg)
    _check(cfg)
    options = lens_options(cfg, preset)
    selection = select_features(cfg)
    device = group.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(device, cfg.model, parse_dtype(cfg.dtype))
    selected = selection.selected(model, preset)
    transport = open_transport(model, options) if preset.needs_transport else None
    tokens = _tokens(cfg, model, preset, transport, explicit)
    if transport is not None and tokens is not None:
        check_sample(transport, tokens)
    stats = _stats(cfg, preset, selection.listed and tokens is not None)
    options = replace(options, transport=transport, tokens=tokens, stats=stats)
    if preset.needs_transport and transport is None:
        n = sum(len(some.ids) for some in selected)
        inside = inside_names([some.dictionary for some in selected], preset)
        fitted = fit_if_cheaper(model, options, tokens, n, inside=inside, seed=cfg.seed)
        options = replace(options, transport=fitted)
    lenses = {id(some.dictionary): some.dictionary for some in selected}
    lenses = {key: plan(dictionary, model, options, n_features=0) for key, dictionary in lenses.items()}
    batches = [Batch(lenses[id(some.dictionary)], some.ids, some.names) for some in selected]
    path = _result_path(cfg, selection)

    def describe() -> None:
        write_whole(path.with_name("config.yaml"), OmegaConf.to_yaml(cfg))
        if tokens is not None:
            tokens.save(path.with_name("tokens.safetensors"))

    block_rows = options.block_rows or BLOCK_ROWS
    return write(batches, path, _identity(selected, batches), options, block_rows=block_rows, beside=describe).path


def _preset(cfg: DictConfig) -> Preset:
    parts = resolve_baseline(cfg)
    if cfg.baseline:
        return PRESETS[cfg.baseline]
    return preset_of(
        str(parts["feature_vector"]), str(parts["stream_transition"]), parts["readout"], str(parts["baseline"])
    )


def _check(cfg: DictConfig) -> None:
    """Check what no option of `signatures` covers."""
    for key in ("num_samples", "max_length", "accumulation_steps"):
        if not cfg[key] > 0:
            raise ValueError(f"{key} is {cfg[key]}; expected more than 0")
    if OmegaConf.is_missing(cfg, "model"):
        raise ValueError("model= is missing: a hub id or a local folder")


def _stats(cfg: DictConfig, preset: Preset, every_statistic: bool) -> Stats:
    """The configuration's, or by default the reference's statistics for features that were listed one by one."""
    if not preset.needs_transport:
        return "none"
    return cfg.stats or ("exact" if every_statistic and preset.stream_transition != "adaptive" else "auto")


def _tokens(
    cfg: DictConfig, model: Model, preset: Preset, transport: Transport | None, explicit: set[str]
) -> Tokens | None:
    """The sample, where the preset needs one. With a transport the corpus is not read unless it is named."""
    if not (preset.is_ablation or preset.needs_transport):
        return None
    named = "tokens" in explicit or cfg.tokens != CORPUS
    if cfg.tokens is None or (transport is not None and not named and cfg.stats != "exact"):
        return None
    drawn = "num_samples" in explicit or not Path(cfg.tokens).exists()
    tokens = load_tokens(
        cfg.tokens,
        model=model,
        num_samples=cfg.num_samples if drawn else None,
        max_length=cfg.max_length,
        seed=cfg.seed,
    )
    if cfg.pad_token_id is not None:
        tokens = Tokens(tokens.ids, tokens.ids != cfg.pad_token_id, tokens.source, tokens.details)
    return tokens


def _result_path(cfg: DictConfig, selection: Selection) -> Path:
    name = Path(cfg.output_filename)
    if cfg.format is not None and FORMATS.get(name.suffix) != cfg.format:
        name = name.with_suffix(f".{cfg.format}")
    return name if name.is_absolute() else Path("experiments") / selection.name / (cfg.baseline or "base") / name


def _identity(selected: Sequence[Selected], batches: Sequence[Batch]) -> dict[str, Any]:
    """What makes two runs the same run: everything but where the files lie."""
    first = batches[0].pipeline
    dictionaries = [batch.pipeline.dictionary for batch in batches]
    members = [(d.name, d.layer, b.ids.tolist(), b.names) for d, b in zip(dictionaries, batches, strict=True)]
    block_rows = first.options.block_rows
    return {
        **first.identity(batches[0].ids),
        "dictionary": list(dict.fromkeys(d.name for d in dictionaries)),
        "layer": sorted({d.layer for d in dictionaries}),
        "features": hashlib.sha256(repr(members).encode()).hexdigest()[:16],
        "n_features": sum(len(batch.ids) for batch in batches),
        "dictionary_fingerprints": [some.fingerprint for some in selected],
        **{name: list(dict.fromkeys(getattr(d, name) for d in dictionaries)) for name in DESCRIBING},
        **({} if block_rows is None else {"block_rows": block_rows}),
    }
