"""Matrix products in true float32, by the faster of the libraries that torch has for it on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = torch.bfloat16


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Keep float32 products on device true float32: no TF32, no bfloat16, no autocast, whatever the process has set."""
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
    if min(*F.shape, *W.shape) > 1 and _suits_onednn(F, W):
        return out.copy_(_onednn(F, W))
    return torch.mm(F, W.T, out=out)


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias [..., n] for x [..., d] and W [n, d], by the faster library in float32 on the CPU. No gradients."""
    if _suits_onednn(x, W) and not torch.is_grad_enabled():
        return _onednn(x, W, bias)
    return torch.nn.functional.linear(x, W, bias)


def add_product(total: Tensor, x: Tensor, W: Tensor) -> None:
    """total += x W, by the faster library as `linear`; total [..., n], x [..., d], W [d, n]."""
    if _suits_onednn(x, W):
        total += linear(x, W.mT)
    else:
        total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), W)


class FasterLinear(TorchFunctionMode):
    """Context in which ``nn.functional.linear`` is `linear`."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.linear and not kwargs:
            return linear(*args)
        return function(*args, **(kwargs or {}))


def _suits_onednn(x: Tensor, W: Tensor) -> bool:
    plain = x.dtype == W.dtype == torch.float32 and x.device.type == "cpu"
    return plain and min(*x.shape, *W.shape) > 0 and onednn_is_faster()


def _onednn(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias by oneDNN: on processors other than Intel's up to twice as fast as MKL's product behind torch.mm."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), W.contiguous(), bias, "none", [], "")


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's float32 product beats torch.mm here (and is float32): measured once in a process."""
    if not onednn_is_float32():
        return False
    F, W = (_normal(n, 512) for n in (256, 2048))
    with torch.no_grad(), full_float32(F.device):
        ours, theirs = _shortest(lambda: _onednn(F, W), lambda: torch.mm(F, W.T))
        return ours < 0.9 * theirs


@cache
def onednn_is_float32() -> bool:
    """Whether oneDNN is available and multiplies in true float32: tried once in a process."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    F, W = _normal(8, 512), _normal(2048, 512)
    with torch.no_grad(), full_float32(F.device):
        # float32 is off by some 1e-5 here, operands rounded to TF32 or bfloat16 by 1e-2 and more.
        return float((_onednn(F, W).double() - F.double() @ W.double().T).abs().max()) < 1e-3


@cache
def faster_in_bfloat16() -> bool:
    """Whether products are at least 1.25 times as fast in bfloat16 as the best in float32: measured once."""
    F, W, out = _normal(256, 512), _normal(4096, 512), torch.empty(256, 4096, device="cpu")
    narrow_F, narrow_W = F.to(NARROW), W.to(NARROW)
    with torch.no_grad(), full_float32(F.device):
        narrow, wide = _shortest(lambda: torch.mm(narrow_F, narrow_W.T), lambda: product(F, W, out))
        return 1.25 * narrow < wide


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


def _shortest(*runs: Callable[[], object]) -> list[float]:
    """Shortest processor time of each of some runs on one thread: which other work on the machine hardly changes."""
    times: list[list[float]] = [[] for _ in runs]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(8):
            for run, passed in zip(runs, times, strict=True):
                start = time.thread_time()
                run()
                passed.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return [min(passed) for passed in times]
