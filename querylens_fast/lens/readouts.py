"""Readouts: from a vector of the residual stream to a score for every token of the vocabulary.

Each readout is a matrix product with a few terms around it, which is all that `streamed_topk` needs: no row of V
scores is stored, and the centered cosine makes no centered copy of the embedding. `LogitReadout` is for ablations of
models with a logit soft cap, which cannot avoid the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from querylens_fast.lens.presets import Preset
from querylens_fast.models.model import Model
from querylens_fast.models.norms import Norm, at_least_float32
from querylens_fast.topk import api as ops

COSINE_EPS = 1e-8
UNEMBEDDINGS = ("raw", "folded")
ROWS_AT_ONCE = 1024
"""Token embeddings widened to float32 at a time: as many as stay in the processor's cache."""


@dataclass(frozen=True)
class Scorer:
    """score[i, v] = (⟨x_i, W_v⟩ + offset_i) · scale_v + bias_v, with x = factor · vectors (normed for unembed).

    W stays in the model's dtype, and x is rounded to it once; products are summed in float32 or wider.
    """

    model: Model
    W: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    factor: float = 1.0
    centre: Tensor | None = None
    final_norm: bool = False

    def topk(
        self,
        vectors: Tensor,
        k: int,
        backend: str = "auto",
        *,
        bottom: bool = True,
        statistics: bool = False,
        histogram: int = 0,
    ) -> ops.TopK:
        """The k highest and k lowest tokens of each vector [n, D]; scores in raw units of the readout."""
        x, offset = self.prepare(vectors)
        return ops.streamed_topk(
            x,
            self.W,
            k,
            bias=self.bias,
            scale=self.scale,
            offset=offset,
            bottom=bottom,
            backend=backend,
            statistics=statistics,
            histogram=histogram or None,
        )

    def scores_at(self, vectors: Tensor, token_ids: Tensor) -> Tensor:
        """The scores of given tokens, [n, m], for vectors [n, D] and token_ids [m] or [n, m]."""
        x, offset = self.prepare(vectors)
        return ops.scores_at(x, self.W, token_ids.to(x.device), bias=self.bias, scale=self.scale, offset=offset)

    def prepare(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x [n, D] in W's dtype, offset [n] or None) of the score's formula for vectors [n, D]."""
        vectors = vectors.to(self.model.device)
        if self.final_norm:
            vectors = self.model.final_norm(at_least_float32(vectors))
        x = (vectors if self.factor == 1.0 else vectors * self.factor).to(self.W.dtype)
        if self.centre is None:
            return x, None
        # From the rounded x, so that what both terms of ⟨x, w⟩ − ⟨x, c⟩ share cancels.
        offset = -(x.to(self.centre) * self.centre).sum(1) / self.factor
        return x, offset.to(torch.promote_types(self.W.dtype, torch.float32))


@dataclass(frozen=True)
class LogitReadout:
    """The vectors are logits [n, V] already: they are sorted."""

    final_norm: bool = False

    def topk(self, vectors: Tensor, k: int, backend: str = "auto", *, bottom: bool = True) -> ops.TopK:
        """The k highest and k lowest tokens of each row; equal scores by the lower id."""
        high = vectors.sort(dim=1, descending=True, stable=True)
        if not bottom:
            return ops.TopK(high.values[:, :k], high.indices[:, :k], None, None)
        low = vectors.sort(dim=1, stable=True)
        return ops.TopK(high.values[:, :k], high.indices[:, :k], low.values[:, :k], low.indices[:, :k])

    def scores_at(self, vectors: Tensor, token_ids: Tensor) -> Tensor:
        """The scores of given tokens, [n, m], for token_ids [m] or [n, m]."""
        return vectors.gather(1, token_ids.to(vectors.device).expand(len(vectors), -1))


Readout = Scorer | LogitReadout


def unembed(model: Model, final_norm: bool = True) -> Scorer:
    """The final norm, applied to the vector as a function, then W_U and b_U (paper §3; reference ``apply_unembed``)."""
    bias = None if model.b_U is None else _wide(model.b_U * model.logit_scale)
    return Scorer(model, model.W_U, bias=bias, factor=model.logit_scale if final_norm else 1.0, final_norm=final_norm)


def dashboard(model: Model, unembedding: str = "raw") -> Scorer:
    """W_U alone, as dashboards read decoder rows: no final norm on the vector and no b_U.

    ``unembedding="raw"`` is the checkpoint's matrix (SAEDashboard's main branch). "folded" is the matrix that
    transformer-lens's ``from_pretrained`` makes (SAEDashboard 0.8.0, sae-lens's tutorials): columns times the final
    norm's scale; for LayerNorm, each row minus its mean over d_model; without a logit soft cap, minus the mean row.

    Raises:
        ValueError: Another name, a hooked model whose W_U is folded already, or a final norm that cannot be folded.
    """
    if unembedding not in UNEMBEDDINGS:
        raise ValueError(f"unembedding is {unembedding!r}; expected {' or '.join(UNEMBEDDINGS)}")
    is_folded = "folded" in model.convention
    if is_folded and unembedding == "raw":
        raise ValueError(
            f"unembedding is 'raw', but model {model.name!r} has the final norm folded into W_U; pass "
            "unembedding='folded', or load the checkpoint with load_model"
        )
    return Scorer(model, model.W_U if is_folded or unembedding == "raw" else _folded_unembedding(model))


def _folded_unembedding(model: Model) -> Tensor:
    norm = model.final_norm
    if not isinstance(norm, Norm):
        raise ValueError(
            f"unembedding is 'folded', but the final norm of {model.name!r} ({type(norm).__name__}) is no scale that "
            "could be multiplied into W_U; pass unembedding='raw'"
        )
    W = at_least_float32(model.W_U)
    W = W.clone() if norm.weight is None else W * norm.weight.to(W)
    if norm.centred:
        W -= W.mean(1, keepdim=True)
    if model.logit_softcap is None:
        W -= W.mean(0)
    return W.to(model.W_U.dtype)


def logit_difference(model: Model) -> Scorer:
    """W_U alone, for differences of normed residuals (the ablations)."""
    return Scorer(model, model.W_U, factor=model.logit_scale)


def embed(model: Model) -> Scorer:
    """⟨vector, token embedding⟩, with the model's own embedding scale (reference ``apply_embed``)."""
    return Scorer(model, model.W_E, factor=model.embed_scale)


