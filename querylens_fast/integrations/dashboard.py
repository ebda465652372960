"""What a dashboard shows of a feature's decoder row: top and bottom tokens and a histogram of all logits.

SAEDashboard's numbers: the decoder row at unit length times W_U, without the final norm and without b_U, the k largest
and k smallest logits, and 50 bins of equal width between the row's own extremes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from querylens_fast.dictionaries.dashboard_values import as_dashboards, held, norm_left_out
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.prefetch import prefetch
from querylens_fast.dictionaries.rows import CarriedRows, unit_rows
from querylens_fast.lens.readouts import Scorer, dashboard
from querylens_fast.models.model import Model
from querylens_fast.topk.api import TopK, streamed_topk


class Histogram(NamedTuple):
    """Bins of equal width between each row's smallest and largest score."""

    heights: Tensor
    """[n, bins] int64; each row sums to the vocabulary."""
    values: Tensor
    """[n, bins] float64, the middle of each bin."""


@dataclass(frozen=True)
class Rows:
    """Tokens and scores of n features, [n, k] each, and where it is known the histogram of all scores."""

    features: Tensor
    top_ids: Tensor
    top_scores: Tensor
    bottom_ids: Tensor
    bottom_scores: Tensor
    histogram: Histogram | None = None
    vectors: Tensor | None = None
    """The dictionary's vectors [n, D] as it holds them."""
    heads: int = 0
    """Attention heads that the vectors are made of, one after the other; 0: they are not."""


@dataclass(frozen=True)
class Dashboard:
    """The dashboard readout of a dictionary's values.

    Attributes:
        dictionary: Whose decoder rows are read out.
        model: Its model.
        k: Tokens on each side.
        unit_norm: Divide decoder rows by their length first.
        unembedding: "raw" or "folded" (see `lens.readouts.dashboard`).
        bins: Of the histogram; 0 leaves it out.
    """

    dictionary: Dictionary
    model: Model
    k: int = 10
    unit_norm: bool = True
    unembedding: str = "raw"
    bins: int = 50

    @property
    def identity(self) -> dict[str, object]:
        """What the numbers depend on, as JSON values."""
        return {
            "preset": "dashboard",
            "k": self.k,
            "unit_norm": self.unit_norm,
            "unembedding": self.unembedding,
            "bins": self.bins,
            "dictionary": self.dictionary.name,
            "dictionary_fingerprint": self.dictionary.fingerprint,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **({"post_norm": "left out"} if norm_left_out(self.dictionary, self.model) else {}),
        }

    def check(self) -> None:
        """Raise ValueError for whatever would fail later."""
        as_dashboards(self.dictionary, self.model, self.unit_norm)
        if not 1 <= self.k <= self.model.vocab_size:
            raise ValueError(f"k is {self.k}; expected 1 to the vocabulary's {self.model.vocab_size}")
        dashboard(self.model, self.unembedding)

    def blocks(self, blocks: Sequence[Tensor]) -> Iterator[Rows]:
        """Each block of feature ids in turn, the next one's vectors read meanwhile."""
        scorer = dashboard(self.model, self.unembedding)
        carried = as_dashboards(self.dictionary, self.model, self.unit_norm).value_rows
        carrier = carried if isinstance(carried, CarriedRows) else None
        for ids, vectors in prefetch(held(self.dictionary), "value", blocks):
            yield self._rows(scorer, carrier, ids, vectors)

    @torch.no_grad()
    def _rows(self, scorer: Scorer, carrier: CarriedRows | None, ids: Tensor, vectors: Tensor) -> Rows:
        rows = vectors.to(self.model.device)
        if carrier is not None:
            rows = carrier.carry(rows)
        elif self.unit_norm:
            rows = unit_rows(rows)
        x, _ = scorer.prepare(rows)
        found = streamed_topk(x, scorer.W, self.k, histogram=self.bins or None).to("cpu")
        sides: dict[str, Any] = found.sides()
        return Rows(ids, **sides, histogram=_histogram(found), vectors=vectors, heads=self.heads)

    @property
    def heads(self) -> int:
        """See `Rows`."""
        return heads_of(self.dictionary, self.model)


def heads_of(dictionary: Dictionary, model: Model) -> int:
    """The attention heads whose outputs, one after the other, the dictionary's values are; 0: they are not."""
    hook = dictionary.writes
    try:
        return model.blocks[hook.layer].attention.n_heads if hook.site.carried_by == "W_O" else 0
    except (AttributeError, ValueError):  # a layer whose attention is not known by its parts
        return 0


def _histogram(found: TopK) -> Histogram | None:
    if found.statistics is None or found.top_scores is None or found.bottom_scores is None:
        return None
    heights = found.statistics.histogram
    assert heights is not None
    return histogram_between(heights, found.bottom_scores[:, :1], found.top_scores[:, :1])


def histogram_between(heights: Tensor, low: Tensor, high: Tensor) -> Histogram:
    """Heights [n, bins] of bins between the lowest and the highest score [n, 1], all bins equal where these are."""
    middles = (torch.arange(heights.shape[1], dtype=torch.float64) + 0.5) / heights.shape[1]
    low, high = low.double(), high.double()
    return Histogram(heights, low + (high - low) * middles)
