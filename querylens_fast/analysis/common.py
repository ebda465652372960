"""The reference's ``analysis.common``: feature vectors, readouts, the ablation and the statistics, one call at a time.

Each function takes a hooked model, a transformers model or a `Model`. Residual caches are in `caches`, Jacobians of
single modules in `modules`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from querylens_fast.analysis.caches import ResidCache, ResidChunk, VJPResidCache, VJPResidChunk
from querylens_fast.analysis.calls import dictionary_of
from querylens_fast.analysis.modules import jvp_attn, jvp_mlp, vjp_attn, vjp_mlp
from querylens_fast.analysis.processes import distributed_mean, total
from querylens_fast.lens import readouts
from querylens_fast.lens.planning import plan
from querylens_fast.lens.presets import PRESETS, find_preset
from querylens_fast.models.load import as_model
from querylens_fast.models.load import load_model as load_engine_model
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.transport.per_feature import STATISTICS, linearity

__all__ = [
    "BASELINE_REGISTRY",
    "ResidCache",
    "ResidChunk",
    "VJPResidCache",
    "VJPResidChunk",
    "apply_embed",
    "apply_embed_cosine_centered",
    "apply_unembed",
    "compute_token_change",
    "distributed_mean_vector",
    "get_feature_input_vector",
    "get_feature_vector",
    "get_logits_tokens",
    "jacobian_linearity",
    "jvp_attn",
    "jvp_mlp",
    "load_model",
    "load_reference_token_changes",
    "resolve_baseline",
    "set_feature_act_hook",
    "vjp_attn",
    "vjp_mlp",
]

HOOKED_NAMES = {
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
"""Names that hooked models have of their own, and the hub ids they stand for."""
COLUMNS_AT_ONCE = 8192


def load_model(
    device: str,
    model_name: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    hf_weights_override: str | None = None,
) -> Model:
    """Load a model for analysis, as the reference does: a tokenizer without a pad token pads with its end of text.

    Args:
        device: Where its weights live.
        model_name: A hub id, a local folder, or one of the reference's short names ("gpt2-small").
        dtype: Of the weights.
        hf_weights_override: Take weights, config and tokenizer from here instead.

    Returns:
        A `Model`, where the reference returns a hooked one. Gradients stay as the caller has them.

    Raises:
        FileNotFoundError: Nothing is there.
        UnsupportedModelError: The architecture is not supported.
    """
    name = hf_weights_override or HOOKED_NAMES.get(model_name, model_name)
    model = load_engine_model(name, device=device, dtype=dtype)
    tokenizer = model.tokenizer
    if tokenizer is not None and tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return model


def get_feature_vector(model: Any, f: Any, sae: Any = None) -> Tensor:
    """The feature's value vector [d]: its decoder row, or the neuron's output weights where ``sae`` is None."""
    return _vector(model, f, sae, "value")


def get_feature_input_vector(model: Any, f: Any, sae: Any = None) -> Tensor:
    """The feature's key vector [d]: its encoder column, or the neuron's input weights where ``sae`` is None."""
    return _vector(model, f, sae, "key")


def _vector(model: Any, f: Any, sae: Any, side: str) -> Tensor:
    engine = as_model(model)
    dictionary = dictionary_of(engine, f, sae)
    return dictionary.vectors(side, dictionary.select([int(f.feature)]))[0].to(engine.device, engine.dtype)


def apply_unembed(model: Any, vec: Tensor, use_ln_final: bool = True) -> Tensor:
    """Logits [..., V] of vec [..., d]: the final norm applied as a function, then W_U and b_U. Float32 or wider."""
    engine = as_model(model)
    return _every_score(readouts.unembed(engine, use_ln_final), vec.to(engine.dtype), engine)


def apply_embed(model: Any, vec: Tensor) -> Tensor:
    """⟨vec, token embedding⟩ for every token, [..., V]; embeddings carry the model's own scale."""
    engine = as_model(model)
    return _every_score(readouts.embed(engine), vec.to(engine.dtype), engine)


