"""Residual caches: the reference's `ResidCache` and `VJPResidCache`.

The engine linearises the model itself and needs only the padding mask of a cache; the residuals that a script may ask
for are computed chunk by chunk, when first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import as_tokens
from querylens_fast.transport.transport import Transport

MODULE_TYPES = ("attn", "mlp", "all")


@dataclass
class ResidChunk:
    """Residuals of one micro-batch: attn (resid_pre) and mlp (resid_mid) [L, B, S, d] or None, valid_mask [B, S]."""

    attn: Tensor | None
    mlp: Tensor | None
    valid_mask: Tensor | None


@dataclass
class VJPResidChunk:
    """`ResidChunk` with the token embeddings, embed [B, S, d] or None (reference ``hook_embed``)."""

    attn: Tensor | None
    mlp: Tensor | None
    embed: Tensor | None
    valid_mask: Tensor | None


Chunk = TypeVar("Chunk", ResidChunk, VJPResidChunk)


class _Cache(Generic[Chunk]):
    """Chunks of a token sample, each built when first asked for.

    ``transport`` may be set to a fitted transport: `jvp.analyze_feature` and `vjp.analyze_feature` then use it.
    """

    def __init__(self, chunks: Sequence[Chunk], module_type: str) -> None:
        self.module_type = module_type
        self.transport: Transport | None = None
        self._built: list[Chunk | None] = list(chunks)
        self._masks: list[Tensor | None] = [c.valid_mask for c in chunks]
        self._build: Callable[[int], Chunk] | None = None

    def __len__(self) -> int:
        return len(self._built)

    @property
    def chunks(self) -> list[Chunk]:
        """Every chunk; asking for them builds them all."""
        return [self._chunk(i) for i in range(len(self))]

    @property
    def valid_masks(self) -> list[Tensor | None]:
        """Each chunk's mask [B, S] bool, or None: everything is valid."""
        return self._masks

    def _chunk(self, i: int) -> Chunk:
        chunk = self._built[i]
        if chunk is None:
            if self._build is None:
                raise ValueError(f"chunk {i} of this cache was never given")
            chunk = self._built[i] = self._build(i)
        return chunk

    def _chosen(self, i: int, kind: str) -> tuple[Chunk, Tensor | None, Tensor | None]:
        """(chunk, attn, mlp) of chunk i; kind "attn" or "mlp" leaves the other one out."""
        if kind not in MODULE_TYPES:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(MODULE_TYPES)}")
        chunk = self._chunk(i)
        return chunk, chunk.attn if kind != "mlp" else None, chunk.mlp if kind != "attn" else None

    def _defer(self, sample: _Sample, build: Callable[[int], Chunk]) -> None:
        self._built, self._masks, self._build = [None] * len(sample.masks), list(sample.masks), build


class ResidCache(_Cache[ResidChunk]):
    """Residuals of a token sample, for the value side (reference ``analysis.common.ResidCache``)."""

    def get(self, micro_step: int, kind: str = "all") -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(attn [L, B, S, d], mlp [L, B, S, d], valid_mask [B, S]) of a chunk; kind "attn" or "mlp" leaves one out."""
        chunk, attn, mlp = self._chosen(micro_step, kind)
        return attn, mlp, chunk.valid_mask

    @staticmethod
    def build_for_local_pile_sample(
        model: Any,
        local_pile_sample: Tensor,
        accumulation_steps: int,
        module_type: str,
        return_device: str = "cpu",
        pad_token_id: int | None = None,
        use_layer_norm: bool = False,
    ) -> ResidCache:
        """A cache over token ids [B, S] in ``accumulation_steps`` chunks.

        Args:
            model: A hooked model, a transformers model or a `Model`.
            local_pile_sample: Ids [B, S] of this process.
            accumulation_steps: Number of chunks; the last one takes what is left over.
            module_type: "attn", "mlp" or "all": which residuals `get` gives.
            return_device: Where they are put.
            pad_token_id: Padding; None for the tokenizer's, and no padding where it has none.
            use_layer_norm: False: `get` gives the residuals as the module's norm leaves them.

        Raises:
            ValueError: An unknown module_type, or ids outside the vocabulary.
        """
        cache = ResidCache([], _checked(module_type))
        sample = _Sample(model, local_pile_sample, accumulation_steps, pad_token_id)
        cache._defer(
            sample, lambda i: ResidChunk(*sample.residuals(i, cache.module_type, use_layer_norm, return_device))
        )
        return cache


class VJPResidCache(_Cache[VJPResidChunk]):
    """Residuals and token embeddings of a sample, for the key side (reference ``analysis.common.VJPResidCache``)."""

    def get(
        self, micro_step: int, kind: str = "all"
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(attn, mlp, embed [B, S, d], valid_mask [B, S]) of a chunk; kind "attn" or "mlp" leaves one out."""
        chunk, attn, mlp = self._chosen(micro_step, kind)
        return attn, mlp, chunk.embed, chunk.valid_mask

    @staticmethod
    def build_for_local_pile_sample(
        model: Any,
        local_pile_sample: Tensor,
        accumulation_steps: int,
        module_type: str,
        return_device: str = "cpu",
        cache_embed: bool = True,
        pad_token_id: int | None = None,
        use_layer_norm: bool = False,
    ) -> VJPResidCache:
        """As `ResidCache.build_for_local_pile_sample`; ``cache_embed`` adds the token embeddings."""
        cache = VJPResidCache([], _checked(module_type))
        sample = _Sample(model, local_pile_sample, accumulation_steps, pad_token_id)

        def build(i: int) -> VJPResidChunk:
            attn, mlp, mask = sample.residuals(i, cache.module_type, use_layer_norm, return_device)
            embed = sample.model.embed(sample.ids[i]).to(return_device) if cache_embed else None
            return VJPResidChunk(attn, mlp, embed, mask)

        cache._defer(sample, build)
        return cache


def _checked(module_type: str) -> str:
    if module_type.lower() not in MODULE_TYPES:
        raise ValueError(f"module_type is {module_type!r}; expected one of {', '.join(MODULE_TYPES)}")
    return module_type.lower()


class _Sample:
    """The engine's model, and ids and masks [B, S] of each chunk."""

    def __init__(self, model: Any, sample: Tensor, steps: int, pad_token_id: int | None) -> None:
        self.model: Model = as_model(model)
        tokens = as_tokens(sample, self.model)
        mask = tokens.valid_mask if pad_token_id is None else tokens.ids != pad_token_id
        n, steps = len(tokens.ids), min(max(int(steps), 1), len(tokens.ids))
        bounds = [i * (n // steps) for i in range(steps)] + [n]
        parts = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        self.ids, self.masks = [tokens.ids[p] for p in parts], [mask[p] for p in parts]

    @torch.no_grad()
    def residuals(
        self, i: int, module_type: str, use_layer_norm: bool, device: str
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(resid_pre, resid_mid, mask) of chunk i, [L, B, S, d] or None, from a plain forward pass without a mask."""
        pre, mid, _ = self.model.residuals(self.ids[i])
        if not use_layer_norm:
            pre = [block.attention.norm(x) for block, x in zip(self.model.blocks, pre, strict=True)]
            mid = [block.mlp.norm(x) for block, x in zip(self.model.blocks, mid, strict=True)]
        return (
            torch.stack(pre).to(device) if module_type != "mlp" else None,
            torch.stack(mid).to(device) if module_type != "attn" else None,
            self.masks[i].to(device),
        )
