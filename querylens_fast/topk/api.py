"""Streamed top-k over a matrix product that is never held: argument checks and the choice of backend.

``streamed_topk(F, W, k)`` scores every row of F [n, d] against every row of W [V, d],

    score[i, v] = (<F_i, W_v> + offset[i]) * scale[v] + bias[v],

and keeps the k largest and the k smallest of each row. Nothing of size n x V exists at any time. The roles are the
caller's: features x vocabulary gives token signatures, tokens x features the strongest features, features x features
virtual weights.

Order. Results are sorted from the extreme inwards and equal scores by the lower id, on both sides and across the k-th
place too: exactly what a stable sort of the scores returns (-0.0 equals 0.0). Infinities are ordered as numbers. A
score that is NaN (NaN input, 0 x inf, inf - inf) never wins while a number is left, on either side; where fewer than k
numbers exist the NaNs follow them, lower id first.

Precision. ``"exact"``: float64 inputs are scored in float64; float32, float16 and bfloat16 inputs are multiplied
exactly and summed in float32 (never TF32). Candidates may come from a bfloat16 pass where one is faster, but every row
of the result is proved against the bound on that pass's error, or scored again in float32. ``"float32"`` is the same
answer by one plain pass. ``"bf16"`` rounds F and W to bfloat16 and takes that product's own scores: nothing
is proved, ids may differ where scores are closer than its rounding, and which equal scores are kept at the k-th place
is not defined.

Backends. ``"torch"`` runs everywhere. ``"triton"`` is the fused kernel of csrc_triton: a GPU, or the CPU when Triton's
interpreter is on (TRITON_INTERPRET=1 in the environment before the first use). ``"auto"`` decides by the tensor's
device at each call, before anything is launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import bf16_candidates, torch_backend
from querylens_fast.topk.arguments import (
    check_matrices,
    check_options,
    check_vectors,
    checked_histogram,
    checked_ids,
    choose_backend,
    plain,
)
from querylens_fast.topk.narrow import NarrowProduct
from querylens_fast.topk.request import Epilogue, Outcome, Request
from querylens_fast.topk.rescore import scores_at as scores_at_ids
from querylens_fast.topk.rescore import scores_of_columns
from querylens_fast.topk.statistics import Moments, RowStatistics

__all__ = ["RowStatistics", "TopK", "scores_at", "streamed_topk"]


class TopK(NamedTuple):
    """The extreme scores of each row of F and the rows of W they belong to."""

    top_scores: Tensor | None
    """[n, k], descending, float32 (float64 for float64 inputs); None when ``top=False``."""
    top_ids: Tensor | None
    """[n, k] int64 rows of W."""
    bottom_scores: Tensor | None
    """[n, k], ascending; None when ``bottom=False``."""
    bottom_ids: Tensor | None
    """[n, k] int64 rows of W."""
    statistics: RowStatistics | None = None
    """Of all V scores of each row, with ``statistics=True``."""
    widened_rows: int = 0
    """Rows (each side counted) that the first candidates of an exact call did not prove."""

    def to(self, device: torch.device | str) -> TopK:
        """A copy whose tensors live on device."""
        statistics = None if self.statistics is None else self.statistics.to(device)
        moved = {name: side.to(device) for name, side in self.sides().items()}
        return self._replace(statistics=statistics, **moved)

    def sides(self) -> dict[str, Tensor]:
        """Scores and ids of the sides that were asked for, by field."""
        fields = ("top_scores", "top_ids", "bottom_scores", "bottom_ids")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    @classmethod
    def concatenate(cls, parts: Sequence[TopK]) -> TopK:
        """One TopK of the rows of several, which all have the same sides and moments."""
        sides = {name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].sides()}
        known = [part.statistics for part in parts if part.statistics is not None]
        statistics = RowStatistics.concatenate(known) if known else None
        return parts[0]._replace(statistics=statistics, widened_rows=sum(p.widened_rows for p in parts), **sides)


def streamed_topk(
    F: Tensor,
    W: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    top: bool = True,
    bottom: bool = True,
    backend: str = "auto",
    precision: str = "exact",
    method: str | None = None,
    statistics: bool = False,
    histogram: Tensor | Sequence[float] | int | None = None,
    block_rows: int | None = None,
    max_memory_gib: float | None = None,
    threads: int | None = None,
) -> TopK:
    """The k largest and k smallest entries of each row of (F Wᵀ + offset) * scale + bias, never held whole.

    Args:
        F: [n, d] rows to be scored (features), any float dtype; n may be 0.
        W: [V, d] candidates (unembedding, embedding or other rows), on F's device and of F's dtype.
        k: how many to keep on each side, 1 ≤ k ≤ V.
        bias: [V], added last.
        scale: [V], multiplied onto the product (after the offset), e.g. 1/‖w_v - c‖.
        offset: [n], added to the product first, e.g. -⟨f_i, c⟩; so a centred W is never built.
        top: return the largest.
        bottom: return the smallest.
        backend: "auto", "torch" or "triton" (see the module's notes).
        precision: "exact", "float32" or "bf16" (see the module's notes).
        method: of the Triton backend: "fused", "gemm" (a library product into a bounded chunk, one pass over it), or
            None for the table's choice (`csrc_triton.configs`; `csrc_triton.tune` measures it on your device).
        statistics: also return `RowStatistics` of all V scores of each row, from the same pass; the pass of
            an "exact" call is then the float32 one; "bf16" keeps the narrow one and its rounding.
        histogram: edges [bins + 1], ascending, or a number of bins between each row's extremes: adds the histogram to
            the statistics (and implies them). Bins are [edge, next edge), the last one closed; scores outside are not
            counted. Slower than the other moments.
        block_rows: rows of F scored at a time; None lets the backend choose. Changes memory and speed, not the result
            beyond the last bit of a score.
        max_memory_gib: bound on the torch backend's tiles and its narrow copy of W, at least 0.001; where rows have to
            be scored again, twice that. None: tiles of up to 128 MiB and up to 256 MiB of rounded rows of W. On the
            CPU buffers of up to 512 MiB a thread are kept for the next call. The Triton backend has no bound to
            set: it holds 1 GiB of winners, or as much of products, and a 16-bit copy of W.
        threads: CPU threads for this call; None leaves torch's setting.

    Returns:
        TopK, ids int64 and sorted as the module's notes say. Extra memory: the result, a tile of scores and, for the
        bfloat16 pass, up to 256 MiB of W in bfloat16; none of it grows with n · V.

    Raises:
        ValueError: on a shape, dtype, device or k that does not fit, on top=bottom=False without statistics, and on a
            backend, precision, edges or bound that is unknown or not available on this machine.
    """
    check_matrices(F, W)
    check_vectors(F, W, bias=bias, scale=scale, offset=offset)
    chosen, bins = choose_backend(backend, F, W), checked_histogram(histogram)
    statistics = statistics or bins is not None
    check_options(
        len(W),
        k,
        anything=top or bottom or statistics,
        backend=chosen,
        precision=precision,
        method=method,
        block_rows=block_rows,
        max_memory_gib=max_memory_gib,
    )
    if precision == "bf16" and torch.float64 in (F.dtype, W.dtype):
        name = "F" if F.dtype == torch.float64 else "W"
        raise ValueError(
            f"precision is 'bf16' but {name} is torch.float64: convert it to float32 first, or use 'exact'"
        )
    F, W, bias, scale, offset = (plain(x) for x in (F, W, bias, scale, offset))  # type: ignore[assignment]
    if F.shape[1] == 0:
        # d = 0: pad to one zero column.
        F, W = F.new_zeros(len(F), 1), W.new_zeros(len(W), 1)
    moments = Moments(len(F), F.device, bins) if statistics else None
    max_bytes = None if max_memory_gib is None else int(max_memory_gib * 2**30)
    epilogue = Epilogue(bias, scale, offset)
    request = Request(F, W, k, epilogue, top, bottom, moments, block_rows, max_bytes, precision, method)
    with _threads(threads):
        found = _run(request, chosen)
    best, worst = found.top or (None, None), found.bottom or (None, None)
    known = None if moments is None else moments.finish()
    return TopK(best[0], best[1], worst[0], worst[1], known, found.widened_rows)


def _run(request: Request, backend: str) -> Outcome:
    """The backend's answer to a checked call."""
    if backend == "triton":
        from querylens_fast.topk import triton_backend

        return triton_backend.topk(request)
    if request.precision == "bf16":
        return torch_backend.topk(request, NarrowProduct(request, exact=False))
    # Statistics of an exact call are of float32 scores too.
    if request.precision == "exact" and request.statistics is None and bf16_candidates.pays(request):
        return bf16_candidates.topk(request)
    return torch_backend.topk(request)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    if threads < 1:
        raise ValueError(f"threads is {threads}: expected at least 1; leave it None for torch's setting")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scores_at(
    F: Tensor,
    W: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Scores of given rows of W for each row of F, by the formula and precision of `streamed_topk`.

    Args:
        F: [n, d], any float dtype.
        W: [V, d], on F's device and of F's dtype.
        ids: [n, m] integer rows of W for each row of F, or [m] for all of them; each in 0..V-1.
        bias: [V], added last.
        scale: [V], multiplied onto the product.
        offset: [n], added to the product first.

    Returns:
        [n, m] float32 (float64 for float64 inputs).

    Raises:
        ValueError: on a shape, dtype or device that does not fit, and on an id outside W.
    """
    check_matrices(F, W)
    check_vectors(F, W, bias=bias, scale=scale, offset=offset)
    ids = checked_ids(F, W, ids)
    F, W, bias, scale, offset = (plain(x) for x in (F, W, bias, scale, offset))  # type: ignore[assignment]
    return (scores_of_columns if ids.ndim == 1 else scores_at_ids)(F, W, ids, Epilogue(bias, scale, offset))
