"""Several processes of a script of the reference, under torch.distributed: each holds its share of the token sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from querylens_fast.analysis.caches import ResidCache, VJPResidCache
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    tensor = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def distributed_mean(summed: Tensor, count: float | Tensor) -> Tensor:
    """Σ summed / Σ count over all processes.

    Raises:
        ValueError: The count over all processes is not positive; all of them raise, or none.
    """
    counted = total(torch.as_tensor(count).to(summed.device, summed.dtype))
    summed = total(summed)
    if bool((counted <= 0).any()):
        raise ValueError(f"count is {counted.tolist()} over all processes; expected at least one valid position")
    return summed / counted


def distribute_batch(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, stop) of this process's rows; the first processes take one more where they do not divide evenly."""
    size, rest = divmod(batch_size, world_size)
    start = rank * size + min(rank, rest)
    return start, start + size + (rank < rest)


def local_tokens(model: Model, sample: Any, rank: int, world_size: int, cache: Any = None) -> Tokens:
    """This process's share of a sample.

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
    return Tokens(ids, mask, tokens.source, tokens.details)


def _mask_of(masks: Sequence[Tensor | None], ids: Tensor) -> Tensor:
    known = [mask.bool().cpu() for mask in masks if mask is not None]
    if not known:
        return torch.ones_like(ids, dtype=torch.bool)
    if len(known) < len(masks):
        raise ValueError("some chunks of resid_cache have a valid_mask and some have none")
    mask = torch.cat(known)
    if mask.shape != ids.shape:
        raise ValueError(
            f"resid_cache was built for tokens {list(mask.shape)}, but this process's share of pile_sample is "
            f"{list(ids.shape)}"
        )
    return mask
