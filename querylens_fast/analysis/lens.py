"""How a call of the reference becomes a pipeline of the engine.

One function, `lens_pipeline`, turns the reference's arguments into a `Pipeline`; `result_row` gives the reference's
result for one feature. Where torch.distributed is running, each process walks its share of the sample, as the
reference's do, and means and statistics are taken over all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from querylens_fast.analysis.caches import ResidCache, VJPResidCache
from querylens_fast.dictionaries.dictionary import Dictionary, neuron_dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.pipeline import Pipeline, Stats, _Moved, plan
from querylens_fast.lens.presets import ABLATIONS, Preset, find_preset
from querylens_fast.lens.readouts import embed_cosine_centered
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.transport.jacobians import Budget, Submodule, batches, linearise, walk
from querylens_fast.transport.per_feature import Walked, linearity, walk_features
from querylens_fast.transport.transport import Transport

RESULT_KEYS = (
    "layer",
    "top_tokens",
    "bottom_tokens",
    "top_ids",
    "bottom_ids",
    "stats",
    "layer_indices",
    "layer_top_tokens",
    "layer_bottom_tokens",
    "layer_top_ids",
    "layer_bottom_ids",
    "layer_energy_scores",
)


@dataclass
class LensPipeline(Pipeline):
    """A `Pipeline` with the reference's options of the Jacobian, and its sharing of a sample among processes."""

    submodule: Submodule = "both"
    through_norms: bool = True
    distributed: bool = False

    def _walk(self, vectors: Tensor, point: int) -> Walked:
        if self.tokens is None:
            raise ValueError(f"preset {self.preset.name!r} walks features through the model: pass tokens")
        side, order = self.preset.feature_vector, self._order
        where = {"submodule": self.submodule, "through_norms": self.through_norms}
        walked = walk_features(
            self.model,
            self.tokens,
            vectors,
            point,
            side,
            order,
            layer=self.dictionary.layer,
            max_memory_gib=self.max_memory_gib,
            **where,
        )
        if not self.distributed:
            return walked
        n = self.tokens.n_valid
        bundle = _bundle(self, vectors, point)
        return Walked(
            distributed_mean(walked.mean * n, n),
            linearity(gathered(bundle)),
            [(label, distributed_mean(mean * n, n)) for label, mean in walked.layer_means],
        )

    def _move(self, features: Tensor) -> _Moved:
        moved = super()._move(features)
        if not (self.distributed and self.preset.is_ablation and self.tokens is not None):
            return moved
        n = self.tokens.ids.numel()
        return dataclasses.replace(moved, vectors=distributed_mean(moved.vectors * n, n))


@torch.no_grad()
def _bundle(pipeline: LensPipeline, vectors: Tensor, point: int) -> Tensor:
    """The transported vectors at each valid position of this process, [n, N, D]."""
    model, tokens = pipeline.model, pipeline.tokens
    if tokens is None:
        raise ValueError("no tokens to walk over")
    rows_at_once = Budget.plan(model, tokens.ids.shape[1], pipeline.max_memory_gib).rows
    valid, moved = tokens.valid_mask.to(model.device), []
    for rows in batches(len(tokens.ids), rows_at_once):
        lin = linearise(model, tokens, rows, pipeline.submodule, pipeline.through_norms)
        start = lin.everywhere(vectors.to(model.device, model.dtype))
        moved.append(walk(lin, start, point, pipeline.preset.feature_vector, pipeline._order)[:, valid[rows]])
    return torch.cat(moved, dim=1)


def gathered(bundle: Tensor) -> Tensor:
    """Bundles [n, N, D] of all processes as one, on each of them."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, bundle.cpu())
    return torch.cat(parts, dim=1).to(bundle.device)


def distributed_mean(total: Tensor, count: float | Tensor) -> Tensor:
    """Σ total / Σ count over all processes; checked after the reduction, so that all of them raise or none.

    Raises:
        ValueError: The count over all processes is not positive.
    """
    total, counted = total.clone(), torch.as_tensor(count).to(total.device, total.dtype).clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(counted)
    if bool((counted <= 0).any()):
        raise ValueError(f"count is {counted.tolist()} over all processes; expected at least one valid position")
    return total / counted


def distribute_batch(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, stop) of this process's rows; the first processes take one more where they do not divide evenly."""
    size, rest = divmod(batch_size, world_size)
    start = rank * size + min(rank, rest)
    return start, start + size + (rank < rest)


def local_tokens(model: Model, sample: Any, rank: int, world_size: int, cache: Any = None) -> tuple[Tokens, bool]:
    """(this process's share of the sample, whether there are others).

    Args:
        model: For the pad token.
        sample: Ids [B, S] of the whole sample.
        rank: Of this process.
        world_size: Number of processes.
        cache: A residual cache over this process's share; its masks say what is padding.

    Raises:
        ValueError: Several processes without torch.distributed, fewer sequences than processes, or a cache of another
            sample.
    """
    if world_size > 1 and not (dist.is_initialized() and dist.get_world_size() == world_size):
        raise ValueError(
            f"world_size is {world_size}, but torch.distributed runs "
            f"{dist.get_world_size() if dist.is_initialized() else 'no'} processes; start with torchrun and "
            "init_process_group, or use rank=0, world_size=1"
        )
    tokens = as_tokens(sample, model)
    if len(tokens.ids) < world_size:
        raise ValueError(f"{len(tokens.ids)} sequences cannot be shared among {world_size} processes")
    share = slice(*distribute_batch(len(tokens.ids), rank, world_size))
    ids, mask = tokens.ids[share], tokens.valid_mask[share]
    if cache is not None:
        if not isinstance(cache, (ResidCache, VJPResidCache)):
            raise ValueError(f"resid_cache is a {type(cache).__name__}; expected a ResidCache or VJPResidCache")
        mask = _mask_of(cache.valid_masks, ids)
    return Tokens(ids, mask, tokens.source, tokens.details), world_size > 1


