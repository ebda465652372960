"""The machine of a measurement: what it is, what runs on it, and how fast it moves bytes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def sync(device: torch.device) -> None:
    """Wait until the device has done what it was given (nothing to do on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_gb_s(device: torch.device, mib: int | None = None) -> float:
    """GB/s of memory traffic (bytes read + bytes written) of copying one tensor to another, median of seven.

    Args:
        device: where both tensors lie.
        mib: size of each; default 1024 on a GPU and 256 on a CPU, beyond any cache.
    """
    size = (mib or (1024 if device.type == "cuda" else 256)) << 20
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        sync(device)
        start = time.perf_counter()
        target.copy_(source)
        sync(device)
        times.append(time.perf_counter() - start)
    # The first copy also maps the pages of the target.
    return 2e-9 * size / statistics.median(times[1:])


def commit() -> str:
    """The checkout's commit, with ``+`` behind it when tracked files have been changed since; "" without git."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor()


def versions() -> dict[str, str | None]:
    """Versions of what is measured and measured against; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy", "transformers", "faiss", "cuvs", "flashinfer"):
        there = importlib.util.find_spec(name) is not None
        found[name] = getattr(importlib.import_module(name), "__version__", "unknown") if there else None
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what this was measured: names, threads, versions, commit, date, measured copy bandwidth."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "cpu": cpu_name(),
        "bf16_products": bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "copy_gb_s": copy_gb_s(device),
        **versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
