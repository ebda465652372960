"""Exact top-k from approximate scores: candidates, their exact scores, and a proof that nothing else can belong.

A fast pass (a bf16 product, or a fused kernel that keeps only group winners) proposes candidates and says how good the
best score it left out looked. `ErrorBound` limits how far its scores can be from the exact ones,

    |<f, w> - <f', w'>| <= |f - f'| |w| + |f'| |w - w'| + rounding of the sums,

so a row whose k-th exact score is beyond the best one left out by more than that is finished. A group of columns that
may hide a winner behind its two known ones is scored in full; a row without proof gets more candidates, and where those
don't do goes to the blocked float32 path. Rows with ties across the k-th place, NaN or infinities end up there too, so
their order is decided in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import torch_backend
from querylens_fast.topk.bounds import Bound, measure
from querylens_fast.topk.products import full_float32
from querylens_fast.topk.request import Epilogue, Outcome, Request, Side, accumulation_dtype, empty_side
from querylens_fast.topk.rescore import scores_at
from querylens_fast.topk.selection import best_of_candidates
from querylens_fast.topk.statistics import Moments

MAX_CROWDED = 4
"""Groups scored in full for a row; a row with more of them goes to the blocked path."""


class Proposal(NamedTuple):
    """Candidates of one side of a block of rows; ids ≥ V stand for nothing."""

    ids: Tensor
    """[r, m] int64, distinct within a row."""
    left_out: Tensor
    """[r]: no approximate score outside the candidates, and outside groups below, is beyond this."""
    groups: Tensor | None = None
    """[r, m] int64 group of each candidate, where the pass keeps two winners for each group."""
    behind: Tensor | None = None
    """[r, m]: no approximate score hidden behind this candidate is beyond this; ∓inf if nothing is hidden."""
    columns_of: Callable[[Tensor], Tensor] | None = None
    """Columns [.., g] of groups [..]."""
    wider: Callable[[Tensor], Proposal] | None = None
    """More candidates for some rows of the block (their places in it), while the fast pass still knows them."""


Propose = Callable[[slice, bool], tuple[Proposal | None, Proposal | None]]
"""(rows, wide) → proposals for the top and the bottom; wide: earlier rows needed more candidates."""
Rescore = Callable[[Tensor, Tensor, Tensor, Epilogue], Tensor]
"""(F [r, d], W, ids [r, m] distinct, epilogue) → exact scores [r, m]; NaN for ids ≥ V."""


class ErrorBound:
    """Where `bounds.measure` is called from."""

    of = staticmethod(measure)


def exact_scores(F: Tensor, W: Tensor, ids: Tensor, epilogue: Epilogue) -> Tensor:
    """The scores that the blocked path gives candidates too."""
    absent = ids >= len(W)
    if not bool(absent.any()):
        return scores_at(F, W, ids, epilogue)
    return scores_at(F, W, ids.masked_fill(absent, 0), epilogue).masked_fill(absent, math.nan)


class _Task(NamedTuple):
    """What stays the same for every block of rows."""

    W: Tensor
    k: int
    rescore: Rescore
    tile_elements: int


def topk(
    F: Tensor,
    W: Tensor,
    k: int,
    epilogue: Epilogue,
    propose: Propose,
    bound: Bound,
    *,
    top: bool,
    bottom: bool,
    block_rows: int,
    rescore: Rescore = exact_scores,
    moments: Moments | None = None,
    tile_elements: int = 0,
) -> Outcome:
    """The k best of each row, from the proposals of a fast pass.

    Args:
        F: [n, d].
        W: [V, d].
        k: 1 ≤ k ≤ V.
        epilogue: what turns inner products into scores.
        propose: called with each slice of rows.
        bound: the error bound of the fast pass.
        top: whether ``propose`` proposes for the top.
        bottom: whether it does for the bottom.
        block_rows: rows for each call of ``propose``.
        rescore: exact scores of candidates.
        moments: what ``propose`` counts its scores into, for the rows that never reach it.
        tile_elements: scores held at a time for rows without proof.

    Returns:
        Outcome with scores in the accumulation dtype, as `blocked.topk` returns them.
    """
    sides = {largest: empty_side(F, k) for largest, wanted in ((True, top), (False, bottom)) if wanted}
    task = _Task(W, k, rescore, tile_elements)
    widened = fallback = 0
    wide = False
    with torch.no_grad(), full_float32(F.device):
        for start in range(0, len(F), block_rows):
            if 2 * fallback > start * len(sides) or not math.isfinite(float(bound.norm)):
                # The data defeats the fast pass: do the rest without it.
                rest = slice(start, len(F))
                unseen = None if moments is None else moments.after(start)
                chosen = epilogue.of_rows(rest)
                again = torch_backend.topk(Request(F[rest], W, k, chosen, top, bottom, unseen))
                for largest, found in zip((True, False), again[:2], strict=True):
                    if found is not None:
                        sides[largest].scores[rest], sides[largest].ids[rest] = found
                redone = (len(F) - start) * len(sides)
                return Outcome(sides.get(True), sides.get(False), widened + redone, fallback + redone)
            rows = slice(start, min(start + block_rows, len(F)))
            chosen = epilogue.of_rows(rows)
            error = bound.rows(F[rows], chosen)
            before = widened
            for largest, proposal in zip((True, False), propose(rows, wide), strict=True):
                if proposal is None:
                    continue
                side = sides[largest]
                found, more, redone = _settle(task, F[rows], chosen, proposal, error, largest)
                side.scores[rows], side.ids[rows] = found
                widened, fallback = widened + more, fallback + redone
            wide = wide or 2 * (widened - before) > (rows.stop - start) * len(sides)
    return Outcome(sides.get(True), sides.get(False), widened, fallback)


def _settle(
    task: _Task, F: Tensor, epilogue: Epilogue, proposal: Proposal, error: Tensor, largest: bool
) -> tuple[Side, int, int]:
    """The k best of a block of rows; how many needed more than the first candidates, how many the blocked path."""
    found, proved, crowded = _prove(task, F, epilogue, proposal, error, largest)
    index = (~proved).nonzero().squeeze(1)
    widened = crowded + len(index)
    if len(index) and proposal.wider is not None:
        again, proved, _ = _prove(task, F[index], epilogue.of_rows(index), proposal.wider(index), error[index], largest)
        found.scores[index], found.ids[index] = again
        index = index[~proved]
    if not len(index):
        return found, widened, 0
    # Dead features are all the same row.
    rest = epilogue.of_rows(index)
    wide = accumulation_dtype(F.dtype)
    alike = F[index] if rest.offset is None else torch.cat([F[index].to(wide), rest.offset[:, None].to(wide)], 1)
    _, places = torch.unique(alike, dim=0, return_inverse=True)
    one = torch.empty(int(places.max()) + 1, dtype=torch.int64, device=F.device)
    one[places] = torch.arange(len(index), device=F.device)
    again = torch_backend.topk(Request(F[index[one]], task.W, task.k, rest.of_rows(one), largest, not largest))
    side = again.top if largest else again.bottom
    assert side is not None
    found.scores[index], found.ids[index] = side.scores[places], side.ids[places]
    return found, widened, len(one)


def _prove(
    task: _Task, F: Tensor, epilogue: Epilogue, proposal: Proposal, error: Tensor, largest: bool
) -> tuple[Side, Tensor, int]:
    """Score the candidates exactly; the k best, which rows [r] are proved, and how many had groups scored in full."""
    k = task.k
    if proposal.ids.shape[1] < k:
        return empty_side(F, k), torch.zeros(len(F), dtype=torch.bool, device=F.device), 0
    scores = task.rescore(F, task.W, proposal.ids, epilogue)
    found = best_of_candidates(scores, proposal.ids, k, largest=largest)
    kth = found.scores[:, -1]
    # Written so that a NaN anywhere leaves the row unproved.
    proved = (kth > proposal.left_out + error) if largest else (kth < proposal.left_out - error)
    if proposal.behind is None:
        return found, proved, 0
    reach = (
        (proposal.behind + error[:, None] >= kth[:, None])
        if largest
        else (proposal.behind - error[:, None] <= kth[:, None])
    )
    crowded = reach.sum(1)
    proved &= crowded <= MAX_CROWDED
    index = (proved & (crowded > 0)).nonzero().squeeze(1)
    if len(index):
        wider = _widen(task, F[index], epilogue.of_rows(index), _take(proposal, index), reach[index], largest)
        found.scores[index], found.ids[index] = wider
    return found, proved, len(index)


def _widen(task: _Task, F: Tensor, epilogue: Epilogue, proposal: Proposal, reach: Tensor, largest: bool) -> Side:
    """The k best of candidates and of every column in the groups that may hide one."""
    assert proposal.groups is not None and proposal.columns_of is not None
    V = len(task.W)
    n_groups = min(MAX_CROWDED, reach.shape[1])
    wanted, places = reach.int().topk(n_groups, dim=1)
    groups = proposal.groups.gather(1, places).masked_fill(wanted == 0, -1)
    columns = proposal.columns_of(groups).masked_fill((groups < 0)[:, :, None], V).flatten(1)
    known = (proposal.groups[:, :, None] == groups[:, None, :]).any(2)
    ids = torch.cat([proposal.ids.masked_fill(known, V), columns], 1)
    return best_of_candidates(task.rescore(F, task.W, ids, epilogue), ids, task.k, largest=largest)


def _take(proposal: Proposal, index: Tensor) -> Proposal:
    return Proposal(
        proposal.ids[index],
        proposal.left_out[index],
        None if proposal.groups is None else proposal.groups[index],
        None if proposal.behind is None else proposal.behind[index],
        proposal.columns_of,
    )
