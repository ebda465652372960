"""A panel of scores [r, C], and the columns of each row that may be among its k best, found without sorting.

Scores arrive in tiles of some 2,048 columns. Straight after the product, while a tile is in the cache, its columns are
reduced to the extremes of groups of 16. From them alone follows a limit for each row: k columns certainly score that or
better, so what certainly scores less is out. Groups whose extreme is beyond the cut are looked into, element by
element, and the columns found there are the candidates.

Everything is decided on *gains*: the score on the top side, its negative on the bottom side, so that larger is better.
Gains of float32 and float64 are compared as they are. Those of two bytes, which processors compare slowly, are compared
as integers, `keys_of`: in the "raw" order these are the bits of the gain as they stand, which are in the right order
from 0 up; that is all that matters as long as the cut is positive, and costs one pass less. The "total" order holds for
every number.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import buffers
from querylens_fast.topk.keys import INTEGERS, flipped, k_best, keys_of, moved
from querylens_fast.topk.selection import Candidates

TILE_COLUMNS = 2048
MIN_TILE = 64
"""Columns of the last tile, at least."""
GROUP = 16
"""Columns in a group; fewer where k is large for the number of columns."""
PIECE = 256
"""Columns that are searched at a time for equals of a limit: the first ones are usually enough."""
MIN_GROUPS = 192
"""Groups, at least, whose extremes set the limit of a row; and at least LIMIT_GROUPS * k."""
LIMIT_GROUPS = 8


def most_crowded(k: int, *, certain: bool) -> int:
    """Groups of a row that are looked into, at most; certain: scores have no error, so that few more than k do."""
    return 2 * k + 32 if certain else 8 * k + 128


class Found(NamedTuple):
    """What a search found in one panel, on one side."""

    candidates: Candidates
    shown: Tensor
    """[r, k], in no order: the i-th largest gain of this panel and of earlier ones is at least the i-th of these."""
    limit: Tensor
    """[r]: at least k columns, of this panel or of earlier ones, have a gain of this or more."""
    unordered: Tensor
    """[r] rows whose cut is not positive, so that the raw order is wrong: no candidates."""
    crowded: Tensor
    """[r] rows with too many groups to look into: no candidates."""
    invalid: Tensor
    """[r] rows that hold a NaN, or without a bound on the error: no candidates."""


class Panel:
    """Scores of r rows with C columns, as tiles, and the extremes of their groups."""

    def __init__(
        self,
        rows: int,
        columns: int,
        k: int,
        dtype: torch.dtype,
        device: torch.device,
        sides: tuple[bool, ...],
        *,
        total: bool = False,
        descending: bool = False,
    ) -> None:
        """Allocate; descending: rows of W come longest first, so the first tiles hold most of the extreme scores."""
        self.width = _tile_width(columns)
        self.rows, self.k, self.dtype, self.device, self.sides = rows, k, dtype, device, sides
        self.tiles = [slice(a, min(a + self.width, columns)) for a in range(0, columns, self.width)]
        self.group = next(g for g in (GROUP, 4, 1) if g == 1 or columns >= 2 * g * k)
        self.integers = dtype.itemsize == 2
        self.total, self.descending = total or not self.integers, descending
        self._key_dtype = INTEGERS[dtype] if self.integers else dtype
        ends = torch.iinfo(torch.int16)
        self._lowest, self._none = (ends.min, ends.max) if self.integers else (-math.inf, math.nan)
        # A multiple of eight, so that eight comparisons can be looked at as one integer.
        self.groups = 8 * math.ceil(math.ceil(self.width / self.group) / 8)
        # A multiple of four, so that four of two bytes can be read as one integer.
        self.scores = buffers.take("panel", rows * columns + -rows * columns % 4, dtype, device)
        self.extremes = {
            largest: buffers.take(f"extremes {largest}", shape[0] * shape[1] * shape[2], self._key_dtype, device).view(
                shape
            )
            for shape in [(len(self.tiles), rows, self.groups)]
            for largest in sides
        }
        self._room = buffers.take("keys", rows * self.width if self.integers else 0, self._key_dtype, device)

    def tile(self, t: int) -> Tensor:
        """[r, c]: where tile t is kept."""
        columns = self.tiles[t]
        c = columns.stop - columns.start
        return self.scores[self.rows * columns.start : self.rows * columns.stop].view(self.rows, c)

    def add(self, t: int) -> None:
        """Take the extremes of tile t, which has just been written."""
        scores = self.tile(t)
        for largest in self.sides:
            out = self.extremes[largest][t]
            if self.integers:
                room = self._room[: scores.numel()].view_as(scores)
                self._reduce(keys_of(scores, largest, total=self.total, out=room), out)
            else:
                self._reduce(scores, out, largest)
                out = out if largest else out.neg_()
            out[:, math.ceil(scores.shape[1] / self.group) :] = self._lowest

    def whole(self, rows: Tensor) -> Tensor:
        """All scores [f, C] of some rows."""
        return torch.cat([self.tile(t)[rows] for t in range(len(self.tiles))], 1)

    def _reduce(self, keys: Tensor, out: Tensor, largest: bool = True) -> None:
        """Extremes of groups: {i, i + g, i + 2g, ...}, so that whole vector registers are compared; or `_in_fours`."""
        reduce, either = (torch.amax, torch.maximum) if largest else (torch.amin, torch.minimum)
        c = keys.shape[1]
        if self._in_fours(c):
            fours = keys.unflatten(1, (4, c // 4)).amax(1)
            # The larger half of an integer is its upper half, or the lower one moved there; what is below is noise.
            pairs = fours.view(torch.int32)
            pairs = torch.maximum(pairs, pairs << 16)
            out.copy_(torch.maximum(pairs[:, ::2], pairs[:, 1::2]).view(torch.int16)[:, 1::2])
            return
        g = math.ceil(c / self.group)
        full = c // g
        reduce(keys[:, : full * g].unflatten(1, (full, g)), 1, out=out[:, :g])
        if c > full * g:
            head = out[:, : c - full * g]
            either(head, keys[:, full * g :], out=head)

    def search(self, largest: bool, shown: Tensor | None, error: Tensor | None, *, fine: bool = False) -> Found:
        """Candidates of every row.

        Args:
            largest: the side.
            shown: [r, k], `Found.shown` of the panels before.
            error: [T, r] bounds on what the gains of each tile may be off by, before they were rounded to the panel's
                dtype; None: they are what is asked for, and `Found.crowded` rows are left out because of ties only.
            fine: set the limit by the extremes of all groups, not of a few larger ones.
        """
        rounding = 0.0 if error is None else 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-20
        extremes = self.extremes[largest]
        sample = extremes if fine else self._sample(extremes)
        gains = self._gains(sample)
        every = extremes if self.descending else sample
        invalid = (every > self._infinity() if self.integers else every.isnan()).any(2).any(0)
        off = None if error is None else error[: len(sample)]
        shown = k_best(moved(gains, -rounding, off, -1.0), self.k, shown)
        limit = shown.amin(1)
        if error is None and self.total:
            # Fewer than k numbers so far: NaN may have to fill up, which no extreme shows.
            invalid |= limit == -math.inf
        # What is left out stays below the limit by more than the rounding of these lines.
        below = limit if error is None else limit - limit.abs() * 2.0**-20
        cut = below.expand(len(self.tiles), -1) if error is None else below - error
        cut = torch.where(cut > 0, cut / (1 + rounding), cut / (1 - rounding))
        keys, positive = self._cut_keys(cut)
        invalid |= cut.isnan().any(0)
        unordered = ~invalid & ~positive if not self.total else torch.zeros_like(invalid)
        crowded, most = torch.zeros_like(invalid), most_crowded(self.k, certain=error is None)
        if not fine and sample is not extremes:
            beyond = (sample >= keys[: len(sample), :, None]).sum((0, 2))
            crowded = (beyond > most) & ~invalid & ~unordered
        keys = keys.masked_fill(invalid | unordered | crowded, self._none)
        tiles, rows, groups = self._hits(extremes, keys)
        full = torch.bincount(rows, minlength=self.rows) > most
        if bool(full.any()):
            crowded |= full
            kept = ~full[rows]
            tiles, rows, groups = tiles[kept], rows[kept], groups[kept]
        candidates = self._elements(largest, keys, tiles, rows, groups, rounding, error)
        return Found(candidates, shown, below, unordered, crowded, invalid)

    def settle(self, rows: Tensor, earlier: Tensor | None, largest: bool) -> tuple[Candidates, Tensor]:
        """Candidates of crowded rows [f] whose gains are exact, and what they show [f, k]: of equals the lower columns.

        The limit is raised to the k-th best of all group extremes and of ``earlier``, what other panels show [f, k].
        Fewer than k groups are beyond that, so what crowds a row then are equals at the limit, of which the first k
        columns do.
        """
        extremes = self.extremes[largest][:, rows]
        shown = k_best(self._gains(extremes), self.k, earlier)
        limit = shown.amin(1)
        cut = limit.expand(len(self.tiles), -1)
        keys, beyond = self._cut_keys(cut)[0], self._cut_keys(cut, beyond=True)[0]
        full = (extremes >= keys[:, :, None]).sum((0, 2)) > most_crowded(self.k, certain=True)
        keys = torch.where(full, beyond, keys)
        found = [self._elements(largest, keys, *self._hits(extremes, keys), 0.0, None, rows)]
        wanted = (self.k - torch.bincount(found[0].rows, minlength=self.rows)[rows]).where(full, 0)
        value = (limit if largest else -limit).to(self.dtype)
        for t, start in ((t, a) for t, tile in enumerate(self.tiles) for a in range(0, tile.stop - tile.start, PIECE)):
            index = (wanted > 0).nonzero().squeeze(1)
            if not len(index):
                break
            piece = self.tile(t)[:, start : start + PIECE][rows[index]]
            place, column = (piece == value[index, None]).nonzero().unbind(1)
            counts = torch.bincount(place, minlength=len(index))
            rank = torch.arange(len(place), device=self.device) - (counts.cumsum(0) - counts)[place]
            kept = rank < wanted[index][place]
            place, column = index[place[kept]], column[kept]
            found.append(Candidates(rows[place], self.tiles[t].start + start + column, limit[place]))
            wanted[index] -= counts
        return Candidates.joined(found), shown

    def of_rows(self, rows: Tensor, largest: bool) -> Panel:
        """A copy of some rows for one side, in the total order."""
        part = object.__new__(Panel)
        part.__dict__ |= vars(self)
        part.rows, part.total, part.sides = len(rows), True, (largest,)
        part.scores = torch.cat([self.tile(t)[rows].flatten() for t in range(len(self.tiles))])
        part._room = torch.empty(len(rows) * self.width, dtype=self._room.dtype, device=self.device)
        shape = (len(self.tiles), len(rows), self.groups)
        part.extremes = {s: torch.empty(shape, dtype=self._room.dtype, device=self.device) for s in part.sides}
        for t in range(len(self.tiles)):
            part.add(t)
        return part

    def _infinity(self) -> int:
        """The key of an infinite gain; beyond it are NaN."""
        infinity = torch.tensor(math.inf, dtype=self.dtype, device="cpu")
        return int(infinity.view(INTEGERS[self.dtype]))

    def _gains(self, keys: Tensor) -> Tensor:
        """Gains of extremes, in float32 or wider; -inf for no column and for NaN."""
        if not self.integers:
            return keys.masked_fill(keys.isnan(), -math.inf)
        gains = (flipped(keys) if self.total else keys).view(self.dtype).float()
        return gains.masked_fill(gains.isnan() | (keys == self._lowest), -math.inf)

    def _sample(self, extremes: Tensor) -> Tensor:
        """Extremes [T, r, s] of larger groups, as few as do, or those of the first tiles."""
        s, wanted = self.groups, max(MIN_GROUPS, LIMIT_GROUPS * self.k)
        if self.descending:
            return extremes[: math.ceil(4 * wanted / s)]
        while s % 2 == 0 and (s // 2) * len(self.tiles) >= wanted:
            s //= 2
        while extremes.shape[2] > s:
            half = extremes.shape[2] // 2
            extremes = torch.maximum(extremes[:, :, :half], extremes[:, :, half:])
        return extremes

    def _cut_keys(self, cut: Tensor, *, beyond: bool = False) -> tuple[Tensor, Tensor]:
        """[T, r] keys that exactly the gains from the cut up, or beyond it, reach; rows [r] whose cuts are positive."""
        if not self.integers:
            above = torch.nextafter(cut, torch.full_like(cut, math.inf))
            keys = above.masked_fill(cut == math.inf, math.nan) if beyond else cut
            return keys, torch.ones_like(cut[0], dtype=torch.bool)
        rounded = cut.to(self.dtype)
        # Zeros of both signs are equal but have keys of their own.
        rounded = rounded.masked_fill(rounded == 0, 0.0 if beyond else -0.0).contiguous()
        keys = keys_of(rounded, True, total=self.total)
        keys = keys + 1 if beyond else keys - (rounded.to(cut.dtype) > cut).to(keys.dtype)
        return keys, (rounded > 0).all(0)

    def _hits(self, extremes: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tile, row and group [h] of every extreme that reaches its row's key, in this order."""
        name = "hits" if len(extremes[0]) == self.rows else "some hits"
        mask = buffers.take(name, extremes.numel(), torch.bool, self.device)
        torch.ge(extremes, keys[:, :, None], out=mask.view(extremes.shape))
        words = mask.view(torch.int64)
        word = words.nonzero().squeeze(1)
        place, bit = words.index_select(0, word).view(torch.bool).view(-1, 8).nonzero().unbind(1)
        flat = 8 * word.index_select(0, place) + bit
        line = flat // extremes.shape[2]
        tile = line // extremes.shape[1]
        return tile, line - tile * extremes.shape[1], flat - line * extremes.shape[2]

    def _elements(
        self,
        largest: bool,
        keys: Tensor,
        tiles: Tensor,
        rows: Tensor,
        groups: Tensor,
        rounding: float,
        error: Tensor | None,
        index: Tensor | None = None,
    ) -> Candidates:
        """Elements of groups (sorted by tile) that reach the key; index: the rows of the panel that rows mean."""
        last = int(torch.searchsorted(tiles, len(self.tiles) - 1))
        found = []
        # The last tile may be narrower than the others.
        for t, part in ((0, slice(0, last)), (len(self.tiles) - 1, slice(last, None))):
            tile, row, group = tiles[part], rows[part], groups[part]
            if not len(tile):
                continue
            c = self.tiles[t].stop - self.tiles[t].start
            wide, steps = self._places(c)
            own = row if index is None else index[row]
            group = wide * group
            first = tile * (self.rows * self.width) + own * c + group
            inside = group[:, None] + steps < c if len(steps) * math.ceil(c / self.group) > c else None
            if self._in_fours(c):
                flat = (first >> 2)[:, None] + (steps[::4] >> 2)
                scores = self.scores.view(torch.int64).index_select(0, flat.flatten()).view(self.dtype)
                scores = scores.view(len(first), -1)
            else:
                flat = first[:, None] + steps
                flat = flat if inside is None else torch.where(inside, flat, first[:, None])
                scores = self.scores.index_select(0, flat.flatten()).view_as(flat)
            gains = keys_of(scores, largest, total=self.total) if self.integers else scores if largest else -scores
            reached = gains >= keys[tile, row][:, None]
            hit = (reached if inside is None else reached & inside).flatten().nonzero().squeeze(1)
            place, scores = hit // len(steps), scores.flatten().index_select(0, hit)
            step = hit - place * len(steps)
            gains = (scores if largest else -scores).to(torch.float64 if self.dtype == torch.float64 else torch.float32)
            if error is not None:
                gains = moved(gains, rounding, error[tile[place], row[place]], 1.0)
            columns = (tile * self.width + group).index_select(0, place) + steps.index_select(0, step)
            found.append(Candidates(own.index_select(0, place), columns, gains))
        if not found:
            none = rows[:0]
            return Candidates(none, none, none.to(torch.float64 if self.dtype == torch.float64 else torch.float32))
        return Candidates.joined(found)

    def _in_fours(self, c: int) -> bool:
        """Whether groups of a tile of c columns are four times four neighbours, which are gathered as one integer.

        A group then lies in four cache lines instead of sixteen: looking into it takes a fifth of the time.
        """
        return self.integers and c == TILE_COLUMNS and self.group == GROUP and sys.byteorder == "little"

    def _places(self, c: int) -> tuple[int, Tensor]:
        """Columns of group i of a tile of c columns: i times the first of these plus the second, [s]."""
        g = math.ceil(c / self.group)
        steps = torch.arange(min(self.group, math.ceil(c / g)), device=self.device)
        return (4, c // 4 * (steps // 4) + steps % 4) if self._in_fours(c) else (1, g * steps)


def _tile_width(columns: int) -> int:
    """TILE_COLUMNS, whose groups torch reduces in whole vectors, if the last tile is not too narrow by that.

    Libraries take another path, with other roundings, for a single column: tiles are then nearly equal.
    """
    if columns > TILE_COLUMNS and not 0 < columns % TILE_COLUMNS < MIN_TILE:
        return TILE_COLUMNS
    return min(16 * math.ceil(columns / math.ceil(columns / TILE_COLUMNS) / 16), max(columns, 1))
