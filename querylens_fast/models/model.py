"""A causal language model as the tensors and layers that the engine needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from querylens_fast.models.blocks import Block, Masking
from querylens_fast.models.norms import Norm

Linearisation = Literal["hand-written", "autodiff"]


class UnsupportedModelError(ValueError):
    """The model's architecture, or a variation of it, is not one this package reproduces."""


@dataclass
class Model:
    """A causal language model, ready for the engine. Built by `load_model` or `as_model`, not by hand.

    W_E [V, D] is the raw embedding; the model multiplies it by ``embed_scale`` (Gemma: √d_model), so the token
    embedding of the paper is ``embed_scale · W_E``. W_U [V, D] is the unembedding's weight, b_U [V] its bias or None.
    ``convention`` says how to read scores: raw lm_head or a hooked model's processed weights. ``linearisation`` says
    whose Jacobians the walks take: those written out in `blocks` and `experts`, or autodiff's through the layers.
    """

    name: str
    architecture: str
    blocks: list[Block]
    final_norm: Norm
    W_E: Tensor
    W_U: Tensor
    b_U: Tensor | None
    embed_scale: float
    position_embedding: Tensor | None
    logit_softcap: float | None
    convention: str
    tokenizer: Any = None
    source: Any = field(default=None, repr=False)
    linearisation: Linearisation = "hand-written"
    has_submodules: bool = True
    """False: module 2l is the whole of layer l and module 2l + 1 zero, so there is no resid_mid and no first order."""

    @property
    def mixture_of_experts(self) -> bool:
        """Whether any layer routes its positions among experts; their Jacobians hold the routing fixed."""
        return any(block.mlp.routed for block in self.blocks)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.W_E.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.W_U.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.W_E.dtype

    @property
    def device(self) -> torch.device:
        return self.W_E.device

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's pad token, or None: then every position counts as valid."""
        return getattr(self.tokenizer, "pad_token_id", None)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [B, S, D] of ids [B, S], without positions (the reference's hook_embed)."""
        embedded = self.W_E[ids.to(self.device)]
        return embedded if self.embed_scale == 1.0 else embedded * self.embed_scale

    @torch.no_grad()
    def first_residual(self, ids: Tensor) -> Tensor:
        """The residual stream before layer 0, [B, S, D]."""
        embedded = self.embed(ids)
        return embedded if self.position_embedding is None else embedded + self.position_embedding[: ids.shape[1]]

    @torch.no_grad()
    def residuals(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(pre of each layer, mid of each layer, final), each [B, S, D], from a plain forward pass without a mask."""
        x, masking = self.first_residual(ids), self.masking(ids)
        pre, mid = [], []
        for block in self.blocks:
            pre.append(x)
            mid.append(x + block.attention(x, masking))
            x = mid[-1] + block.mlp(mid[-1])
        return pre, mid, x

    def masking(self, ids: Tensor, valid: Tensor | None = None) -> Masking:
        """How the tokens ids [B, S] attend; ``valid`` [B, S] bool hides padding."""
        return Masking(valid, (ids.shape[0], ids.shape[1]), self.device)

    @torch.no_grad()
    def logits(self, residual: Tensor) -> Tensor:
        """Logits [..., V] of final residuals [..., D], soft cap included."""
        return self.cap(self.unembed(self.final_norm(residual)))

    def unembed(self, normed: Tensor) -> Tensor:
        """W_U x + b_U for normed residuals [..., D]."""
        return torch.nn.functional.linear(normed, self.W_U, self.b_U)

    def cap(self, logits: Tensor) -> Tensor:
        """The model's final logit soft cap, where it has one."""
        if self.logit_softcap is None:
            return logits
        return torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    def str_tokens(self, ids: Iterable[int]) -> list[str]:
        """Each token id decoded on its own. Raises ValueError when the model was loaded without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(
                f"model {self.name!r} has no tokenizer, so token ids cannot be turned into strings; "
                "pass tokenizer='path-or-hub-id' to load_model"
            )
        known = self._known_tokens
        ids = [int(i) for i in ids]
        missing = sorted(set(ids) - known.keys())
        if missing:
            texts = self.tokenizer.batch_decode([[i] for i in missing], clean_up_tokenization_spaces=False)
            known.update(zip(missing, texts, strict=True))
        return [known[i] for i in ids]

    @cached_property
    def _known_tokens(self) -> dict[int, str]:
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the model's shape and of samples of its weights, the same in every dtype it is loaded in."""
        digest = hashlib.sha256(f"{self.n_layers},{self.d_model},{self.vocab_size}".encode())
        weights = [self.W_E, self.W_U, self.b_U, self.position_embedding, *_own_weights(self.final_norm)]
        for block in self.blocks:
            for part in (block.attention, block.mlp):
                weights += part.matrices()
                for name, held in vars(part).items():
                    weights += [held] if name.startswith("b_") else _own_weights(held)
        for weight in weights:
            # A bias of zeros is none: hooked models keep such.
            if weight is None or (weight.ndim == 1 and not bool(weight.any())):
                continue
            matrix = weight[None] if weight.ndim == 1 else weight
            rows = torch.linspace(0, matrix.shape[0] - 1, 16, device=matrix.device).long()
            columns = torch.linspace(0, matrix.shape[1] - 1, 16, device=matrix.device).long()
            sample = matrix[rows][:, columns].to(torch.float32).to(torch.bfloat16).float().cpu()
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:32]


def _own_weights(norm: Any) -> list[Tensor | None]:
    """A norm's scale, as the checkpoint has it, and its bias; nothing for what is no norm."""
    if not isinstance(norm, Norm):
        return []
    return [norm.weight if norm.stored is None else norm.stored, norm.bias]
