"""A causal language model as the tensors and layers that the engine needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from querylens_fast.models.blocks import Block, Masking
from querylens_fast.models.fingerprint import behaves_otherwise, earlier_fingerprints, fingerprint, frame_fingerprint
from querylens_fast.models.norms import AnyNorm, OwnNorm

Linearisation = Literal["auto", "hand-written", "autodiff", "none"]


@dataclass
class Model:
    """A causal language model, ready for the engine. Built by `load_model` or `as_model`, not by hand.

    W_E [V, D] is the raw embedding; the model multiplies it by ``embed_scale`` (Gemma: √d_model), so the token
    embedding of the paper is ``embed_scale · W_E``. W_U [V, D] is the unembedding's weight, b_U [V] its bias or None;
    ``logit_scale`` multiplies both. ``convention`` says how to read scores: raw lm_head or a hooked model's processed
    weights. ``linearisation`` says whose Jacobians are taken: those written out in `blocks` and `moe`, or autodiff's
    through the model's ``own`` layers (`own_layers.OwnLayers`, else None). ``has_submodules`` False: each layer is one
    unit, so that the stream between attention and MLP, the first order and one module alone are refused; ``parallel``:
    because attention and MLP read the same stream. ``max_positions`` is the length of its table of position embeddings
    (None: it has none, and takes sequences of any length). ``layout`` is the hand-written form of a known family that
    is linearised by autodiff, and ``behaviour`` a few of the source's own logits.
    """

    name: str
    architecture: str
    blocks: list[Block]
    final_norm: AnyNorm | OwnNorm
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
    logit_scale: float = 1.0
    own: Any = field(default=None, repr=False)
    has_submodules: bool = True
    parallel: bool = False
    max_positions: int | None = None
    layout: Model | None = field(default=None, repr=False)
    behaviour: str = field(default="", repr=False)

    @property
    def mixture_of_experts(self) -> bool:
        """Whether any layer routes its positions among experts; their Jacobians hold the routing fixed."""
        return any(part.routed for block in self.blocks for part in (block.attention, block.mlp))

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
        if self.own is not None:
            return self.own.front(ids)
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
        return Masking(valid, (ids.shape[0], ids.shape[1]), self.device, ids.to(self.device))

    @torch.no_grad()
    def logits(self, residual: Tensor) -> Tensor:
        """Logits [..., V] of final residuals [..., D], soft cap included."""
        return self.cap(self.unembed(self.final_norm(residual)))

    def unembed(self, normed: Tensor) -> Tensor:
        """(W_U x + b_U) · logit_scale for normed residuals [..., D]."""
        logits = torch.nn.functional.linear(normed, self.W_U, self.b_U)
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale

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
        return fingerprint(self)

    @property
    def identity(self) -> dict[str, str]:
        """What a transport records of its model, for `difference_from`."""
        return {
            "fingerprint": self.fingerprint,
            "frame_fingerprint": frame_fingerprint(self),
            "behaviour": self.behaviour,
        }

    @property
    def raw_embedding(self) -> Tensor:
        """The embedding table as the checkpoint has it."""
        return (
            self.W_E if self.own is None or self.source is None else self.source.get_input_embeddings().weight.detach()
        )

    def difference_from(self, metadata: Mapping[str, str]) -> str | None:
        """How this model differs from the one that a transport's metadata describe; None: it is the same."""
        found, frame = metadata["fingerprint"], frame_fingerprint(self)
        if found == frame or (self.linearisation == "none" and metadata.get("frame_fingerprint") == frame):
            return None  # one of the two was read without its layers
        if found != self.fingerprint and found not in earlier_fingerprints(self):
            return f"other weights than {self.name!r} has (fingerprints {found[:8]} and {self.fingerprint[:8]})"
        difference = behaves_otherwise(metadata.get("behaviour", ""), metadata.get("dtype", ""), self)
        if difference is not None:
            return (
                f"the weights of {self.name!r}, but another config, hooks or small changes: their logits differ by "
                f"{difference:.1e} (relative)"
            )
        return None
