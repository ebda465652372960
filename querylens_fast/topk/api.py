"""Streamed top-k over a matrix product that is never held: the checks at the door and the choice of backend.

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
of the result is proved against the bound on that pass's error, or scored again in float32 (`certified`). ``"float32"``
is the same answer by one plain pass. ``"bf16"`` rounds F and W to bfloat16 and takes that product's own scores: nothing
is proved, ids may differ where scores are closer than its rounding, and equals across the k-th place are cut anyhow.

Backends. ``"torch"`` runs everywhere. ``"triton"`` is the fused kernel of csrc_triton: a GPU, or the CPU when Triton's
interpreter is on (TRITON_INTERPRET=1 in the environment before the first use). ``"auto"`` decides by the tensor's
device at each call, before anything is launched.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.topk import bf16_candidates, torch_backend
from querylens_fast.topk.certify import Outcome
from querylens_fast.topk.statistics import Moments, RowStatistics

__all__ = ["RowStatistics", "TopK", "scores_at", "streamed_topk"]

BACKENDS = ("auto", "torch", "triton")
METHODS = ("fused", "gemm")
MIN_MEMORY_GIB = 0.001
"""Less makes tiles of a few scores."""
PRECISIONS = ("exact", "float32", "bf16")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    histogram: Tensor | Sequence[float] | None = None,
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
        histogram: edges [bins + 1], ascending: adds the histogram to the statistics (and implies them). Bins are
            [edge, next edge), the last one closed; scores outside are not counted. Slower than the other moments.
        block_rows: rows of F scored at a time; None lets the backend choose. Changes memory and speed, not the result
            beyond the last bit of a score.
        max_memory_gib: bound on the torch backend's tiles and its narrow copy of W, at least 0.001; where rows have to
            be scored again, as much once more. None: tiles of up to 128 MiB and a copy of up to 2 GiB. On the CPU
            buffers of up to 512 MiB a thread are kept for the next call. The Triton backend needs none: it holds 0.25
            GiB of winners, or 1 GiB of products, and a copy of W.
        threads: CPU threads for this call; None leaves torch's setting.

    Returns:
        TopK, ids int64 and sorted as the module's notes say. Extra memory: the result, a tile of scores and, for the
        bfloat16 pass, a copy of W in bfloat16; whatever n · V.

    Raises:
        ValueError: on a shape, dtype, device or k that does not fit, on top=bottom=False without statistics, and on a
            backend, precision, edges or bound that is unknown or can't be had here.
    """
    _check_matrices(F, W)
    _check_vectors(F, W, bias=bias, scale=scale, offset=offset)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(W):
        raise ValueError(f"k is {k!r} but W has {len(W)} rows: k must be a whole number from 1 to {len(W)}; lower k")
    edges = None if histogram is None else _checked_edges(histogram)
    statistics = statistics or edges is not None
    if not (top or bottom or statistics):
        raise ValueError("top and bottom are both False: nothing is asked for; set at least one of them to True")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}: expected at least 1; leave it None for the backend's own choice")
    if max_memory_gib is not None and not max_memory_gib >= MIN_MEMORY_GIB:
        raise ValueError(
            f"max_memory_gib is {max_memory_gib}: expected at least {MIN_MEMORY_GIB}; leave it None for the defaults"
        )
    if max_memory_gib is not None and choose_backend(backend, F) == "triton":
        raise ValueError("max_memory_gib is of the torch backend; leave it None with 'triton', or pass block_rows=")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}; choose one of these")
    if method is not None and (method not in METHODS or choose_backend(backend, F) != "triton"):
        raise ValueError(
            f"method is {method!r} with backend {choose_backend(backend, F)!r}: expected {' or '.join(METHODS)} with "
            "'triton'; leave it None"
        )
    if precision == "bf16" and F.dtype == torch.float64:
        raise ValueError("precision is 'bf16' but F is torch.float64: convert F and W to float32 first, or use 'exact'")
    if F.shape[1] == 0:
        # Products of nothing are those with a column of zeros.
        F, W = F.new_zeros(len(F), 1), W.new_zeros(len(W), 1)
    epilogue = torch_backend.Epilogue(bias, scale, offset)
    moments = Moments(len(F), F.device, edges) if statistics else None
    asked = _Asked(k, epilogue, top, bottom, block_rows, moments, method)
    with _threads(threads):
        found = _run(F, W, asked, choose_backend(backend, F), precision, max_memory_gib)
    best, worst = found.top or (None, None), found.bottom or (None, None)
    known = None if moments is None else moments.finish()
    return TopK(best[0], best[1], worst[0], worst[1], known, found.widened_rows)


class _Asked(NamedTuple):
    """A checked call, in the order in which the backends take it."""

    k: int
    epilogue: torch_backend.Epilogue
    top: bool
    bottom: bool
    block_rows: int | None
    moments: Moments | None
    method: str | None


