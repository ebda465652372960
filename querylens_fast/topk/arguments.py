"""What the streamed top-k accepts: every argument is checked here, before anything is computed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
METHODS = ("fused", "gemm")
MIN_MEMORY_GIB = 0.001
"""Less makes panels of a few scores."""
PRECISIONS = ("exact", "float32", "bf16")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_BINS = 1 << 14


def choose_backend(backend: str, F: Tensor, W: Tensor | None = None) -> str:
    """The backend that a call with this F (and W) gets: "torch" or "triton"; ValueError when it can't run here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}; choose one of these")
    given = [F] if W is None else [F, W]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    importable = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        fits = F.device.type == "cuda" and all(x.dtype in TRITON_DTYPES for x in given)
        return "triton" if fits and importable and not interpreted else "torch"
    if backend == "triton" and not importable:
        raise ValueError("backend is 'triton' but the package triton is not installed: install it or use 'torch'")
    if backend == "triton" and F.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend is 'triton' but F is on {F.device}: expected a GPU; move F and W there, use backend='torch', "
            "or set TRITON_INTERPRET=1 before the first use for Triton's (slow) interpreter"
        )
    for name, x in zip("FW", given, strict=False):
        if backend == "triton" and x.dtype not in TRITON_DTYPES:
            names = ", ".join(str(dtype) for dtype in TRITON_DTYPES)
            raise ValueError(
                f"backend is 'triton' but {name} is {x.dtype}: expected one of {names}; use backend='torch'"
            )
    return backend


def check_options(
    V: int,
    k: int,
    *,
    anything: bool,
    backend: str,
    precision: str,
    method: str | None,
    block_rows: int | None,
    max_memory_gib: float | None,
) -> None:
    """Check the other arguments; backend: the chosen one, anything: whether a side or statistics are asked for."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= V:
        raise ValueError(f"k is {k!r} but W has {V} rows: k must be a whole number from 1 to {V}; lower k")
    if not anything:
        raise ValueError("top and bottom are both False: nothing is asked for; set at least one of them to True")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}: expected at least 1; leave it None for the backend's own choice")
    if max_memory_gib is not None and not max_memory_gib >= MIN_MEMORY_GIB:
        raise ValueError(
            f"max_memory_gib is {max_memory_gib}: expected at least {MIN_MEMORY_GIB}; leave it None for the defaults"
        )
    if max_memory_gib is not None and backend == "triton":
        raise ValueError("max_memory_gib is of the torch backend; leave it None with 'triton', or pass block_rows=")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}; choose one of these")
    if method is not None and (method not in METHODS or backend != "triton"):
        raise ValueError(
            f"method is {method!r} with backend {backend!r}: expected {' or '.join(METHODS)} with 'triton'; "
            "leave it None"
        )


def checked_histogram(histogram: Tensor | Sequence[float] | int | None) -> Tensor | int | None:
    """Edges as a tensor in float64, or the number of bins."""
    if histogram is None:
        return None
    if isinstance(histogram, int) and not isinstance(histogram, bool):
        if not 1 <= histogram <= MAX_BINS:
            raise ValueError(f"histogram is {histogram}: expected 1 to {MAX_BINS} bins, or a list of edges; lower it")
        return histogram
    edges = torch.as_tensor(histogram, dtype=torch.float64)
    if edges.ndim != 1 or len(edges) < 2 or not bool((edges[1:] > edges[:-1]).all()):
        raise ValueError(
            f"histogram is {edges.tolist() if edges.numel() < 20 else list(edges.shape)}: expected two or more edges "
            "in ascending order, or a number of bins; sort them"
        )
    return edges


def plain(x: Tensor | None) -> Tensor | None:
    """The tensor itself: without gradient, and with a lazy negation or conjugation carried out."""
    return None if x is None else x.detach().resolve_conj().resolve_neg()


def check_matrices(F: Tensor, W: Tensor) -> None:
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
    if F.device != W.device:
        raise ValueError(f"F is on {F.device} but W is on {W.device}: expected one device; move one of them")


def check_vectors(F: Tensor, W: Tensor, *, bias: Tensor | None, scale: Tensor | None, offset: Tensor | None) -> None:
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


def checked_ids(F: Tensor, W: Tensor, ids: Tensor) -> Tensor:
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
