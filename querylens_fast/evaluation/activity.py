"""Running sums of feature activity: `feature_sample` adds sequences to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from querylens_fast.models.model import Model

FEATURES_AT_ONCE = 1 << 15
"""Features whose examples are sorted together."""
PAIRS_AT_ONCE = 1 << 22
"""(feature, token) pairs collected before they are added up."""


class Activity:
    """Sums over the sequences seen so far, and the m strongest sequences of each of n features."""

    def __init__(self, n: int, m: int, model: Model) -> None:
        self.m, self.vocab_size = m, model.vocab_size
        device = model.device
        self.n_active = torch.zeros(n, dtype=torch.int64, device=device)
        self.total = torch.zeros(n, dtype=torch.float64, device=device)
        self.n_sequences = torch.zeros(n, dtype=torch.int64, device=device)
        self.values = torch.zeros(n, m, device=device)
        self.where = torch.zeros(n, m, dtype=torch.int64, device=device)
        """Where each example peaks: sequence · S + position."""
        self.keys = torch.zeros(0, dtype=torch.int64)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.waiting: list[Tensor] = []

    def add(self, parts: Iterator[Tensor], ids: Tensor, first: int) -> None:
        """Count the activations of sequences ``first``, first + 1, … with token ids [B, S].

        Args:
            parts: The activations at the positions, a few at a time in order: [B, P, n] each.
            ids: The token ids.
            first: The first sequence's place in the sample.
        """
        n, start = len(self.n_active), 0
        peaks = torch.zeros(len(ids), n, device=ids.device)
        places = torch.zeros(len(ids), n, dtype=torch.int64, device=ids.device)
        for acts in parts:
            active = acts > 0
            self.n_active += active.sum((0, 1))
            self.total += acts.clamp_min(0).sum((0, 1), dtype=torch.float64)
            own = acts.max(dim=1)
            higher = own.values > peaks
            peaks, places = torch.where(higher, own.values, peaks), torch.where(higher, own.indices + start, places)
            batch, position, feature = active.nonzero(as_tuple=True)
            self.waiting.append((feature * self.vocab_size + ids[batch, start + position]).cpu())
            start += acts.shape[1]
            if sum(map(len, self.waiting)) > PAIRS_AT_ONCE:
                self._add_up()
        self.n_sequences += (peaks > 0).sum(0)
        sequences = torch.arange(first, first + len(ids), device=ids.device)[:, None]
        places += sequences * ids.shape[1]
        for some in range(0, n, FEATURES_AT_ONCE):
            self._keep_strongest(slice(some, some + FEATURES_AT_ONCE), peaks, places)

    def _keep_strongest(self, some: slice, peaks: Tensor, places: Tensor) -> None:
        """Merge the peaks [B, n] of new sequences into the examples of some features."""
        values = torch.cat([self.values[some], peaks[:, some].mT], 1)
        where = torch.cat([self.where[some], places[:, some].mT], 1)
        # A stable sort: of equal peaks the earlier sequence is kept.
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.m]
        self.values[some], self.where[some] = values.gather(1, order), where.gather(1, order)

    def _add_up(self) -> None:
        """Add the collected (feature, token) pairs to their counts."""
        new, counts = torch.cat(self.waiting).unique(return_counts=True)
        keys, place = torch.cat([self.keys, new]).unique(return_inverse=True)
        total = torch.zeros(len(keys), dtype=torch.int64)
        self.counts = total.index_add_(0, place, torch.cat([self.counts, counts]))
        self.keys, self.waiting = keys, []

    def finish(self, ids: Tensor) -> dict[str, Any]:
        """What `FeatureSample` holds beside its metadata, for the sample's token ids [N, S].

        Raises:
            ValueError: An activation was NaN or infinite.
        """
        broken = (~self.total.isfinite()).nonzero()[:, 0]
        if len(broken):
            raise ValueError(
                f"feature {int(broken[0])} has activations that are not finite, as have {len(broken) - 1} others; load "
                "the model with dtype='float32', or mend the dictionary"
            )
        if self.waiting:
            self._add_up()
        features = self.keys // self.vocab_size
        order = self.counts.argsort(descending=True, stable=True)
        order = order[features[order].argsort(stable=True)]
        values, where = self.values.cpu(), self.where.cpu()
        missing = values <= 0
        return {
            "n_active": self.n_active.cpu(),
            "mean": (self.total / self.n_active.clamp_min(1)).float().cpu(),
            "maximum": values[:, 0],
            "n_sequences": self.n_sequences.cpu(),
            "values": values,
            "sequences": (where // ids.shape[1]).masked_fill(missing, -1),
            "positions": (where % ids.shape[1]).masked_fill(missing, -1),
            "tokens": ids.flatten()[where].masked_fill(missing, -1),
            "pairs": (features[order], self.keys[order] % self.vocab_size, self.counts[order]),
        }
