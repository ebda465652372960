"""What surrounds a model's layers: embedding and scale, final norm, head, logit scale and soft cap.

For a model without a hand-written layout all of it is measured on the model's own forward pass: which module norms the
last layer's output, what happens to the head's output before it is returned, and by what factor a token embedding
enters the stream. What does not have this form is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.models.norms import IDENTITY, OwnNorm
from querylens_fast.models.own_layers import OwnLayers, probe_ids

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
EMBEDDED_AT_ONCE = 512
SAME = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative difference that rounding explains; 0.03 in half precision."""


@torch.no_grad()
def measured_frame(source: Any, own: OwnLayers, name: str, tokenizer: Any) -> Model:
    """A `Model` without blocks around the layers of ``own``; weights are views of the source's.

    Raises:
        UnsupportedModelError: Its readout is no norm, linear map, factor and soft cap; or has another width.
    """
    config = source.config.get_text_config()
    embedding, head = source.get_input_embeddings(), source.get_output_embeddings()
    ids = probe_ids(own.vocab_size, own.device)
    found = own.trace(ids)
    d_model = found.normed.shape[-1]
    W_U, b_U = head.weight.detach(), getattr(head, "bias", None)
    if W_U.shape[-1] != d_model or embedding.weight.shape[-1] != d_model:
        raise UnsupportedModelError(
            f"model {name!r}: its layers are {d_model} wide, but its embedding is {embedding.weight.shape[-1]} and its "
            f"unembedding {W_U.shape[-1]} wide, with a projection between them that is not supported"
        )
    before = _factor(found.normed, found.head_input)
    if before is None or (before != 1.0 and b_U is not None):
        raise UnsupportedModelError(f"model {name!r}: something other than a factor lies between final norm and head")
    scale, cap = _after_head(own, ids, W_U.shape[0], config, name)
    W_E, embed_scale = _embedding(own, embedding, config)
    return Model(
        name=name,
        architecture=config.model_type,
        blocks=[],
        final_norm=IDENTITY if found.final_norm is None else OwnNorm(found.final_norm),
        W_E=W_E,
        W_U=W_U,
        b_U=None if b_U is None else b_U.detach(),
        embed_scale=embed_scale,
        position_embedding=None,
        logit_softcap=cap,
        logit_scale=before * scale,
        convention="raw lm_head",
        tokenizer=tokenizer,
        source=source,
    )


def _same(found: Tensor, expected: Tensor) -> bool:
    difference = (found.double() - expected.double()).norm()
    return bool(difference <= SAME.get(expected.dtype, 0.03) * expected.double().norm().clamp_min(1e-30))


def _factor(x: Tensor, y: Tensor) -> float | None:
    """c with y = c·x within rounding, or None."""
    if torch.equal(x, y):
        return 1.0
    if x.shape != y.shape:
        return None
    wide = x.double().flatten(), y.double().flatten()
    factor = float(wide[0] @ wide[1] / (wide[0] @ wide[0]).clamp_min(1e-30))
    return factor if _same(x * factor, y) else None


def _after_head(own: OwnLayers, ids: Tensor, vocab: int, config: Any, name: str) -> tuple[float, float | None]:
    """(factor, soft cap) that the model applies to the head's output; tried on numbers from −60 to 60."""
    values = torch.linspace(-60, 60, vocab, dtype=torch.float64, device=ids.device).expand(*ids.shape, -1)
    logits = own.between_head_and_logits(ids, values)
    if logits.shape == values.shape:
        factor = _factor(values, logits)
        if factor is not None:
            return factor, None
        cap = next((c for c in (getattr(config, n, None) for n in SOFT_CAPS) if c), None)
        if cap and _same(torch.tanh(values / cap) * cap, logits):
            return 1.0, float(cap)
    raise UnsupportedModelError(
        f"model {name!r} changes its logits by more than a factor or the soft cap that its config names"
    )


def _embedding(own: OwnLayers, embedding: Any, config: Any) -> tuple[Tensor, float]:
    """(W_E [V, D], scale): embed_scale·W_E is what a token adds to the stream before layer 0, positions aside.

    Where the token embeddings go through a norm or a matrix of their own first (BLOOM), W_E holds them after it; where
    that takes in the positions as well (BART, BERT), at position 0.
    """
    W_E = embedding.weight.detach()
    first = torch.arange(min(12, own.vocab_size), device=own.device)[None]
    second = first.flip(1)
    stream = own.front(first) - own.front(second)
    plain = W_E[first] - W_E[second]
    measured = _factor(plain, stream)
    if measured is not None:
        named = [1.0, *(getattr(config, n, None) for n in ("embedding_multiplier", "scale_emb")), W_E.shape[1] ** 0.5]
        own_scale = getattr(embedding, "embed_scale", None)
        named += [None if own_scale is None else float(torch.as_tensor(own_scale).to(W_E.dtype))]
        near = [float(c) for c in named if isinstance(c, int | float) and _close(float(c), measured, W_E.dtype)]
        return W_E, near[-1] if near else measured
    tokens = torch.arange(len(W_E), device=own.device)
    return torch.cat([own.front(ids[:, None])[:, 0] for ids in tokens.split(EMBEDDED_AT_ONCE)]), 1.0


def _close(named: float, measured: float, dtype: torch.dtype) -> bool:
    return abs(named - measured) <= abs(measured) * {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 0.01)


POSITION_TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings", "pos_encoding")


def position_limit(source: nn.Module) -> int | None:
    """How many positions the model's table of position embeddings has, learned or not; None: there is no table.

    Without one (rotary, ALiBi, state-space layers, sinusoids made as they are needed) any length runs.
    """
    found = []
    for module in source.modules():
        for name in POSITION_TABLES:
            table = getattr(module, name, None)
            if isinstance(table, nn.Embedding):
                skipped = 0 if table.padding_idx is None else table.padding_idx + 1
                found.append(table.num_embeddings - getattr(table, "offset", skipped))
            elif isinstance(table, Tensor) and table.ndim == 2:
                found.append(len(table))
        if hasattr(module, "build_mpt_alibi_tensor"):  # made once for this length
            found.append(source.config.max_seq_len)  # type: ignore
    return min(found, default=None)
