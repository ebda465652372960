"""Wall-clock times of tasks that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bench.machine import sync


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    sync(device)
    start = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - start


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of some times in ms."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"p20_ms": cuts[0], "p50_ms": statistics.median(values), "p80_ms": cuts[3]}


def measure(tasks: dict[str, Callable[[], object]], device: torch.device, repeat: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each task (p20, p50, p80), tasks taking turns; on a GPU also the extra memory in MiB."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    extra: dict[str, float] = {}
    for turn in range(repeat + 1):
        for name, task in tasks.items():
            sync(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            start = time.perf_counter()
            result = task()
            sync(device)
            passed_ms = 1e3 * (time.perf_counter() - start)
            if device.type == "cuda":
                extra[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            del result
            # The first turn warms caches and compiles.
            if turn:
                times[name].append(passed_ms)
    return {
        name: quantiles(values) | ({"extra_mib": extra[name]} if name in extra else {})
        for name, values in times.items()
    }
