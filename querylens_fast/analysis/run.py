"""A whole run: features of one or many dictionaries under one lens, into one result file (reference ``analysis.run``).

`run` composes a configuration as the reference's command line does; `main` takes one already composed. Everything is
loaded and checked before the first byte is written: model, features, dictionaries, tokens, transport, tuned lens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from querylens_fast.analysis.batches import Batch, Selection, select_features
from querylens_fast.analysis.common import load_model, resolve_baseline
from querylens_fast.analysis.configuration import checked, compose, parse_overrides
from querylens_fast.analysis.lens import (
    LensPipeline,
    dictionary_of,
    distribute_batch,
    lens_pipeline,
    local_tokens,
    preset_of,
    result_row,
)
from querylens_fast.lens.compute import BLOCK_ROWS
from querylens_fast.lens.presets import PRESETS, Preset
from querylens_fast.lens.storage import FORMATS, open_sink
from querylens_fast.lens.transitions import TunedLens
from querylens_fast.models.folders import parse_dtype
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, load_tokens
from querylens_fast.runs.atomic_write import write_whole
from querylens_fast.runs.run_lock import held
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.jacobians import Order
from querylens_fast.transport.jacobians import batches as blocks
from querylens_fast.transport.transport import Transport, load_transport

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


# --- one feature at a time ---------------------------------------------------------------------------------------


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
    engine, preset = as_model(model), preset_of(feature_vector, "identity", readout)
    pipeline = lens_pipeline(dictionary_of(engine, f, sae), engine, preset, k=k, final_norm=use_unembed_layer_norm)
    return result_row(pipeline, f.feature)


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
    engine = as_model(model)
    tokens, distributed = local_tokens(engine, pile_sample, rank, world_size)
    preset = PRESETS["zero_out" if invert_sign else "token_change"]
    value = float(getattr(cfg, "token_change_value", 10.0))
    dictionary = dictionary_of(engine, f, sae)
    pipeline = lens_pipeline(
        dictionary, engine, preset, tokens=tokens, distributed=distributed, k=k, token_change_value=value
    )
    return result_row(pipeline, f.feature)


def analyze_tuned_lens(
    model: Any, f: Any, sae: Any, k: int, use_unembed_layer_norm: bool, params_state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """A feature's value through a tuned lens's translator, then the unembedding."""
    engine = as_model(model)
    pipeline = lens_pipeline(
        dictionary_of(engine, f, sae),
        engine,
        preset_of("value", "identity", "unembed"),
        k=k,
        final_norm=use_unembed_layer_norm,
    )
    pipeline.tuned_lens = TunedLens(dict(params_state or {}), "params_state")
    pipeline.preset = PRESETS["tuned_lens"]
    return result_row(pipeline, f.feature)


# --- a whole run -------------------------------------------------------------------------------------------------


def run(config_name: str | Path, overrides: Sequence[str] = (), config_path: str | Path | None = None) -> Path:
    """Compose a configuration and run it. Returns the result file.

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
    if "dictionary" in given and "sae_id" not in given:
        cfg.sae_id = None
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
    preset = _preset(cfg)
    _check(cfg)
    selection = select_features(cfg)
    model = load_model(
        cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"), cfg.model, parse_dtype(cfg.dtype)
    )
    found = selection.batches(model, preset)
    transport = load_transport(cfg.transport) if cfg.transport is not None and preset.needs_transport else None
    if transport is not None:
        transport.check_model(model)
    tokens = _tokens(cfg, model, preset, transport, explicit)
    options = _options(cfg, preset, selection, tokens, model)
    if transport is None and _is_fit_due(preset, options["stats"], sum(len(b.ids) for b in found), model):
        transport = _fit(cfg, model, preset, tokens, options)
    plans: dict[int, LensPipeline] = {}
    for batch in found:
        if id(batch.dictionary) not in plans:
            plans[id(batch.dictionary)] = lens_pipeline(
                batch.dictionary, model, preset, transport=transport, tokens=tokens, **options
            )
    return _write(cfg, selection, found, plans)


def _preset(cfg: DictConfig) -> Preset:
    parts = resolve_baseline(cfg)
    if cfg.baseline:
        return PRESETS[cfg.baseline]
    return preset_of(
        str(parts["feature_vector"]), str(parts["stream_transition"]), parts["readout"], str(parts["baseline"])
    )


def _check(cfg: DictConfig) -> None:
    """What can be said of the configuration by itself."""
    choices = {
        "submodule": ("both", "attn", "mlp"),
        "stats": (None, "none", "auto", "rel_var", "exact"),
        "format": (None, "jsonl", "parquet"),
    }
    for key, allowed in choices.items():
        if cfg[key] not in allowed:
            raise ValueError(f"{key} is {cfg[key]!r}; expected {', '.join(str(a) for a in allowed)}")
    for key in ("k", "num_samples", "max_length", "accumulation_steps", "max_memory_gib"):
        if not cfg[key] > 0:
            raise ValueError(f"{key} is {cfg[key]}; expected more than 0")
    if OmegaConf.is_missing(cfg, "model"):
        raise ValueError("model= is missing: a hub id or a local folder")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(
            f"WORLD_SIZE is {world_size}: a run is one process, which handles every feature at once; start it without "
            "torchrun (the commands transport and signatures take several, analyze_feature shares a sample among them)"
        )


def _through_norms(cfg: DictConfig, preset: Preset) -> bool:
    return cfg.use_jvp_layer_norm if preset.feature_vector == "value" else cfg.use_vjp_layer_norm