def _run(F: Tensor, W: Tensor, asked: _Asked, backend: str, precision: str, max_memory_gib: float | None) -> Outcome:
    """The backend's answer to a checked call."""
    k, epilogue, top, bottom, block_rows, moments, _ = asked
    limit = None if max_memory_gib is None else int(max_memory_gib * 2**30)
    if backend == "triton":
        from querylens_fast.topk import triton_backend

        return triton_backend.topk(
            F,
            W,
            k,
            epilogue,
            top=top,
            bottom=bottom,
            block_rows=block_rows,
            precision=precision,
            moments=moments,
            method=asked.method,
        )
    tile_elements = torch_backend.TILE_ELEMENTS if limit is None else min(torch_backend.TILE_ELEMENTS, limit // 16)
    # Statistics of an exact call are of float32 scores too.
    if precision == "bf16" or (precision == "exact" and moments is None and bf16_candidates.pays(F, W, k, limit)):
        tile = bf16_candidates.tile_rows(F, W, limit) if block_rows is None else block_rows
        exact = precision == "exact"
        return bf16_candidates.topk(
            F,
            W,
            k,
            epilogue,
            top=top,
            bottom=bottom,
            block_rows=tile,
            moments=moments,
            exact=exact,
            tile_elements=tile_elements,
        )
    best, worst = torch_backend.topk(
        F, W, k, epilogue, top=top, bottom=bottom, block_rows=block_rows, moments=moments, tile_elements=tile_elements
    )
    return Outcome(best, worst, 0, 0)


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


def _checked_edges(histogram: Tensor | Sequence[float]) -> Tensor:
    edges = torch.as_tensor(histogram, dtype=torch.float64)
    if edges.ndim != 1 or len(edges) < 2 or not bool((edges[1:] > edges[:-1]).all()):
        raise ValueError(
            f"histogram is {edges.tolist() if edges.numel() < 20 else list(edges.shape)}: expected two or more edges "
            "in ascending order"
        )
    return edges


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
    _check_matrices(F, W)
    _check_vectors(F, W, bias=bias, scale=scale, offset=offset)
    ids = _checked_ids(F, W, ids)
    epilogue = torch_backend.Epilogue(bias, scale, offset)
    return (torch_backend.scores_of_columns if ids.ndim == 1 else torch_backend.scores_at)(F, W, ids, epilogue)


def choose_backend(backend: str, F: Tensor) -> str:
    """The backend that a call with this F gets: "torch" or "triton"; raises ValueError when it can't run here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}; choose one of these")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    importable = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        fits = F.device.type == "cuda" and F.dtype in TRITON_DTYPES
        return "triton" if fits and importable and not interpreted else "torch"
    if backend == "triton" and not importable:
        raise ValueError("backend is 'triton' but the package triton is not installed: install it or use 'torch'")
    if backend == "triton" and F.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend is 'triton' but F is on {F.device}: expected a GPU; move F and W there, use backend='torch', "
            "or set TRITON_INTERPRET=1 before the first use for Triton's (slow) interpreter"
        )
    if backend == "triton" and F.dtype not in TRITON_DTYPES:
        names = ", ".join(str(dtype) for dtype in TRITON_DTYPES)
        raise ValueError(f"backend is 'triton' but F is {F.dtype}: expected one of {names}; use backend='torch'")
    return backend


def _check_matrices(F: Tensor, W: Tensor) -> None:
    for name, matrix in (("F", F), ("W", W)):
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            what = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"{name} is {what}: expected a tensor of two axes, rows and d; reshape it")
        if not matrix.is_floating_point():
            raise ValueError(f"{name} is {matrix.dtype}: expected a float dtype; convert it with .float()")
    if F.shape[1] != W.shape[1]:
        raise ValueError(
            f"F is {list(F.shape)} but W is {list(W.shape)}: the last axes (d_model) must agree; "
            "is this dictionary from another model, or is one of them transposed?"
        )
    if F.dtype != W.dtype:
        raise ValueError(f"F is {F.dtype} but W is {W.dtype}: the dtypes must agree; convert one of them")
    if F.device != W.device:
        raise ValueError(f"F is on {F.device} but W is on {W.device}: expected one device; move one of them")


def _check_vectors(F: Tensor, W: Tensor, *, bias: Tensor | None, scale: Tensor | None, offset: Tensor | None) -> None:
    for name, vector, length, axis in (
        ("bias", bias, len(W), "row of W"),
        ("scale", scale, len(W), "row of W"),
        ("offset", offset, len(F), "row of F"),
    ):
        if vector is None:
            continue
        if not isinstance(vector, Tensor) or list(vector.shape) != [length]:
            what = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(f"{name} is {what}: expected a tensor [{length}], one entry for each {axis}; reshape it")
        if not vector.is_floating_point():
            raise ValueError(f"{name} is {vector.dtype}: expected a float dtype; convert it with .float()")
        if vector.device != F.device:
            raise ValueError(f"{name} is on {vector.device} but F is on {F.device}: expected one device; move it")


def _checked_ids(F: Tensor, W: Tensor, ids: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        what = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids is {what}: expected an integer tensor; convert it with .long()")
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != len(F)):
        raise ValueError(
            f"ids is {list(ids.shape)}: expected [m] or [{len(F)}, m], one line for each row of F; reshape it"
        )
    if ids.device != F.device:
        raise ValueError(f"ids is on {ids.device} but F is on {F.device}: expected one device; move it")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(W)):
        raise ValueError(
            f"ids holds {int(ids.min())}..{int(ids.max())}: expected 0..{len(W) - 1}, the rows of W; "
            "are these ids from another vocabulary?"
        )
    return ids.long()