def _mask_of(masks: Sequence[Tensor | None], ids: Tensor) -> Tensor:
    if all(mask is None for mask in masks):
        return torch.ones_like(ids, dtype=torch.bool)
    if any(mask is None for mask in masks):
        raise ValueError("some chunks of resid_cache have a valid_mask and some have none")
    mask = torch.cat([m.bool().cpu() for m in masks if m is not None])
    if mask.shape != ids.shape:
        raise ValueError(
            f"resid_cache was built for tokens {list(mask.shape)}, but this process's share of pile_sample is "
            f"{list(ids.shape)}"
        )
    return mask


def dictionary_of(model: Model, f: Any, sae: Any = None) -> Dictionary:
    """The dictionary a feature belongs to: the SAE's, or the MLP neurons of its layer where there is none.

    Raises:
        ValueError: The SAE's hook is of another layer than the feature says.
    """
    layer = int(f.layer)
    if sae is None:
        return neuron_dictionary(model, layer)
    dictionary = sae if isinstance(sae, Dictionary) else load_dictionary(sae, layer=layer)
    if dictionary.layer != layer:
        raise ValueError(f"{f} is of layer {layer}, but its dictionary {dictionary.name!r} of layer {dictionary.layer}")
    return dictionary


def preset_of(feature_vector: str, stream_transition: str, readout: str | None, name: str | None = None) -> Preset:
    """The preset of three components; the ablations end in logits, so a readout given with them does nothing."""
    preset = find_preset((feature_vector, stream_transition, None if stream_transition in ABLATIONS else readout))
    return dataclasses.replace(preset, name=name or f"{feature_vector}_{stream_transition}_{readout}")


def lens_pipeline(
    dictionary: Dictionary,
    model: Any,
    preset: Preset,
    *,
    submodule: str = "both",
    through_norms: bool = True,
    transport: Transport | None = None,
    tokens: Tokens | None = None,
    stats: Stats = "exact",
    distributed: bool = False,
    **options: Any,
) -> LensPipeline:
    """The engine's pipeline for the reference's options; nothing is fitted here.

    Args:
        dictionary: The features' dictionary.
        model: What `as_model` takes.
        preset: The three components.
        submodule: "both", "attn" or "mlp": whose Jacobians count.
        through_norms: Take Jacobians through the modules' norms.
        transport: A transport fitted with the same options over the same tokens, or None: features are walked.
        tokens: The sample.
        stats: As in `signatures`.
        distributed: The tokens are one process's share.
        **options: k, layers, final_norm, tuned_lens, … as in `signatures`.

    Raises:
        ValueError: Options that do not fit each other, the model or the transport.
    """
    if submodule.lower() not in ("both", "attn", "mlp"):
        raise ValueError(f"submodule is {submodule!r}; expected both, attn or mlp")
    submodule = submodule.lower()
    if transport is not None and preset.needs_transport:
        check_transport(transport, submodule, through_norms, None if distributed else tokens)
    planned = plan(
        dictionary,
        model,
        preset=preset,
        transport=transport,
        tokens=tokens,
        stats=stats if preset.needs_transport else "none",
        n_features=0,
        **options,
    )
    fields = {f.name: getattr(planned, f.name) for f in dataclasses.fields(Pipeline)}
    pipeline = LensPipeline(**fields, submodule=submodule, through_norms=through_norms, distributed=distributed)  # type: ignore[arg-type]
    if distributed and tokens is not None and pipeline.scorer.centre is not None and transport is None:
        centre = distributed_mean(pipeline.scorer.centre * tokens.n_valid, tokens.n_valid)
        pipeline.scorer = embed_cosine_centered(pipeline.model, centre)
    return pipeline


def check_transport(transport: Transport, submodule: str, through_norms: bool, tokens: Tokens | None) -> None:
    """Raise ValueError unless the transport was fitted with these options, over these tokens where they are given."""
    wanted = {"submodule": submodule, "through_norms": str(through_norms)}
    if tokens is not None and "averaging" not in transport.metadata:  # a Jacobian lens has a sample of its own
        wanted["tokens_digest"] = tokens.digest
    for key, value in wanted.items():
        if transport.metadata.get(key) != value:
            raise ValueError(
                f"transport was fitted with {key}={transport.metadata.get(key)}, but this call has {key}={value}; "
                "fit it again, or give the call what the transport was fitted with"
            )


def result_row(pipeline: Pipeline, feature: int) -> dict[str, Any]:
    """The reference's result for one feature, in its order of keys."""
    (row,) = pipeline(pipeline.dictionary.select([int(feature)])).rows()
    return {key: row[key] for key in RESULT_KEYS if key in row}


def analyze(
    model: Any,
    f: Any,
    sae: Any,
    pile_sample: Any,
    rank: int,
    world_size: int,
    preset: Preset,
    *,
    resid_cache: Any = None,
    transport: Transport | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The reference's ``analyze_feature``, both sides: one feature through `lens_pipeline` with all statistics."""
    engine = as_model(model)
    tokens, distributed = local_tokens(engine, pile_sample, rank, world_size, resid_cache)
    if transport is None:
        transport = getattr(resid_cache, "transport", None)
    pipeline = lens_pipeline(
        dictionary_of(engine, f, sae),
        engine,
        preset,
        tokens=tokens,
        transport=transport,
        distributed=distributed,
        layers=preset.stream_transition == "first_order",
        **options,
    )
    return result_row(pipeline, f.feature)