def _tokens(
    cfg: DictConfig, model: Model, preset: Preset, transport: Transport | None, explicit: set[str]
) -> Tokens | None:
    """The sample, where the preset needs one. With a transport the corpus is not read unless it is named."""
    if not (preset.is_ablation or preset.needs_transport):
        return None
    named = "tokens" in explicit or cfg.tokens != CORPUS
    if transport is not None and not named and cfg.stats != "exact":
        return None
    if cfg.tokens is None:
        raise ValueError(f"baseline {preset.name!r} needs tokens=: a safetensors file of ids, a text file or a dataset")
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


def _options(
    cfg: DictConfig, preset: Preset, selection: Selection, tokens: Tokens | None, model: Model
) -> dict[str, Any]:
    """What `lens_pipeline` takes from a configuration."""
    if cfg.k > model.vocab_size:
        raise ValueError(f"k is {cfg.k}; expected 1 to the vocabulary's {model.vocab_size}")
    if preset.stream_transition == "tuned_lens" and cfg.params_path is None:
        raise ValueError("baseline 'tuned_lens' needs params_path=: the params file of a tuned lens")
    every_statistic = selection.listed and tokens is not None and preset.stream_transition != "adaptive"
    return {
        "k": cfg.k,
        "stats": cfg.stats or ("exact" if every_statistic else "auto"),
        "layers": bool(cfg.layers) and preset.stream_transition == "first_order",
        "final_norm": cfg.use_unembed_layer_norm,
        "submodule": cfg.submodule,
        "through_norms": _through_norms(cfg, preset),
        "token_change_value": cfg.token_change_value,
        "adaptive_threshold": cfg.adaptive_threshold,
        "max_memory_gib": cfg.max_memory_gib,
        "tuned_lens": cfg.params_path if preset.stream_transition == "tuned_lens" else None,
    }


def _is_fit_due(preset: Preset, stats: str, n_features: int, model: Model) -> bool:
    """Does the run need a transport, or cost less with one than by walking its features?"""
    if not preset.needs_transport:
        return False
    if preset.stream_transition == "adaptive" or stats == "rel_var":
        return True
    return stats != "exact" and n_features >= model.d_model


def _fit(cfg: DictConfig, model: Model, preset: Preset, tokens: Tokens | None, options: Mapping[str, Any]) -> Transport:
    if tokens is None:
        raise ValueError(f"baseline {preset.name!r} needs tokens= or transport=")
    adaptive = preset.stream_transition == "adaptive"
    orders: tuple[Order, ...] = ("first_order",) if preset.stream_transition == "first_order" else ("full",)
    return fit_transport(
        model,
        tokens,
        sides=(preset.feature_vector,),
        orders=("first_order", "full") if adaptive else orders,
        energy="probes" if adaptive or options["stats"] == "rel_var" else "none",
        seed=cfg.seed,
        submodule=cfg.submodule,
        through_norms=options["through_norms"],
        max_memory_gib=cfg.max_memory_gib,
    )


def _write(cfg: DictConfig, selection: Selection, found: list[Batch], plans: Mapping[int, LensPipeline]) -> Path:
    """Stream every batch to the result file; on a second run only what is missing."""
    path = _result_path(cfg, selection)
    first = plans[id(found[0].dictionary)]
    identity = _identity(found, plans)
    n = len(torch.cat([batch.ids for batch in found]))
    with held(path), open_sink(path, cfg.format, identity, resume=True, token_strings=True, model=first.model) as sink:
        write_whole(path.with_name("config.yaml"), OmegaConf.to_yaml(cfg))
        if first.tokens is not None:
            first.tokens.save(path.with_name("tokens.safetensors"))
        with tqdm(total=n, desc=first.preset.name, unit="feature") as bar:
            for batch in found:
                pipeline = plans[id(batch.dictionary)]
                for block in blocks(len(batch.ids), BLOCK_ROWS):
                    pending = sink.pending(slice(batch.start + block.start, batch.start + block.stop))
                    rows = [i - batch.start for i in pending]
                    if rows:
                        names = None if batch.names is None else [batch.names[i] for i in rows]
                        sink.write(pipeline(batch.ids[rows]), pending, names)
                    bar.update(block.stop - block.start)
        return sink.finish(n).path


def _result_path(cfg: DictConfig, selection: Selection) -> Path:
    name = Path(cfg.output_filename)
    if cfg.format is not None and FORMATS.get(name.suffix) != cfg.format:
        name = name.with_suffix(f".{cfg.format}")
    return name if name.is_absolute() else Path("experiments") / selection.name / (cfg.baseline or "base") / name


def _identity(found: list[Batch], plans: Mapping[int, LensPipeline]) -> dict[str, Any]:
    """What makes two runs the same run: everything but where the files lie."""
    first = plans[id(found[0].dictionary)]
    members = [(batch.dictionary.name, batch.dictionary.layer, batch.ids.tolist(), batch.names) for batch in found]
    return {
        **first.identity(found[0].ids),
        "dictionary": list(dict.fromkeys(batch.dictionary.name for batch in found)),
        "layer": sorted({batch.dictionary.layer for batch in found}),
        "features": hashlib.sha256(repr(members).encode()).hexdigest()[:16],
        "n_features": sum(len(batch.ids) for batch in found),
        "dictionary_fingerprints": [batch.dictionary.fingerprint for batch in found],
        "submodule": first.submodule,
        "through_norms": first.through_norms,
    }
