"""Row statistics of scores that pass by in tiles: moments, log-sum-exp, entropy and a histogram, in one pass.

Power sums are taken about the mean of a row's first tile, in float32 within a tile and in float64 across tiles;
exponentials about the maximum. The scores are taken as they are: in float32 or wider their rounding is part of the
result only in its last digits, in bfloat16 it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import buffers
from querylens_fast.topk.histogram import BinCounts, EdgeCounts

PART_ELEMENTS = 1 << 20
"""Scores of a tile that are worked on at a time: what stays in the cache on a CPU."""


class RowStatistics(NamedTuple):
    """How the scores of each row of F over all rows of W are distributed; every field [n], in float64."""

    mean: Tensor
    variance: Tensor
    """Of the population: divided by V."""
    skewness: Tensor
    """m3 / m2^1.5 (0 for a normal distribution; NaN where all scores are equal)."""
    kurtosis: Tensor
    """Excess kurtosis m4 / m2² - 3 (0 for a normal distribution; NaN where all scores are equal)."""
    logsumexp: Tensor
    """log Σ exp(score): the top tokens' probability mass is exp(top_scores - logsumexp)."""
    entropy: Tensor
    """Of softmax(scores), in nats, 0 to log V."""
    histogram: Tensor | None
    """[n, bins] int64 counts, or None."""
    edges: Tensor | None = None
    """[n, bins + 1] edges of the histogram."""

    def to(self, device: torch.device | str) -> RowStatistics:
        """A copy whose tensors live on device."""
        return self._replace(**{name: x.to(device) for name, x in self._asdict().items() if x is not None})

    @classmethod
    def concatenate(cls, parts: Sequence[RowStatistics]) -> RowStatistics:
        """Those of the rows of several."""
        names = [name for name, x in parts[0]._asdict().items() if x is not None]
        return parts[0]._replace(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


class Moments:
    """Running sums for n rows.

    Args:
        n: rows.
        device: of the scores.
        histogram: edges [bins + 1] of the histogram of every row, or the number of equal bins between each row's
            extremes, for which whole rows are needed (`add_rows`).
    """

    def __init__(self, n: int, device: torch.device, histogram: Tensor | int | None = None) -> None:
        def column(value: float) -> Tensor:
            return torch.full((n,), value, dtype=torch.float64, device=device)

        self.count = column(0)
        self.shift = column(0)
        self.sums = torch.zeros(4, n, dtype=torch.float64, device=device)
        self.peak = column(-torch.inf)
        self.exponentials = column(0)
        self.weighted = column(0)
        self.edges = None if not isinstance(histogram, Tensor) else EdgeCounts(n, histogram, device)
        self.bins = None if not isinstance(histogram, int) else BinCounts(n, histogram, device)

    def after(self, row: int) -> Moments:
        """The sums of the rows from this one on; what is counted there is counted here."""
        rest = object.__new__(Moments)
        rest.__dict__ |= {name: value[row:] for name, value in vars(self).items() if isinstance(value, Tensor)}
        rest.sums = self.sums[:, row:]
        rest.edges = None if self.edges is None else self.edges.after(row)
        rest.bins = None if self.bins is None else self.bins.after(row)
        return rest

    def add_rows(self, tiles: list[Tensor], first_row: int) -> None:
        """Count all tiles [r, c] of the rows from first_row on."""
        for tile in tiles:
            self.add_tile(tile, first_row)
        self.add_bins(tiles, first_row)

    def add_bins(self, tiles: list[Tensor], first_row: int) -> None:
        """Count all tiles of some rows into the bins between their extremes, where such are asked for."""
        if self.bins is not None:
            self.bins.add_rows([tile if tile.dtype == torch.float64 else tile.float() for tile in tiles], first_row)

    def add_tile(self, scores: Tensor, first_row: int) -> None:
        """Count a tile of scores [r, c] of the rows from first_row on, of any float dtype."""
        columns = scores.shape[1]
        step = max(1, PART_ELEMENTS // max(1, columns))
        dtype = scores.dtype if scores.dtype == torch.float64 else torch.float32
        rooms = [_room(i, min(step, len(scores)), columns, dtype, scores.device) for i in range(3)]
        for start in range(0, len(scores), step):
            part = scores[start : start + step]
            wide, first, second = (room[: len(part)] for room in rooms)
            part = part if part.dtype == dtype else wide.copy_(part)
            rows = slice(first_row + start, first_row + start + len(part))
            if self.edges is not None:
                self.edges.add_tile(part, rows.start)
            self._add(part, rows, first, second)

    def _add(self, part: Tensor, rows: slice, first: Tensor, second: Tensor) -> None:
        """Count a part [r, c] of float32 or wider; first and second are buffers of its shape."""
        fresh = self.count[rows] == 0
        if bool(fresh.any()):
            self.shift[rows] = torch.where(fresh, part.mean(1).double(), self.shift[rows])
        centered = torch.sub(part, self.shift[rows, None].to(part), out=first)
        squares = torch.mul(centered, centered, out=second)
        total, second_power = centered.sum(1), torch.linalg.vector_norm(centered, dim=1).double() ** 2
        fourth_power = torch.linalg.vector_norm(squares, dim=1).double() ** 2
        sums = torch.stack((total.double(), second_power, squares.mul_(centered).sum(1).double(), fourth_power))
        peak = part.amax(1)
        below = torch.sub(part, peak[:, None], out=first)
        # Exponentials that underflow take ten times as long, and count for nothing. (NaN, from an infinity, stays.)
        lowest = math.ceil(math.log(torch.finfo(below.dtype).tiny))
        weights = torch.clamp(below, min=lowest, out=second).exp_()
        exponentials = weights.sum(1)
        self.add_sums(rows, part.shape[1], sums, peak, exponentials, weights.mul_(below).sum(1))

    def add_sums(
        self, rows: slice, count: int, sums: Tensor, peak: Tensor, exponentials: Tensor, weighted: Tensor
    ) -> None:
        """Add sums over ``count`` columns of some rows [r].

        Args:
            rows: which rows.
            count: columns summed over.
            sums: [4, r], Σ (x - shift)^p for p = 1 to 4.
            peak: [r], max x.
            exponentials: [r], Σ exp(x - peak).
            weighted: [r], Σ (x - peak) exp(x - peak).
        """
        self.count[rows] += count
        self.sums[:, rows] += sums
        highest = torch.maximum(self.peak[rows], peak.double())
        known = _rescaled(self.peak[rows], highest, self.exponentials[rows], self.weighted[rows])
        found = _rescaled(peak.double(), highest, exponentials.double(), weighted.double())
        self.peak[rows] = highest
        self.exponentials[rows], self.weighted[rows] = known[0] + found[0], known[1] + found[1]

    def finish(self) -> RowStatistics:
        """The statistics of the scores counted so far; NaN in rows that hold a NaN or an infinity."""
        first, second, third, fourth = self.sums / self.count
        variance = second - first**2
        central3 = third - 3 * first * second + 2 * first**3
        central4 = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        spread = variance.clamp_min(0)
        logsumexp = self.peak + self.exponentials.log()
        counted = self.bins if self.edges is None else self.edges
        return RowStatistics(
            self.shift + first,
            spread,
            central3 / spread**1.5,
            central4 / spread**2 - 3,
            logsumexp,
            self.exponentials.log() - self.weighted / self.exponentials,
            None if counted is None else counted.counts,
            None if counted is None else counted.edges(),
        )


def _room(place: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for a part, kept between calls: allocating it would cost more than the sums."""
    return buffers.take(f"moments {place}", rows * columns, dtype, device).view(rows, columns)


def _rescaled(peak: Tensor, highest: Tensor, exponentials: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exponentials about ``highest`` in place of ``peak``; nothing counted yet (peak = -inf) stays nothing."""
    drop = torch.where(exponentials == 0, 0, peak - highest)
    return drop.exp() * exponentials, drop.exp() * (weighted + drop * exponentials)
