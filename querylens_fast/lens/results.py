"""Results: the signatures of a block of features, in memory, as tensors and as the reference's rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from querylens_fast.lens.presets import Preset
from querylens_fast.topk.api import TopK


@dataclass(frozen=True)
class LayerTerm:
    """One layer's share of a first-order result: its own tokens and its energy ⟨m_l, m⟩/‖m‖², [n]."""

    layer: int
    topk: TopK
    energy: Tensor


@dataclass(frozen=True)
class Source:
    """What signatures are of: the lens's components, and the dictionary's name, kind, layer and number of features."""

    lens: Preset
    dictionary: str
    kind: str
    layer: int
    n_features: int

    def feature_name(self, feature: int) -> str:
        """The reference's feature_str, "Feature type-size/layer/feature"."""
        return f"Feature {self.kind}-{self.n_features}/{self.layer}/{feature}"


class Handle(Protocol):
    """What a result in memory asks the model for: token strings, and the scores of tokens that are not in it."""

    def str_tokens(self, ids: Iterable[int]) -> list[str]: ...

    def scores_at(self, features: Any, token_ids: Tensor | Sequence[int]) -> Tensor: ...


@dataclass(eq=False)
class Signatures:
    """Token signatures of n features of one layer under one preset.

    Pickles hold the data and the token strings, not the model; `scores_at` is for results in the process that made
    them. Setting ``handle`` to None lets go of the model earlier.

    Attributes:
        source: Preset and dictionary.
        features: Feature ids, [n] int64.
        top_scores: [n, k], descending, in raw units of the readout (logits for unembed; no softmax).
        top_ids: [n, k] int64 token ids; equal scores by the lower id.
        bottom_scores: [n, k], ascending.
        bottom_ids: [n, k] int64.
        stats: Columns by name, [n] each: rel_var and rel_var_se from a transport, or all the reference's statistics.
        choices: What the adaptive preset took for each feature ("shrunk", or a transition's name), or None.
        top_se: Standard error of each top score over samples of text, [n, k]; of a transport fitted with groups, whose
            column "stable_k" in stats says how many of the k top tokens stay without any one group. Else None.
        histogram: How many tokens score in each of as many equal steps from the lowest score to the highest, [n, bins],
            when asked for.
        layer_terms: The first order's layers, in the reference's order, when asked for.
        vectors: The vectors that were read out, [n, D], when asked for.
        handle: The lens, for token strings and further scores; None in a result that was unpickled.
        strings: Token strings by id, in a result that was unpickled.
    """

    source: Source
    features: Tensor
    top_scores: Tensor
    top_ids: Tensor
    bottom_scores: Tensor
    bottom_ids: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    choices: list[str] | None = None
    top_se: Tensor | None = None
    histogram: Tensor | None = None
    layer_terms: list[LayerTerm] | None = None
    vectors: Tensor | None = None
    handle: Handle | None = field(default=None, repr=False)
    strings: dict[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def layer(self) -> int:
        """The dictionary's layer."""
        return self.source.layer

    @property
    def preset(self) -> str:
        """The preset's name."""
        return self.source.lens.name

    @property
    def top_tokens(self) -> list[list[str]]:
        """Token strings of top_ids, n lists of k."""
        return self._strings(self.top_ids)

    @property
    def bottom_tokens(self) -> list[list[str]]:
        """Token strings of bottom_ids, n lists of k."""
        return self._strings(self.bottom_ids)

    def scores_at(self, features: Any, token_ids: Tensor | Sequence[int]) -> Tensor:
        """Scores of given tokens for given features of the dictionary, [n, m]; token_ids [m] or [n, m].

        Raises:
            ValueError: A feature or token id out of range, or the model is not with the result any more.
        """
        if self.handle is None:
            raise ValueError(
                "this result was unpickled, without its model; ql.scores_at(dictionary, model, features, token_ids, "
                "preset=…) computes the scores again"
            )
        return self.handle.scores_at(features, token_ids)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The results in the reference's row format, one dictionary a feature (without feature_index)."""
        top, bottom = self.top_tokens, self.bottom_tokens
        for i, feature in enumerate(self.features.tolist()):
            row: dict[str, Any] = {
                **self.source.lens.as_dict(),
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
            if self.top_se is not None:
                row["top_se"] = self.top_se[i].tolist()
            if self.histogram is not None:
                row["histogram"] = self.histogram[i].tolist()
            if self.layer_terms is not None:
                row |= self._layer_row(i)
            yield row

    def _layer_row(self, i: int) -> dict[str, Any]:
        terms = self.layer_terms or []
        top, bottom = ([_side(t, side)[i] for t in terms] for side in ("top_ids", "bottom_ids"))
        return {
            "layer_indices": [t.layer for t in terms],
            "layer_top_tokens": self._strings(torch.stack(top)) if top else [],
            "layer_bottom_tokens": self._strings(torch.stack(bottom)) if bottom else [],
            "layer_top_ids": [ids.tolist() for ids in top],
            "layer_bottom_ids": [ids.tolist() for ids in bottom],
            "layer_energy_scores": [float(t.energy[i]) for t in terms],
        }

    def _strings(self, ids: Tensor) -> list[list[str]]:
        """Token strings of ids [n, k]."""
        if self.handle is not None:
            flat = self.handle.str_tokens(ids.flatten().tolist())
        elif self.strings:
            flat = [self.strings[i] for i in ids.flatten().tolist()]
        else:
            raise ValueError("this result was pickled without a tokenizer, so its token ids have no strings")
        k = ids.shape[1]
        return [flat[i : i + k] for i in range(0, len(flat), k)]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "handle": None, "strings": self._all_strings()}

    def _all_strings(self) -> dict[int, str]:
        if self.handle is None:
            return self.strings
        held = [self.top_ids, self.bottom_ids]
        held += [_side(t, side) for t in self.layer_terms or [] for side in ("top_ids", "bottom_ids")]
        ids = torch.cat([x.flatten() for x in held]).unique().tolist()
        try:
            return dict(zip(ids, self.handle.str_tokens(ids), strict=True))
        except ValueError:  # a model without a tokenizer
            return {}


def _side(term: LayerTerm, side: str) -> Tensor:
    ids = getattr(term.topk, side)
    if ids is None:
        raise ValueError(f"{side} of layer {term.layer} were not computed")
    return ids


def concatenate(parts: Sequence[Signatures]) -> Signatures:
    """One `Signatures` from blocks of the same lens, in order."""

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
        first.source,
        cat("features"),
        cat("top_scores"),
        cat("top_ids"),
        cat("bottom_scores"),
        cat("bottom_ids"),
        stats={name: torch.cat([p.stats[name] for p in parts]) for name in first.stats},
        choices=None if first.choices is None else [c for p in parts for c in p.choices or []],
        top_se=None if first.top_se is None else cat("top_se"),
        histogram=None if first.histogram is None else cat("histogram"),
        layer_terms=terms,
        vectors=None if first.vectors is None else cat("vectors"),
        handle=first.handle,
    )
