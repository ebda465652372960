"""Workspace: buffers that a thread keeps between calls.

Mapping fresh memory costs more than filling it (on Linux some 100 ms for 80 MB in pages of 4 KiB), so the tiles of the
streamed top-k are taken from here. A thread keeps at most LIMIT bytes; a larger buffer is made and dropped.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

LIMIT = 1 << 29
"""Bytes a thread keeps (512 MiB)."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_kept = _Kept()


def take(name: str, n_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat, uninitialised buffer of n_elements; valid until the same thread takes this name again."""
    if device.type != "cpu":
        return torch.empty(n_elements, dtype=dtype, device=device)
    n_bytes = n_elements * dtype.itemsize
    kept = _kept.buffers.get(name)
    if kept is None or len(kept) < n_bytes:
        others = sum(len(buffer) for key, buffer in _kept.buffers.items() if key != name)
        if n_bytes + others > LIMIT:
            return torch.empty(n_elements, dtype=dtype, device=device)
        kept = _kept.buffers[name] = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    return kept[:n_bytes].view(dtype)


def converted(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of x in another dtype; valid until the same thread takes this name again."""
    return take(name, x.numel(), dtype, x.device).view(x.shape).copy_(x)


def release() -> None:
    """Free the calling thread's buffers."""
    _kept.buffers.clear()
