"""The Triton backend of the streamed top-k: candidates from group winners, settled exactly.

Scores come from the fused kernel, or from a library product into a bounded chunk and one pass over it ("gemm");
`csrc_triton.configs` says which, `csrc_triton.tune` measures it. The one module that talks to csrc_triton, imported
only when a call goes there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton import tune
from csrc_triton.configs import Choice, configs, multiplies_bfloat16, statistics_config, target_of
from csrc_triton.epilogue import sums_of
from csrc_triton.rescore import rescore
from csrc_triton.select import Candidates, column_of, select
from csrc_triton.topk import topk as fused_winners
from csrc_triton.winners import BLOCK_N, CHUNK_ELEMENTS, product, winners
from querylens_fast.topk import certify, torch_backend
from querylens_fast.topk.statistics import Moments

WINNER_BYTES = 1 << 28
"""Group winners held at a time."""
EVEN = 16
"""Elements of a row, and bytes of its address, that the kernels are compiled for."""
MAX_ROWS = 1 << 19
"""Rows at a time: a grid has at most 65,535 blocks of 16 along its second axis."""
WIDER = 4
"""Times as many candidates for a block after one whose rows they mostly did not settle."""


def topk(
    F: Tensor,
    W: Tensor,
    k: int,
    epilogue: torch_backend.Epilogue,
    *,
    top: bool,
    bottom: bool,
    block_rows: int | None = None,
    precision: str = "exact",
    moments: Moments | None = None,
    method: str | None = None,
    dtype: torch.dtype | None = None,
) -> certify.Outcome:
    """The k largest and the k smallest scores of each row (arguments already checked).

    Args:
        F: [n, d].
        W: [V, d].
        k: 1 ≤ k ≤ V.
        epilogue: what turns inner products into scores.
        top: look for the largest.
        bottom: look for the smallest.
        block_rows: rows at a time.
        precision: "exact": float32 is multiplied in bfloat16 on a GPU and settled in float32; "float32": in its own
            dtype; "bf16": the exact answer for F and W rounded to bfloat16.
        moments: statistics to count in; the scores are then those of F's own dtype (of "bf16", where that is asked).
        method: "fused" or "gemm"; None takes the table's.
        dtype: what is multiplied, in place of what precision says; results stay exact.
    """
    if precision == "bf16":
        F, W = F.bfloat16(), W.bfloat16()
    if dtype is None:
        # The interpreter multiplies bf16 wrongly, so it keeps float32.
        low = precision == "exact" and F.dtype == torch.float32 and F.device.type == "cuda" and moments is None
        dtype = torch.bfloat16 if low else F.dtype
    choice = choose(F, W, k, dtype, method, moments)
    source = _Source(F, _even(W.to(dtype)), epilogue, choice, moments, top, bottom)
    tf32 = choice.config.input_precision == "tf32"
    m = k + 16 if dtype == F.dtype and not tf32 else (5 * k) // 2 + 16

    def propose(rows: slice, wide: bool) -> tuple[certify.Proposal | None, certify.Proposal | None]:
        return source.propose(rows, WIDER * m if wide else m)

    def exact(F: Tensor, W: Tensor, ids: Tensor, epilogue: torch_backend.Epilogue) -> Tensor:
        return rescore(F.contiguous(), W, ids, **_wide(epilogue))

    bound = certify.ErrorBound.of(W, epilogue, dtype, tf32=tf32)
    if block_rows is None:
        block_rows = max(128, WINNER_BYTES // (32 * max(1, len(W) // source.group)))
        block_rows = min(block_rows, 1 << 15)
        if choice.method == "gemm":
            block_rows = max(1, min(block_rows, CHUNK_ELEMENTS // len(W)))
    block_rows = min(block_rows, MAX_ROWS)
    return certify.topk(
        F,
        W.contiguous(),
        k,
        epilogue,
        propose,
        bound,
        top=top,
        bottom=bottom,
        block_rows=block_rows,
        rescore=exact,
        moments=moments,
    )


def choose(F: Tensor, W: Tensor, k: int, dtype: torch.dtype, method: str | None, moments: Moments | None) -> Choice:
    """The way that serves a call."""
    target = target_of(F.device)
    choice = tune.active().choose(target, dtype, F.shape[1], len(W), k)
    if method is not None and method != choice.method:
        choice = Choice(method, configs(target, dtype)[0])
    if moments is not None and moments.edges is not None:
        # A histogram needs the scores themselves.
        choice = choice._replace(method="gemm")
    elif moments is not None:
        choice = choice._replace(config=statistics_config(target, dtype))
    if dtype == torch.bfloat16 and choice.method == "fused" and not multiplies_bfloat16():
        raise ValueError(
            "the fused kernel in bfloat16 under Triton's interpreter: it multiplies bfloat16 wrongly; use method='gemm'"
        )
    return choice


class _Source:
    """Where proposals come from: one of the two ways to the group winners, and their selection."""

    def __init__(
        self,
        F: Tensor,
        W: Tensor,
        epilogue: torch_backend.Epilogue,
        choice: Choice,
        moments: Moments | None,
        top: bool,
        bottom: bool,
    ) -> None:
        self.F, self.W, self.epilogue, self.choice, self.moments = F, W, epilogue, choice, moments
        self.top, self.bottom = top, bottom
        self.tile = choice.config.block_n if choice.method == "fused" else BLOCK_N
        self.places = torch.arange(self.group, device=F.device)

    @property
    def group(self) -> int:
        """Columns in a group."""
        return self.tile // 4

    def propose(self, rows: slice, m: int) -> tuple[certify.Proposal | None, certify.Proposal | None]:
        """Candidates for both sides; statistics are counted on the way."""
        F = _even(self.F[rows].to(self.W.dtype))
        epilogue = self.epilogue.of_rows(rows)
        summed = self.moments is not None and self.moments.edges is None
        shift = self._shift(self.F[rows], epilogue) if summed else None
        if self.choice.method == "fused":
            config = self.choice.config
            found = fused_winners(
                F, self.W, **_wide(epilogue), shift=shift, top=self.top, bottom=self.bottom, config=config
            )
        else:
            scores = product(F, self.W)
            if self.moments is not None and shift is None:
                scores = epilogue.apply_(scores.float(), slice(None), slice(None))
                epilogue = torch_backend.Epilogue(None, None, None)
                self.moments.add_tile(scores, rows.start)
            found = winners(scores, **_wide(epilogue), shift=shift, top=self.top, bottom=self.bottom)
        if self.moments is not None and shift is not None and found.sums is not None:
            powers, peak, weights, weighted = sums_of(found.sums)
            self.moments.shift[rows] = shift.double()
            self.moments.add_sums(rows, len(self.W), powers, peak + shift, weights, weighted)
        pairs = ((found.top, True), (found.bottom, False))
        best, worst = (None if keys is None else self._proposal(keys, m, largest) for keys, largest in pairs)
        return best, worst

    def _proposal(self, keys: Tensor, m: int, largest: bool) -> certify.Proposal:
        side: Candidates = select(keys, m, len(self.W), self.group, largest=largest)
        return certify.Proposal(
            side.columns,
            side.left_out,
            side.groups,
            side.scores.masked_fill(~side.second, -torch.inf if largest else torch.inf),
            self._columns_of,
        )

    def _columns_of(self, groups: Tensor) -> Tensor:
        return column_of(groups[..., None], self.places, self.group).clamp(max=len(self.W))

    def _shift(self, F: Tensor, epilogue: torch_backend.Epilogue) -> Tensor:
        """About the mean score of each row, [r]: sums about it lose nothing."""
        bias, scale, offset = _wide(epilogue).values()
        mean = F.float() @ self.W[:, : F.shape[1]].mean(0, dtype=torch.float32)
        mean = mean if offset is None else mean + offset
        mean = mean if scale is None else mean * scale.mean()
        return mean if bias is None else mean + bias.mean()


def _even(rows: Tensor) -> Tensor:
    """Rows [n, d] for the kernels: d a multiple of 16 by zeros, and aligned, without which registers do not suffice."""
    if rows.shape[1] % EVEN:
        return torch.nn.functional.pad(rows, (0, -rows.shape[1] % EVEN))
    rows = rows.contiguous()
    return rows if rows.data_ptr() % EVEN == 0 else rows.clone()


def _wide(epilogue: torch_backend.Epilogue) -> dict[str, Tensor | None]:
    """The epilogue's vectors as the kernels take them."""
    return {name: None if v is None else v.float().contiguous() for name, v in epilogue._asdict().items()}