def apply_embed_cosine_centered(
    model: Any, vec: Tensor, center_vec: Tensor | None = None, eps: float = readouts.COSINE_EPS
) -> Tensor:
    """⟨vec, (e − c)/‖e − c‖⟩ for every token, [..., V].

    ``center_vec`` c is [d] or [1, d]; None: the mean over the vocabulary. ``eps`` bounds ‖e − c‖ from below; a token
    whose embedding is the centre scores 0.
    """
    engine, centre = as_model(model), None if center_vec is None else center_vec.reshape(-1)
    scorer = readouts.embed_cosine_centered(engine, centre)
    if scorer.scale is not None:
        scorer = dataclasses.replace(scorer, scale=scorer.scale.clamp_max(1 / eps))
    return _every_score(scorer, vec.to(engine.dtype), engine)


@torch.no_grad()
def _every_score(readout: readouts.Readout, vec: Tensor, model: Model) -> Tensor:
    """The scores of the whole vocabulary, [..., V], for vec [..., d]."""
    rows = vec.reshape(-1, vec.shape[-1]).to(model.device)
    columns = torch.arange(model.vocab_size, device=model.device).split(COLUMNS_AT_ONCE)
    return torch.cat([readout.scores_at(rows, ids) for ids in columns], dim=1).reshape(*vec.shape[:-1], -1)


def get_logits_tokens(
    model_wrapper: Any, logits: Tensor, k: int = 10
) -> tuple[tuple[list[list[str]], list[list[str]]], tuple[list[list[int]], list[list[int]]]]:
    """((top tokens, bottom tokens), (top ids, bottom ids)) of logits [V] or [n, V], a list for each row.

    ``model_wrapper`` is a model, or holds one as ``.m``. Equal scores come in the order of their ids.
    """
    model = as_model(getattr(model_wrapper, "m", model_wrapper))
    rows = at_least_float32(logits.reshape(-1, logits.shape[-1]))
    found = readouts.LogitReadout().topk(rows, min(k, rows.shape[1]))
    top, bottom = found.top_ids.tolist(), found.bottom_ids.tolist()  # type: ignore[union-attr]
    return ([model.str_tokens(i) for i in top], [model.str_tokens(i) for i in bottom]), (top, bottom)


def set_feature_act_hook(act: Tensor, hook: Any, feature: int, value: float) -> Tensor:
    """A hook for a hooked model: set one feature's activations [B, S, n] to value, in place."""
    act[:, :, feature] = value
    return act


@torch.no_grad()
def compute_token_change(
    model: Any, prompts: Tensor | Sequence[str], f: Any, sae: Any, value: float, invert_sign: bool = False
) -> Tensor:
    """Mean change of the logits over all positions, [V], when a feature's activation is set to ``value``.

    The model runs with the SAE (or transcoder) spliced in, both times. ``invert_sign`` gives clean − changed.
    ``prompts`` are ids [B, S] or texts.
    """
    engine = as_model(model)
    ids = prompts if isinstance(prompts, Tensor) else _prompt_ids(model, engine, prompts)
    tokens = as_tokens(ids, engine)
    tokens = Tokens(tokens.ids, torch.ones_like(tokens.valid_mask))  # every position counts here, pads included
    lens = plan(
        dictionary_of(engine, f, sae), engine, preset="token_change", tokens=tokens, token_change_value=float(value)
    )
    changed = _every_score(lens.readout, lens.vectors([int(f.feature)]), engine)[0]
    return -changed if invert_sign else changed


def _prompt_ids(model: Any, engine: Model, prompts: Sequence[str]) -> Tensor:
    """Ids [B, S] of texts, with a beginning-of-text token where the tokenizer has one, padded on the right."""
    if hasattr(model, "to_tokens"):
        return model.to_tokens(list(prompts))
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("prompts are texts, but the model has no tokenizer; pass token ids [B, S]")
    rows = [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    rows = [ids if bos is None or ids[:1] == [bos] else [bos, *ids] for ids in rows]
    length = max(len(ids) for ids in rows)
    if pad is None and any(len(ids) < length for ids in rows):
        raise ValueError("prompts differ in length and the tokenizer has no pad token; pass token ids [B, S]")
    return torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows])


