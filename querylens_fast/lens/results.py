"""Results: the signatures of a block of features, in memory, as tensors and as the reference's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.topk.api import TopK

if TYPE_CHECKING:
    from querylens_fast.lens.pipeline import Pipeline


@dataclass(frozen=True)
class LayerTerm:
    """One layer's share of a first-order result: its own tokens and its energy ⟨m_l, m⟩/‖m‖², [n]."""

    layer: int
    topk: TopK
    energy: Tensor


@dataclass
class Signatures:
    """Token signatures of n features of one layer under one preset.

    Attributes:
        features: Feature ids, [n] int64.
        top_scores: [n, k], descending, in raw units of the readout (logits for unembed; no softmax).
        top_ids: [n, k] int64 token ids; equal scores by the lower id.
        bottom_scores: [n, k], ascending.
        bottom_ids: [n, k] int64.
        stats: Columns by name, [n] each: rel_var and rel_var_se from a transport, or all the reference's statistics.
        choices: What the adaptive preset took for each feature, or None.
        layer_terms: The first order's layers, in the reference's order, when asked for.
        vectors: The vectors that were read out, [n, D], when asked for.
    """

    pipeline: Pipeline
    features: Tensor
    top_scores: Tensor
    top_ids: Tensor
    bottom_scores: Tensor
    bottom_ids: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    choices: list[str] | None = None
    layer_terms: list[LayerTerm] | None = None
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def layer(self) -> int:
        return self.pipeline.dictionary.layer

    @property
    def preset(self) -> str:
        return self.pipeline.preset.name

    @property
    def top_tokens(self) -> list[list[str]]:
        """Token strings of top_ids, n lists of k."""
        return self._strings(self.top_ids)

    @property
    def bottom_tokens(self) -> list[list[str]]:
        """Token strings of bottom_ids, n lists of k."""
        return self._strings(self.bottom_ids)

    def scores_at(self, features: Any, token_ids: Tensor | Sequence[int]) -> Tensor:
        """Scores of given tokens for given features, [n, m]; token_ids [m] or [n, m]."""
        return self.pipeline.scores_at(features, token_ids)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The results in the reference's row format, one dictionary a feature (without feature_index)."""
        top, bottom = self.top_tokens, self.bottom_tokens
        for i, feature in enumerate(self.features.tolist()):
            row: dict[str, Any] = {
                **self.pipeline.preset.as_dict(),
                "layer": self.layer,
                "feature": feature,
                "top_tokens": top[i],
                "bottom_tokens": bottom[i],
                "top_ids": self.top_ids[i].tolist(),
                "bottom_ids": self.bottom_ids[i].tolist(),
                "top_scores": self.top_scores[i].tolist(),
                "bottom_scores": self.bottom_scores[i].tolist(),
            }
            if self.stats:
                row["stats"] = {name: float(column[i]) for name, column in self.stats.items()}
            if self.choices is not None:
                row["transition"] = self.choices[i]
            if self.layer_terms is not None:
                row |= self._layer_row(i)
            yield row

    def _layer_row(self, i: int) -> dict[str, Any]:
        terms = self.layer_terms or []
        top = [_ids(t.topk.top_ids)[i].tolist() for t in terms]
        bottom = [_ids(t.topk.bottom_ids)[i].tolist() for t in terms]
        str_tokens = self.pipeline.model.str_tokens
        return {
            "layer_indices": [t.layer for t in terms],
            "layer_top_tokens": [str_tokens(ids) for ids in top],
            "layer_bottom_tokens": [str_tokens(ids) for ids in bottom],
            "layer_top_ids": top,
            "layer_bottom_ids": bottom,
            "layer_energy_scores": [float(t.energy[i]) for t in terms],
        }

    def _strings(self, ids: Tensor) -> list[list[str]]:
        flat = self.pipeline.model.str_tokens(ids.flatten().tolist())
        k = ids.shape[1]
        return [flat[i : i + k] for i in range(0, len(flat), k)]


def _ids(ids: Tensor | None) -> Tensor:
    if ids is None:
        raise ValueError("this side was not computed")
    return ids


def concatenate(parts: Sequence[Signatures]) -> Signatures:
    """One `Signatures` from blocks of the same pipeline."""

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(p, name) for p in parts])

    first = parts[0]
    terms = None
    if first.layer_terms is not None:
        terms = []
        for i, term in enumerate(first.layer_terms):
            topk = TopK.concatenate([(p.layer_terms or [])[i].topk for p in parts])
            energy = torch.cat([(p.layer_terms or [])[i].energy for p in parts])
            terms.append(LayerTerm(term.layer, topk, energy))
    return Signatures(
        first.pipeline,
        cat("features"),
        cat("top_scores"),
        cat("top_ids"),
        cat("bottom_scores"),
        cat("bottom_ids"),
        stats={name: torch.cat([p.stats[name] for p in parts]) for name in first.stats},
        choices=None if first.choices is None else [c for p in parts for c in p.choices or []],
        layer_terms=terms,
        vectors=None if first.vectors is None else cat("vectors"),
    )
