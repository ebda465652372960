"""Matrix products in true float32, by the faster of the libraries that torch has for it on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

NARROW = torch.bfloat16


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Keep float32 products on device true float32: no TF32, no bf16 shortcut, no autocast, whatever was chosen."""
    with torch.autocast(device.type, enabled=False):
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:
            # The process has chosen by torch.backends.*.fp32_precision, after which the older setting can't be read.
            with _ieee_backends():
                yield
            return
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def _ieee_backends() -> Iterator[None]:
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def product(F: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """F Wᵀ [r, c] into out, contiguous and of F's and W's dtype; call within `full_float32`."""
    if F.dtype == torch.float32 and F.device.type == "cpu" and min(*F.shape, *W.shape) > 1 and onednn_is_faster():
        return out.copy_(_onednn(F.contiguous(), W.contiguous()))
    return torch.mm(F, W.T, out=out)


def _onednn(F: Tensor, W: Tensor) -> Tensor:
    """F Wᵀ by oneDNN: on processors other than Intel's up to twice as fast as MKL's product behind torch.mm."""
    return torch.ops.mkldnn._linear_pointwise(F, W, None, "none", [], "")


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's float32 product beats torch.mm here (and is float32): measured once in a process."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    F, W = (torch.randn(n, 512, generator=generator, device="cpu") for n in (256, 2048))
    with torch.no_grad(), full_float32(F.device):
        # float32 is off by some 1e-5 here, operands rounded to TF32 or bfloat16 by 1e-2 and more.
        exact = F[:8].double() @ W.double().T
        error = float((_onednn(F, W)[:8].double() - exact).abs().max())
        return error < 1e-3 and _shortest(lambda: _onednn(F, W)) < 0.9 * _shortest(lambda: torch.mm(F, W.T))


@cache
def faster_in_bfloat16() -> bool:
    """Whether products are at least 1.5 times as fast in bfloat16 as the best in float32: measured once."""
    F, W = torch.ones(256, 512, device="cpu"), torch.ones(4096, 512, device="cpu")
    narrow_F, narrow_W, out = F.to(NARROW), W.to(NARROW), torch.empty(256, 4096, device="cpu")
    with torch.no_grad(), full_float32(F.device):
        narrow = _shortest(lambda: torch.mm(narrow_F, narrow_W.T))
        return 1.5 * narrow < _shortest(lambda: product(F, W, out))


def _shortest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