def embed_cosine_centered(model: Model, centre: Tensor | None = None) -> Scorer:
    """⟨vector, (e − c)/‖e − c‖⟩ for each token embedding e; not divided by the vector's norm.

    ``centre`` c [D] is the mean embedding over the sample's valid tokens where there is a sample (a transport's
    ``centre``), else, as in the reference, the mean over the vocabulary.
    """
    parts = model.W_E.split(ROWS_AT_ONCE)
    if centre is None:
        centre = torch.stack([at_least_float32(rows).sum(0) for rows in parts]).sum(0) / len(model.W_E)
        centre = centre * model.embed_scale
    centre = at_least_float32(centre.to(model.device))
    norms = torch.cat([(at_least_float32(rows) * model.embed_scale - centre).norm(dim=1) for rows in parts])
    # An embedding that is the centre itself has no direction: its score is 0.
    scale = torch.where(norms > COSINE_EPS, 1 / norms.clamp_min(COSINE_EPS), torch.zeros_like(norms))
    return Scorer(model, model.W_E, scale=scale, factor=model.embed_scale, centre=centre)


def find_readout(
    model: Model, preset: Preset, centre: Tensor | None, final_norm: bool = True, unembedding: str = "raw"
) -> Readout:
    """The readout of a preset. The ablations', which name none, depends on whether the model caps its logits."""
    if preset.is_dashboard:
        return dashboard(model, unembedding)
    if preset.readout == "unembed":
        return unembed(model, final_norm)
    if preset.readout == "embed":
        return embed(model)
    if preset.readout == "embed_cosine_centered":
        return embed_cosine_centered(model, centre)
    return logit_difference(model) if model.logit_softcap is None else LogitReadout()


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else at_least_float32(x)
