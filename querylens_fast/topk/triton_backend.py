"""The Triton backend of the streamed top-k: group winners of a 16-bit pass, settled exactly on the device.

A block of rows takes five launches (six where V is no multiple of a tile) and no host synchronisation: operands and
bounds of the rows, the product with its group winners, candidates, exact scores with proof, crowded groups. The last
two run on a second stream beside the next block's product. After the last block the host reads the flags: rows without
proof are done again with more slots for candidates, and those still without proof by the torch backend.

float32 is multiplied as float16 after powers of two (`csrc_triton.rows`), and so are operands of two dtypes; columns of
W that are not finite or far longer than the others are set apart and scored for every row. Scores come from the fused
kernel, or from a library product into a bounded chunk and one pass over it ("gemm"): `csrc_triton.configs` chooses.
The one module that talks to csrc_triton, imported only when a call goes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from csrc_triton import tune
from csrc_triton.columns import Prepared, prepare
from csrc_triton.configs import Choice, Config, configs, multiplies_bfloat16, statistics_config, target_of
from csrc_triton.finish import HOPELESS, MAX_SLOTS, PROVED, UNPROVED, Exact, Results, finish
from csrc_triton.job import Job, Keys, Terms
from csrc_triton.rows import Rows, rows_of
from csrc_triton.select import select
from csrc_triton.sums import N_SUMS, sums_of
from csrc_triton.topk import topk as fused_winners
from csrc_triton.winners import CHUNK_ELEMENTS, TILE, product, winners_of
from querylens_fast.topk import torch_backend
from querylens_fast.topk.arguments import plain
from querylens_fast.topk.products import full_float32
from querylens_fast.topk.request import Outcome, Request, Side
from querylens_fast.topk.statistics import Moments

WINNER_BYTES = 1 << 30
"""Group winners of a block, and partial sums beside them: 16,384 rows at V = 262,144 and both sides."""
MAX_ROWS = 1 << 15
WIDER = 4
"""Times as many slots for candidates in the second try (`csrc_triton.finish` knows it too)."""
NARROW = (torch.float16, torch.bfloat16)


def topk(request: Request, dtype: torch.dtype | None = None) -> Outcome:
    """The k largest and the k smallest scores of each row (arguments already checked).

    Args:
        request: the call. F and W are float32, float16 or bfloat16 each. precision "exact": a 16-bit pass, settled in
            float32; "float32": the library's float32 product; "bf16": the exact answer for F and W rounded to bfloat16.
            Statistics are of scores in F's and W's own dtype. method None takes the table's.
        dtype: what is multiplied, in place of what precision says; results stay exact.

    Raises:
        ValueError: The method does not support the dtype (see `choose`).
    """
    F, W = plain(request.F), plain(request.W)
    assert F is not None and W is not None
    if request.precision == "bf16":
        F, W = F.bfloat16(), W.bfloat16()
    W = W if W.stride(1) == 1 else W.contiguous()
    own = F.dtype if F.dtype == W.dtype else torch.float32
    moments = request.statistics
    if dtype is None:
        wide = own == torch.float32 and (request.precision == "float32" or moments is not None)
        dtype = torch.float32 if wide else own if own in NARROW else torch.float16
    request = replace(request, F=F.float() if dtype == torch.float32 else F, W=W)
    with torch.no_grad(), full_float32(F.device):
        choice = choose(request, dtype)
        columns = None
        if len(F) and 2 * request.k <= MAX_SLOTS and (request.sides or moments is not None):
            columns = prepare(
                W,
                dtype,
                request.epilogue.bias,
                request.epilogue.scale,
                scaled=own != dtype and dtype == torch.float16,
                terms=moments is not None or any(x is not None for x in request.epilogue),
                statistics=moments is not None,
            )
        if columns is None or request.k + columns.n_apart > _tile(choice).groups(len(W)):
            # Nothing can be proved, or there are fewer groups than candidates needed.
            return torch_backend.topk(request)
        return _Pass(request, choice, columns, exact=own == dtype).run()


def choose(request: Request, dtype: torch.dtype) -> Choice:
    """Method and tile for a call whose pass is in dtype.

    Raises:
        ValueError: "fused" is asked for a product in float32, or one in bfloat16 of an interpreter that has none.
    """
    F, W, moments = request.F, request.W, request.statistics
    target = target_of(F.device)
    choice = tune.active().choose(target, dtype, F.shape[1], len(W), request.k)
    if request.method is not None and request.method != choice.method:
        choice = Choice(request.method, configs(target, dtype)[0])
    if moments is not None and (moments.edges is not None or moments.bins is not None):
        # A histogram needs the scores themselves.
        choice = choice._replace(method="gemm")
    elif moments is not None:
        choice = choice._replace(config=statistics_config(target, dtype))
    if choice.method == "fused" and dtype == torch.float32:
        raise ValueError(
            "method is 'fused' for a product in float32: expected 'gemm', as GPUs have no float32 tensor cores; leave "
            "method None, or convert F and W to a 16-bit dtype"
        )
    if dtype == torch.bfloat16 and choice.method == "fused" and not multiplies_bfloat16():
        raise ValueError(
            "the fused kernel in bfloat16 under Triton's interpreter: it multiplies bfloat16 wrongly; use method='gemm'"
        )
    return choice


def _tile(choice: Choice) -> Config:
    """The tile whose groups a pass keeps winners of."""
    return choice.config if choice.method == "fused" else TILE


def slots_for(k: int, d: int, *, exact: bool) -> int:
    """Slots for candidates of a row and side, a power of two; from `bench unproved` on heavy-tailed rows.

    With operands of the exact scores, the bound on the sums' rounding grows with d, and what it leaves open with it;
    rounded operands need more.
    """
    wanted = k + k * d // 5120 + 12 if exact else 2 * k + k // 2 + 15
    return min(MAX_SLOTS, max(32, 1 << wanted.bit_length()))


class _Pass:
    """One call: blocks of rows through the launches, then what they left unproved."""

    def __init__(self, request: Request, choice: Choice, columns: Prepared, *, exact: bool) -> None:
        self.request, self.choice, self.columns = request, choice, columns
        k, sides = request.k, len(request.sides)
        self.tile = _tile(choice)
        self.groups = self.tile.groups(len(request.W))
        self.slots = slots_for(k + columns.n_apart, request.F.shape[1], exact=exact)
        self.scaled = columns.W.dtype == torch.float16 and (request.F.dtype, request.W.dtype) != (torch.float16,) * 2
        self.keys = Keys(request.top, request.bottom, columns.fixed)
        # The terms of exact scores, with what the pass must not see.
        given = (request.epilogue.scale, request.epilogue.bias)
        stand_ins = (columns.scale, columns.bias)
        self.terms = [x if y is None else y.float().contiguous() for x, y in zip(stand_ins, given, strict=True)]
        sums_bytes = 0 if request.statistics is None else N_SUMS
        bytes_a_row = (8 * max(1, sides) + sums_bytes) * self.groups
        rows = request.block_rows or max(1, WINNER_BYTES // bytes_a_row)
        self.rows = min(rows, MAX_ROWS)

    def run(self) -> Outcome:
        """Both sides; the host waits for the device once, behind the last block."""
        request, sides = self.request, self.request.sides
        found = self.blocks(request, self.slots)
        widened = fallback = 0
        if sides:
            flags = found.flags
            widened = int((flags != PROVED).sum())
            index = (flags == UNPROVED).any(1).nonzero().squeeze(1) if widened else flags[:0, 0]
            if len(index) and WIDER * self.slots <= MAX_SLOTS:
                again = self.blocks(request.of_rows(index), WIDER * self.slots)
                found.scores[:, index], found.ids[:, index], flags[index] = again
            if widened:
                index = ((flags == HOPELESS) | (flags == UNPROVED)).any(1).nonzero().squeeze(1)
            if len(index):
                fallback = self._plain(index, found) * len(sides)
        both = {largest: Side(found.scores[i], found.ids[i]) for i, largest in enumerate(sides)}
        return Outcome(both.get(True), both.get(False), widened, fallback)

    def _plain(self, index: Tensor, results: Results) -> int:
        """Rows by the torch backend, equal ones (dead features are all the same row) once; how many there were."""
        part = self.request.of_rows(index)
        offset = part.epilogue.offset
        alike = part.F if offset is None else torch.cat([part.F.float(), offset[:, None].float()], 1)
        _, places = torch.unique(alike, dim=0, return_inverse=True)
        one = torch.empty(int(places.max()) + 1, dtype=torch.int64, device=index.device)
        one[places] = torch.arange(len(index), device=index.device)
        found = torch_backend.topk(part.of_rows(one))
        for i, side in enumerate(x for x in (found.top, found.bottom) if x is not None):
            results.scores[i, index], results.ids[i, index] = side.scores[places], side.ids[places]
        return len(one)

    def blocks(self, request: Request, slots: int) -> Results:
        """Results of all rows of a request, without a host synchronisation."""
        columns, sides, device = self.columns, len(self.request.sides), request.F.device
        n, k = len(request.F), request.k
        F = request.F if request.F.stride(1) == 1 else request.F.contiguous()
        results = Results(
            torch.empty(sides, n, k, dtype=torch.float32, device=device),
            torch.empty(sides, n, k, dtype=torch.int64, device=device),
            torch.empty(n, sides, dtype=torch.int32, device=device),
        )
        offset = request.epilogue.offset
        if columns.scale is not None:
            offset = torch.zeros(n, device=device) if offset is None else offset.float().contiguous()
        room = torch.empty(max(1, sides), min(self.rows, n), 2, self.groups, dtype=torch.int32, device=device)
        beside = _Beside(device, more=n > self.rows)
        for start in range(0, n, self.rows):
            rows = slice(start, min(start + self.rows, n))
            own = None if offset is None else offset[rows]
            mean = columns.mean if request.statistics is not None else None
            part = rows_of(F[rows], columns.bounds, scaled=self.scaled, offset=own, mean=mean)
            terms = exact_terms = None
            if own is not None and columns.scale is not None and columns.bias is not None:
                terms = Terms(part.factor, own, columns.scale, columns.bias)
                exact_terms = terms._replace(scale=self.terms[0], bias=self.terms[1])
            job = Job(part.unit, room[:, : len(part.unit)], self.keys, terms)
            self._winners(part, job, rows, request.statistics)
            if sides:
                how = Exact(exact_terms, columns.apart, self.tile.group)
                beside.wait()
                found = select(job.winners, part, k + columns.n_apart, slots, self.keys)
                with beside.settling(found, part, exact_terms):
                    finish(F[rows], request.W, found, part, results.of_rows(rows), how, self.keys)
        beside.wait()
        return results

    def _winners(self, part: Rows, job: Job, rows: slice, moments: Moments | None) -> None:
        """Group winners of a block by the chosen way; statistics are counted on the way."""
        n = rows.stop - rows.start
        if moments is not None and part.shift is not None and moments.edges is None and moments.bins is None:
            shape = (n, N_SUMS, self.groups // (4 * self.tile.splits))
            job = job._replace(shift=part.shift, sums=torch.empty(shape, dtype=torch.float32, device=part.unit.device))
        W = self.columns.W
        if self.choice.method == "fused":
            fused_winners(part.narrow, W, job, self.choice.config)
        else:
            step = max(1, CHUNK_ELEMENTS // len(W))
            for start in range(0, n, step):
                some = slice(start, start + step)
                dots = product(part.narrow[some], W)
                if moments is not None and job.sums is None:
                    first = rows.start + start
                    block = slice(first, first + len(dots))
                    moments.add_rows([self.request.epilogue.apply_(dots.clone(), block, slice(None))], first)
                winners_of(dots, job.of_rows(some))
        if moments is not None and job.sums is not None and part.shift is not None:
            totals = sums_of(job.sums)
            moments.shift[rows] = part.shift.double()
            moments.add_sums(rows, len(W), totals[:4], totals[4] + part.shift, totals[5], totals[6])


class _Beside:
    """On a GPU with more than one block, a stream on which a block is settled beside the next block's product."""

    def __init__(self, device: torch.device, *, more: bool) -> None:
        self.stream = torch.cuda.Stream(device) if more and device.type == "cuda" else None
        self.held: tuple[object, ...] = ()
        """Tensors of the block that is being settled: they must not be freed before that is done."""

    def wait(self) -> None:
        """Make later launches wait until every block so far is settled."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.held = ()

    @contextmanager
    def settling(self, *held: object) -> Iterator[None]:
        """Launches within follow what was launched before, and run beside what comes after."""
        if self.stream is None:
            yield
            return
        self.held = held
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield
