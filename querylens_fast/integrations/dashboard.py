"""What a dashboard shows of a feature's decoder row: top and bottom tokens and a histogram of all logits.

SAEDashboard's numbers: the decoder row at unit length times W_U, without the final norm and without b_U, the k largest
and k smallest logits, and 50 bins of equal width between the row's own extremes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.prefetch import prefetch
from querylens_fast.lens.readouts import Scorer, dashboard
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32

LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time for histograms: 64 MiB."""
MIN_LENGTH = 1e-8
"""Shortest length that a row is divided by, as in sae-lens: shorter rows keep their direction, not their length."""


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
        }

    def check(self) -> None:
        """Raise ValueError for whatever would fail later."""
        self.dictionary.check_model(self.model)
        if not 1 <= self.k <= self.model.vocab_size:
            raise ValueError(f"k is {self.k}; expected 1 to the vocabulary's {self.model.vocab_size}")
        if self.bins < 0:
            raise ValueError(f"bins is {self.bins}; expected 0 or more")
        self.dictionary.point("value")
        dashboard(self.model, self.unembedding)

    def blocks(self, blocks: Sequence[Tensor]) -> Iterator[Rows]:
        """Each block of feature ids in turn, the next one's vectors read meanwhile."""
        scorer = dashboard(self.model, self.unembedding)
        for ids, vectors in prefetch(self.dictionary, "value", blocks):
            yield self._rows(scorer, ids, vectors)

    @torch.no_grad()
    def _rows(self, scorer: Scorer, ids: Tensor, vectors: Tensor) -> Rows:
        rows = at_least_float32(vectors.to(self.model.device))
        if self.unit_norm:
            rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(MIN_LENGTH)
        found = scorer.topk(rows, self.k).to("cpu")
        assert found.top_ids is not None and found.bottom_ids is not None
        histogram = row_histograms(scorer.prepare(rows)[0], scorer.W, self.bins) if self.bins else None
        return Rows(ids, **found.sides(), histogram=histogram, vectors=vectors)


@torch.no_grad()
def row_histograms(F: Tensor, W: Tensor, bins: int = 50) -> Histogram:
    """For each row of F [n, D], the histogram of its scores F Wᵀ over the rows of W [V, D], as torch.histc counts.

    A row whose scores are all equal has all of them in one bin. Memory: `LOGITS_AT_ONCE` scores.
    """
    heights, extremes, W = [], [], at_least_float32(W)
    for rows in F.split(max(1, LOGITS_AT_ONCE // len(W))):
        logits = at_least_float32(rows) @ W.mT
        extremes.append(torch.stack(logits.aminmax(dim=1), 1).cpu())
        heights += [torch.histc(row, bins).cpu() for row in logits]
    if not heights:
        return Histogram(torch.empty(0, bins, dtype=torch.int64), torch.empty(0, bins, dtype=torch.float64))
    low, high = torch.cat(extremes).double().unbind(1)
    middles = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    return Histogram(torch.stack(heights).long(), low[:, None] + (high - low)[:, None] * middles)
