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

Precision. float64 inputs are scored in float64; float32, float16 and bfloat16 inputs are multiplied exactly and summed
in float32 (never TF32), and scores are returned in float32.

Backends. ``"torch"`` runs everywhere. ``"triton"`` is the fused kernel of csrc_triton: a GPU, or the CPU when Triton's
interpreter is on (TRITON_INTERPRET=1 in the environment before the first use). ``"auto"`` decides by the tensor's
device at each call, before anything is launched.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from . import blocked, narrow

__all__ = ["TopK", "scores_at", "streamed_topk"]

BACKENDS = ("auto", "torch", "triton")
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
    block_rows: int | None = None,
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
        block_rows: rows of F scored at a time; None lets the backend choose. Changes memory and speed, not the result
            beyond the last bit of a score.

    Returns:
        TopK, ids int64 and sorted as the module's notes say. Extra memory: the result and a tile of scores (64 MiB),
        whatever n and V.

    Raises:
        ValueError: on a shape, dtype, device or k that does not fit, on top=bottom=False, and on a backend that is
            unknown or can't run here.
    """
    _check_matrices(F, W)
    _check_vectors(F, W, bias=bias, scale=scale, offset=offset)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(W):
        raise ValueError(f"k is {k!r} but W has {len(W)} rows: k must be a whole number from 1 to {len(W)}; lower k")
    if not (top or bottom):
        raise ValueError("top and bottom are both False: nothing is asked for; set at least one of them to True")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}: expected at least 1; leave it None for the backend's own choice")
    epilogue = blocked.Epilogue(bias, scale, offset)
    if choose_backend(backend, F) == "triton":
        from . import fused

        best, worst, *_ = fused.topk(F, W, k, epilogue, top=top, bottom=bottom, block_rows=block_rows)
    elif narrow.pays(F, W, k):
        best, worst, *_ = narrow.topk(F, W, k, epilogue, top=top, bottom=bottom, block_rows=block_rows)
    else:
        best, worst = blocked.topk(F, W, k, epilogue, top=top, bottom=bottom, block_rows=block_rows)
    return TopK(*(best or (None, None)), *(worst or (None, None)))


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
    epilogue = blocked.Epilogue(bias, scale, offset)
    return (blocked.scores_of_columns if ids.ndim == 1 else blocked.scores_at)(F, W, ids, epilogue)


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
