"""The plain pass of the streamed top-k: every score in float32 (float64), selected while its panel is in memory.

Scores are computed in panels of some rows and columns and dropped at once, so memory does not depend on n x V. Works on
any torch device.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from querylens_fast.topk.panel import GROUP, MIN_TILE, TILE_COLUMNS, Panel
from querylens_fast.topk.products import full_float32, product
from querylens_fast.topk.request import Epilogue as Epilogue
from querylens_fast.topk.request import Outcome, Request, Side
from querylens_fast.topk.selection import Candidates, best_by_sort, best_of_pairs

PANEL_BYTES = 1 << 27
"""Scores held at a time (128 MiB)."""
BLOCK_ROWS = 1024
SLOW_ROWS = 128
"""Rows at a time whose whole panels are copied or sorted."""


class Product(Protocol):
    """Where the scores of a pass come from."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the scores."""
        ...

    def start(self, rows: Tensor | slice) -> None:
        """Set the block of rows that later calls of `write` score."""
        ...

    def write(self, columns: slice, out: Tensor) -> None:
        """Write the scores [r, c] of the block with some columns into out."""
        ...


class WideProduct:
    """Scores in float32 or float64 with the epilogue's three roundings."""

    def __init__(self, request: Request) -> None:
        self.request, self.dtype = request, request.dtype

    def start(self, rows: Tensor | slice) -> None:
        """Set the block of rows that later calls of `write` score."""
        self.F, self.epilogue = self.request.F[rows].to(self.dtype), self.request.epilogue.of_rows(rows)

    def write(self, columns: slice, out: Tensor) -> None:
        """Write the scores of the block with some columns into out."""
        product(self.F, self.request.W[columns].to(self.dtype), out)
        self.epilogue.apply_(out, slice(None), columns)


class Plan(NamedTuple):
    """How the scores of a call are cut up."""

    rows: int
    columns: int

    def row_blocks(self, n: int) -> list[slice]:
        """Slices of n rows."""
        return [slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows)]

    def panels(self, V: int) -> list[slice]:
        """Slices of V columns, nearly equal, of whole tiles where that fits."""
        width = math.ceil(V / math.ceil(V / self.columns))
        whole = TILE_COLUMNS * math.ceil(width / TILE_COLUMNS)
        if whole <= self.columns and not 0 < V % whole < MIN_TILE:
            width = whole
        return [slice(a, min(a + width, V)) for a in range(0, V, width)]


def plan(n: int, V: int, dtype: torch.dtype, *, block_rows: int | None, max_bytes: int | None, whole: bool) -> Plan:
    """Rows and columns of a panel; whole: all columns at once, for a histogram between a row's own extremes."""
    # Beside the scores: extremes and keys of both sides, comparisons, a tile's keys.
    elements = min(PANEL_BYTES, max_bytes or PANEL_BYTES) * 10 // (13 * dtype.itemsize)
    rows = max(1, min(n, block_rows or BLOCK_ROWS))
    if block_rows is None:
        rows = max(1, min(rows, elements // (V if whole else min(V, 16 * TILE_COLUMNS))))
    return Plan(rows, V if whole else max(GROUP, min(V, elements // rows)))


def topk(request: Request, source: Product | None = None) -> Outcome:
    """The k largest and the k smallest scores of each row (arguments already checked).

    Args:
        request: the call; its statistics see every tile.
        source: where the scores come from; None: `WideProduct`.
    """
    source = WideProduct(request) if source is None else source
    n, V, statistics = len(request.F), len(request.W), request.statistics
    whole = statistics is not None and statistics.bins is not None
    cuts = plan(n, V, source.dtype, block_rows=request.block_rows, max_bytes=request.max_bytes, whole=whole)
    sides = request.empty_sides()
    total = False
    with torch.no_grad(), full_float32(request.F.device):
        for rows in cuts.row_blocks(n):
            source.start(rows)
            found = {largest: _Line() for largest in request.sides}
            for columns in cuts.panels(V):
                total = _search_panel(request, source, rows, columns, found, total)
            for largest, line in found.items():
                sides[largest].scores[rows], sides[largest].ids[rows] = line.best(rows, request, largest)
    return Outcome(sides.get(True), sides.get(False))


class _Line:
    """One side of a block of rows: candidates of the panels so far."""

    def __init__(self) -> None:
        self.shown: Tensor | None = None
        """[n, k], `panel.Found.shown`."""
        self.parts: list[Candidates] = []

    def add(self, candidates: Candidates, first_column: int) -> None:
        self.parts.append(candidates._replace(columns=candidates.columns + first_column))

    def best(self, rows: slice, request: Request, largest: bool) -> Side:
        lines, columns, gains = Candidates.joined(self.parts)
        order = torch.sort(columns).indices
        lines, columns, gains = (x.index_select(0, order) for x in (lines, columns, gains))
        best = best_of_pairs(lines, columns, gains if largest else -gains, rows.stop - rows.start, request.k, largest)
        return Side(best.scores, best.columns)


def _search_panel(
    request: Request, source: Product, rows: slice, columns: slice, lines: dict[bool, _Line], total: bool
) -> bool:
    """Compute one panel and add its candidates to both sides; whether the next one needs the total order."""
    width, n = columns.stop - columns.start, rows.stop - rows.start
    panel = Panel(n, width, request.k, source.dtype, request.F.device, request.sides, total=total)
    for t, tile in enumerate(panel.tiles):
        scores = panel.tile(t)
        source.write(slice(columns.start + tile.start, columns.start + tile.stop), scores)
        panel.add(t)
        if request.statistics is not None:
            request.statistics.add_tile(scores, rows.start)
    if request.statistics is not None:
        request.statistics.add_bins([panel.tile(t) for t in range(len(panel.tiles))], rows.start)
    for largest, line in lines.items():
        unordered = _search_side(panel, line, columns.start, largest)
        total = total or 2 * unordered > n
    return total


def _search_side(panel: Panel, line: _Line, first_column: int, largest: bool) -> int:
    """Add a panel's candidates to a side; how many rows have no positive cut (`panel`)."""
    earlier = line.shown
    found = panel.search(largest, earlier, None)
    line.add(found.candidates, first_column)
    line.shown = shown = found.shown
    crowded = found.crowded.nonzero().squeeze(1)
    if len(crowded):
        before = None if earlier is None else earlier[crowded]
        candidates, shown[crowded] = panel.settle(crowded, before, largest)
        line.add(candidates, first_column)
    unordered = found.unordered.nonzero().squeeze(1)
    for rows in _parts(unordered):
        part = panel.of_rows(rows, largest)
        inner = _Line()
        inner.shown = None if earlier is None else earlier[rows]
        _search_side(part, inner, first_column, largest)
        assert inner.shown is not None
        shown[rows] = inner.shown
        line.parts += [c._replace(rows=rows[c.rows]) for c in inner.parts]
    for rows in _parts(found.invalid.nonzero().squeeze(1)):
        best = best_by_sort(panel.whole(rows), panel.k, largest=largest)
        gains = (best.scores if largest else -best.scores).to(shown.dtype)
        places = rows.repeat_interleave(best.ids.shape[1])
        line.add(Candidates(places, best.ids.flatten(), gains.flatten()), first_column)
    return len(unordered)


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Some rows in parts that may be copied; no part of none."""
    return rows.split(SLOW_ROWS) if len(rows) else ()
