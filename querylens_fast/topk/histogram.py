"""Histograms of rows of scores: given edges for every row, or equal bins between the extremes of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from querylens_fast.topk import buffers

PART_ELEMENTS = 1 << 20
"""Scores counted at a time: what stays in the cache on a CPU."""
TABLE = 1 << 16


class EdgeCounts:
    """Counts between given edges: [edge, next edge), the last bin closed; what lies outside is not counted.

    On a CPU scores are sent to bins by a table over their upper 16 bits; where such a piece of the number line
    holds an edge, its scores are searched for among the edges.
    """

    def __init__(self, n: int, edges: Tensor, device: torch.device) -> None:
        self.given = edges.to(device, torch.float64)
        self.bins = len(edges) - 1
        self.counts = torch.zeros(n, self.bins, dtype=torch.int64, device=device)
        self._table = self._make_table() if device.type == "cpu" and self.bins < (1 << 15) - 1 else None

    def add_tile(self, scores: Tensor, first_row: int) -> None:
        """Count scores [r, c], float32 or float64."""
        step = max(1, PART_ELEMENTS // max(1, scores.shape[1]))
        for start in range(0, len(scores), step):
            part = scores[start : start + step]
            rows = slice(first_row + start, first_row + start + len(part))
            self.counts[rows] += _counted(self._places(part), self.bins + 1)[:, : self.bins]

    def edges(self) -> Tensor:
        """[n, bins + 1] float64, the same for every row."""
        return self.given.expand(len(self.counts), -1)

    def after(self, row: int) -> EdgeCounts:
        """The counts of the rows from this one on; what is counted there is counted here."""
        rest = object.__new__(EdgeCounts)
        rest.__dict__ |= vars(self) | {"counts": self.counts[row:]}
        return rest

    def _places(self, part: Tensor) -> Tensor:
        """Bins [r, c] int64 of a part; self.bins stands for outside."""
        if self._table is None or part.dtype != torch.float32:
            return self._searched(part)
        pieces = buffers.take("pieces", part.numel(), torch.int32, part.device).view(part.shape)
        torch.bitwise_right_shift(part.contiguous().view(torch.int32), 16, out=pieces).add_(TABLE // 2)
        index = buffers.take("places", part.numel(), torch.int64, part.device).view(part.shape).copy_(pieces)
        found = self._table.take(index)
        unclear = (found < 0).nonzero(as_tuple=True)
        index.copy_(found)
        if len(unclear[0]):
            index[unclear] = self._searched(part[unclear])
        return index

    def _searched(self, scores: Tensor) -> Tensor:
        # float64 holds every score; NaN sorts past the last edge.
        places = torch.bucketize(scores.double(), self.given, right=True) - 1
        places[scores == self.given[-1]] = self.bins - 1
        return places.masked_fill_((places < 0) | (places >= self.bins), self.bins)

    def _make_table(self) -> Tensor:
        """[65536] int16 bins by the upper 16 bits, as a signed number, + 32768; -1 where they do not tell."""
        upper = torch.arange(-TABLE // 2, TABLE // 2, dtype=torch.int32, device="cpu") << 16
        # All numbers with these upper bits lie between the two, and the bin only rises or falls between them.
        first, last = (self._searched((upper | lower).view(torch.float32)) for lower in (0, 0xFFFF))
        # From inside to outside and back in one piece: not when both ends are outside on the same side.
        low, high = (upper | lower for lower in (0, 0xFFFF))
        low, high = (x.view(torch.float32).double() for x in (low, high))
        spans = (low < self.given[0]) != (high < self.given[0])
        spans |= (low > self.given[-1]) != (high > self.given[-1])
        unclear = (first != last) | spans | (low == self.given[-1]) | (high == self.given[-1])
        return first.masked_fill(unclear, -1).to(torch.int16)


class BinCounts:
    """Counts in equal bins between the extremes of each row, as torch.histc has them."""

    def __init__(self, n: int, bins: int, device: torch.device) -> None:
        self.bins = bins
        self.counts = torch.zeros(n, bins, dtype=torch.int64, device=device)
        self.low = torch.full((n,), torch.nan, dtype=torch.float64, device=device)
        self.high = self.low.clone()

    def add_rows(self, tiles: list[Tensor], first_row: int) -> None:
        """Count whole rows of scores, cut into tiles [r, c] float32 or float64; rows not finite stay at zero."""
        rows = slice(first_row, first_row + len(tiles[0]))
        low = torch.stack([tile.amin(1) for tile in tiles]).amin(0)
        high = torch.stack([tile.amax(1) for tile in tiles]).amax(0)
        if bool((torch.maximum(low.abs(), high.abs()) > 2.0**96).any()):
            # Their differences, times the number of bins, may not fit into float32.
            tiles, low, high = [tile.double() for tile in tiles], low.double(), high.double()
        # As torch.histc: a row of equals lies in the middle of two units, or of what a large number can be told from.
        apart = (low == high) * low.abs().mul(2.0**-22).clamp_(min=1)
        low, high = low - apart, high + apart
        finite = ((high - low) * self.bins).isfinite()
        low, high = low.masked_fill(~finite, torch.nan), high.masked_fill(~finite, torch.nan)
        self.low[rows], self.high[rows] = low.double(), high.double()
        for tile in tiles:
            self._add(tile, rows, low[:, None], high[:, None], finite)

    def _add(self, tile: Tensor, rows: slice, low: Tensor, high: Tensor, finite: Tensor) -> None:
        step = max(1, PART_ELEMENTS // max(1, tile.shape[1]))
        room = buffers.take("bins", min(step, len(tile)) * tile.shape[1], tile.dtype, tile.device)
        for start in range(0, len(tile), step):
            some = slice(start, min(start + step, len(tile)))
            place = torch.sub(tile[some], low[some], out=room[: tile[some].numel()].view(tile[some].shape))
            place.mul_(self.bins).div_(high[some] - low[some])
            # The largest score lies in the last bin; rows that are not finite go to a bin of their own.
            place.clamp_(max=self.bins - 1)
            if not bool(finite[some].all()):
                place.masked_fill_(~finite[some, None], self.bins)
            index = buffers.take("places", place.numel(), torch.int64, tile.device).view(place.shape).copy_(place)
            found = _counted(index, self.bins + 1)[:, : self.bins]
            self.counts[rows.start + some.start : rows.start + some.stop] += found

    def edges(self) -> Tensor:
        """[n, bins + 1] float64: equal steps from each row's least score to its greatest; NaN in rows not finite."""
        steps = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64, device=self.low.device)
        edges = self.low[:, None] + (self.high - self.low)[:, None] * steps
        edges[:, -1] = self.high
        return edges

    def after(self, row: int) -> BinCounts:
        """The counts of the rows from this one on; what is counted there is counted here."""
        rest = object.__new__(BinCounts)
        rest.__dict__ |= {name: value if name == "bins" else value[row:] for name, value in vars(self).items()}
        return rest


def _counted(places: Tensor, n: int) -> Tensor:
    """How often each of 0..n-1 occurs in each row of places [r, c]: [r, n] int32."""
    ones = torch.ones(1, dtype=torch.int32, device=places.device).expand(places.shape)
    return torch.zeros(len(places), n, dtype=torch.int32, device=places.device).scatter_add_(1, places, ones)