def load_reference_token_changes(jsonl_path: str | None) -> dict[str, dict[Any, dict[str, Any]]]:
    """Token changes computed earlier, by feature_str (``by_str``) and by feature_index (``by_idx``).

    No path gives empty tables. Raises FileNotFoundError for a missing file, ValueError for a line that is no row.
    """
    found: dict[str, dict[Any, dict[str, Any]]] = {"by_str": {}, "by_idx": {}}
    if not jsonl_path:
        return found
    if not Path(jsonl_path).is_file():
        raise FileNotFoundError(f"reference results {jsonl_path!r} do not exist")
    keys = ("positive_top_tokens", "positive_top_ids", "positive_bottom_tokens", "positive_bottom_ids")
    for number, line in enumerate(Path(jsonl_path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            info = {key: row.get(key) for key in keys}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{jsonl_path!r} line {number} is no result row: {error}") from error
        if row.get("feature_str") is not None:
            found["by_str"][row["feature_str"]] = info
        if str(row.get("feature_index")).isdigit():
            found["by_idx"][int(row["feature_index"])] = info
    return found


def distributed_mean_vector(vec: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Mean over processes: Σ vec / Σ count where a count is given (vec is a sum then), else the plain mean.

    Raises:
        ValueError: The count over all processes is not positive.
    """
    if count is not None:
        return distributed_mean(vec, count)
    return distributed_mean(vec, 1) if dist.is_initialized() else vec


@torch.no_grad()
def jacobian_linearity(
    V: Tensor, valid_mask: Tensor | None, eps: float = 1e-12, energy_eps: float = 1e-12
) -> dict[str, float]:
    """How far transported vectors V [B, S, d] agree in direction, over the valid positions (paper, Appendix).

    Returns N, N_used, E_mu, sum_energy, mean_energy, sum_parallel2, EV_mu, perp_EV and rel_var; all 0 where nothing is
    valid. With torch.distributed running, over the positions of all processes.
    """
    mask = torch.ones(V.shape[:2], dtype=torch.bool) if valid_mask is None else valid_mask.bool()
    bundle = V[mask.to(V.device)][None]
    if not total(torch.tensor(bundle.shape[1], device=V.device)):
        return dict.fromkeys(STATISTICS, 0.0)
    return {name: float(value[0]) for name, value in linearity(bundle, eps, energy_eps, total).items()}


BASELINE_REGISTRY: dict[str, dict[str, str | None]] = {
    name: {key: value for key, value in preset.as_dict().items() if key != "baseline"}
    for name, preset in PRESETS.items()
    if preset.stream_transition != "adaptive" and not preset.is_dashboard
}
"""The reference's nine presets: name → feature_vector, stream_transition, readout."""


def resolve_baseline(cfg: Any) -> dict[str, str | None]:
    """feature_vector, stream_transition, readout and baseline of a configuration: a preset's, or the three given.

    ``cfg`` is a mapping or has attributes. Raises ValueError for an unknown preset, naming those known.
    """
    name = _setting(cfg, "baseline", None)
    if name:
        return find_preset(str(name)).as_dict()
    parts = {key: _setting(cfg, key) for key in ("feature_vector", "stream_transition", "readout")}
    return {**parts, "baseline": "_".join(str(part) for part in parts.values())}


_REQUIRED = object()


def _setting(cfg: Any, key: str, default: Any = _REQUIRED) -> Any:
    """A key of a mapping, or an attribute."""
    found = cfg.get(key, default) if isinstance(cfg, Mapping) or hasattr(cfg, "keys") else getattr(cfg, key, default)
    if found is _REQUIRED:
        raise ValueError(f"the configuration has neither a baseline nor a {key}")
    return found
