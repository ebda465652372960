"""Exact top-k from a bfloat16 product on the CPU, where processors that have it are several times faster in it.

Propose → rescore → certify → widen. The bfloat16 product proposes, for each row, every column that may be among the k
best as far as its error bound tells (`panel`, `bounds`). The candidates of many rows are scored exactly at once
(`rescore`). A row is proved when its k-th exact score is beyond what any column left out can reach. Others are tried
once more with the sharpest limits; what is still open, each distinct row once, is scored in full (`torch_backend`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from querylens_fast.topk import torch_backend
from querylens_fast.topk.narrow import MAX_COPY_BYTES, NarrowProduct
from querylens_fast.topk.panel import GROUP, Found, Panel
from querylens_fast.topk.products import NARROW, faster_in_bfloat16, full_float32
from querylens_fast.topk.request import Outcome, Request, Side
from querylens_fast.topk.rescore import pair_scores
from querylens_fast.topk.selection import Candidates, best_of_pairs
from querylens_fast.topk.torch_backend import plan

MIN_ROWS = 192
"""Fewer rows of F do not pay for rounding W."""
MIN_ROWS_READY = 32
"""The same where W is in bfloat16 as it is."""
MIN_COLUMNS = 1024
COLUMNS_PER_K = 32
PROBES = 128
"""Rows of F that show whether the bfloat16 pass proves anything here."""
BATCH_ELEMENTS = 1 << 23
"""Elements of F for which a panel of W is rounded, where not all of W is held."""
FEW_ROWS = 64
"""Open rows that are not worth a second bfloat16 pass."""


def pays(request: Request) -> bool:
    """Whether this processor and these shapes gain from the bfloat16 pass, within the request's memory."""
    F, W = request.F, request.W
    ready = W.dtype == NARROW and all(vector is None for vector in request.epilogue)
    fixed = 4 * len(W)
    return (
        F.device.type == "cpu"
        and request.dtype == torch.float32
        and len(F) >= (MIN_ROWS_READY if ready else MIN_ROWS)
        and len(W) >= max(MIN_COLUMNS, COLUMNS_PER_K * request.k)
        and (request.max_bytes is None or fixed < request.max_bytes // 2)
        and faster_in_bfloat16()
    )


def topk(request: Request) -> Outcome:
    """The k best of each row, exactly (arguments already checked; no statistics)."""
    return _Pass(request).run()


class _Pass:
    """The bfloat16 pass of one call."""

    def __init__(self, request: Request) -> None:
        limit = request.max_bytes
        self.request, self.sides = request, request.empty_sides()
        keep = MAX_COPY_BYTES if limit is None else min(MAX_COPY_BYTES, limit // 2)
        with torch.no_grad():
            self.product = NarrowProduct(request, exact=True, keep=keep)
        V, row_bytes = self.product.n_columns, 2 * self.product.width
        held = max(GROUP, min(V, keep // row_bytes))
        rest = None if limit is None else max(limit // 4, limit - held * row_bytes)
        cuts = plan(len(request.F), V, NARROW, block_rows=request.block_rows, max_bytes=rest, whole=False)
        self.plan = cuts._replace(columns=min(cuts.columns, held))
        blocks = 1 if held >= V else max(1, BATCH_ELEMENTS // request.F.shape[1] // cuts.rows)
        self.batch = blocks * cuts.rows
        """Rows whose candidates are scored exactly at once: few stay in the cache."""
        self.wide = False
        """Whether the probes needed the sharpest limits, so that every row gets them at once."""

    def run(self) -> Outcome:
        """All rows: a few as a probe, the rest, then those that are open."""
        n = len(self.request.F)
        everything = torch.arange(n, device=self.request.F.device)
        if not bool(self.product.norms.isfinite().all()):
            return self._in_full(everything, self.request.sides, 0)
        probes = self._probes() if n > 4 * PROBES else everything[:0]
        proved = {largest: torch.zeros(n, dtype=torch.bool, device=everything.device) for largest in self.sides}
        with torch.no_grad(), full_float32(self.request.F.device):
            if len(probes):
                self._attempt(probes, proved, wide=False)
                if not self._mostly(proved, probes):
                    self._attempt(probes, proved, wide=True)
                    self.wide = True
                    if not self._mostly(proved, probes):
                        return self._in_full(everything, self.request.sides, n * len(self.sides))
            rest = torch.ones(n, dtype=torch.bool, device=everything.device)
            rest[probes] = False
            self._attempt(rest.nonzero().squeeze(1), proved, wide=self.wide)
            return self._finish(proved)

    def _probes(self) -> Tensor:
        """Rows drawn at random (a stride may meet a pattern), equal ones once."""
        n = len(self.request.F)
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:PROBES].sort().values
        return self._distinct(drawn.to(self.request.F.device))[0]

    def _mostly(self, proved: dict[bool, Tensor], rows: Tensor) -> bool:
        return all(2 * int(done[rows].sum()) > len(rows) for done in proved.values())

    def _finish(self, proved: dict[bool, Tensor]) -> Outcome:
        """Settle the rows that the first candidates did not."""
        widened = sum(int((~done).sum()) for done in proved.values())
        fallback = 0
        for largest, done in proved.items():
            rows = (~done).nonzero().squeeze(1)
            if not len(rows):
                continue
            one, places = self._distinct(rows)
            if len(one) > FEW_ROWS and not self.wide:
                self._attempt(one, {largest: done}, wide=True)
            left = one[~done[one]]
            if len(left):
                found = torch_backend.topk(self.request.of_rows(left, sides=(largest,)))
                self._keep(left, largest, found)
                fallback += len(left)
            side = self.sides[largest]
            side.scores[rows], side.ids[rows] = side.scores[one[places]], side.ids[one[places]]
        return Outcome(self.sides.get(True), self.sides.get(False), widened, fallback)

    def _in_full(self, rows: Tensor, sides: tuple[bool, ...], redone: int) -> Outcome:
        """All rows by the plain pass."""
        found = torch_backend.topk(self.request)
        redone = redone or len(rows) * len(sides)
        return found._replace(widened_rows=redone, fallback_rows=redone)

    def _distinct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One of each set of equal rows (dead features are all alike), and for each row the place of its one."""
        F, offset = self.request.F[rows], self.request.epilogue.offset
        wide = F.double()
        alike = wide if offset is None else torch.cat([wide, offset[rows, None].double()], 1)
        _, places = torch.unique(alike, dim=0, return_inverse=True)
        one = torch.empty(int(places.max()) + 1, dtype=torch.int64, device=F.device)
        one[places] = rows
        return one, places

    def _keep(self, rows: Tensor, largest: bool, found: Outcome) -> None:
        side = found.top if largest else found.bottom
        if side is not None:
            self.sides[largest].scores[rows], self.sides[largest].ids[rows] = side

    def _attempt(self, rows: Tensor, proved: dict[bool, Tensor], *, wide: bool) -> None:
        """Propose, rescore and certify some rows, in batches; results are kept where they are proved."""
        for batch in rows.split(self.batch) if len(rows) else ():
            blocks = [
                {largest: _Block(part, i * self.plan.rows) for largest in proved}
                for i, part in enumerate(batch.split(self.plan.rows))
            ]
            for columns in self.plan.panels(self.product.n_columns):
                self.product.load(columns)
                for sides in blocks:
                    self._propose(sides, columns, wide)
            proposals = {
                largest: _Proposal([sides[largest] for sides in blocks], self.product.apart) for largest in proved
            }
            self._settle(batch, proposals, proved)

    def _propose(self, sides: dict[bool, _Block], columns: slice, wide: bool) -> None:
        """Add the candidates of a block of rows among some columns of the product."""
        request, product = self.request, self.product
        rows = next(iter(sides.values())).rows
        product.start(rows)
        panel = Panel(
            len(rows), columns.stop - columns.start, request.k, NARROW, rows.device, tuple(sides),
            total=wide, descending=product.descending,
        )  # fmt: skip
        tiles = [slice(columns.start + tile.start, columns.start + tile.stop) for tile in panel.tiles]
        for t, tile in enumerate(tiles):
            product.write(tile, panel.tile(t))
            panel.add(t)
        errors = product.bound(tiles).rows(request.F[rows], request.epilogue.of_rows(rows))
        for largest, block in sides.items():
            block.add(panel.search(largest, block.shown, errors, fine=wide), columns.start, product.columns)

    def _settle(self, batch: Tensor, proposals: dict[bool, _Proposal], proved: dict[bool, Tensor]) -> None:
        """Score the candidates of a batch of rows exactly and keep what is proved."""
        request, n = self.request, len(batch)
        sides = list(proposals)
        lines = torch.cat([i * n + proposals[largest].rows for i, largest in enumerate(sides)])
        columns = torch.cat([proposals[largest].columns for largest in sides])
        # In the order of columns, as rows of W lie in memory; then by line.
        _, order = torch.sort(columns * (len(sides) * n) + lines)
        lines, columns = lines.index_select(0, order), columns.index_select(0, order)
        rows = torch.where(lines < n, lines, lines - n)
        scores = pair_scores(request.F[batch], request.W, rows, columns, request.epilogue.of_rows(batch))
        tops = lines < n if sides[0] else torch.zeros_like(lines, dtype=torch.bool)
        best = best_of_pairs(lines, columns, scores, len(sides) * n, request.k, tops)
        for i, largest in enumerate(sides):
            part = slice(i * n, (i + 1) * n)
            side = Side(best.scores[part], best.columns[part])
            kth = side.scores[:, -1] if largest else -side.scores[:, -1]
            proposal = proposals[largest]
            sure = best.enough[part] & ~proposal.open & (kth > proposal.limit)
            done = batch[sure]
            self.sides[largest].scores[done], self.sides[largest].ids[done] = side.scores[sure], side.ids[sure]
            proved[largest][done] = True


class _Block:
    """One side of a block of rows: what the panels so far have shown."""

    def __init__(self, rows: Tensor, first: int) -> None:
        """Rows of F, of which the first has this place in its batch."""
        self.rows, self.first = rows, first
        self.shown: Tensor | None = None
        self.limit = torch.empty(0, device=rows.device)
        self.open = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self.parts: list[Candidates] = []

    def add(self, found: Found, first_column: int, columns: Tensor | None) -> None:
        """What was found in a panel, whose columns begin at first_column and are rows of W by ``columns``."""
        places = found.candidates.columns + first_column
        self.parts.append(found.candidates._replace(columns=places if columns is None else columns[places]))
        self.shown, self.limit = found.shown, found.limit
        self.open |= found.unordered | found.crowded | found.invalid

    def candidates(self) -> Candidates:
        """Of all panels."""
        found = Candidates.joined(self.parts)
        if len(self.parts) > 1:
            # Later panels have raised the limit.
            kept = (found.reach >= self.limit[found.rows]).nonzero().squeeze(1)
            found = Candidates(*(x.index_select(0, kept) for x in found))
        return found


class _Proposal:
    """One side of a batch of rows: candidates, and what no other column reaches."""

    def __init__(self, blocks: list[_Block], apart: Tensor) -> None:
        """From blocks of rows; the columns apart are candidates of each row."""
        found = [block.candidates() for block in blocks]
        n = sum(len(block.rows) for block in blocks)
        every = torch.arange(n, device=apart.device).repeat_interleave(len(apart))
        self.rows = torch.cat([block.first + part.rows for block, part in zip(blocks, found, strict=True)] + [every])
        """[m] places in the batch."""
        self.columns = torch.cat([part.columns for part in found] + [apart.repeat(n)])
        """[m] rows of W."""
        self.limit = torch.cat([block.limit for block in blocks])
        """[n]: every column left out has an exact gain below this."""
        self.open = torch.cat([block.open for block in blocks])
        """[n] rows without candidates."""
