"""Measured choices in place of the predicted ones: opt-in, for the device at hand, kept in a file that you name.

    table = tune.Table()
    tune.measure(F, W, k=25, table=table)  # times every way for this shape
    table.save("choices.json")
    tune.use(tune.Table.load("choices.json"))

Nothing is measured unless it is asked for, and nothing is remembered elsewhere.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from csrc_triton.configs import METHODS, Choice, Config, choose, configs, target_of
from csrc_triton.job import Job
from csrc_triton.rows import Columns, rows_of
from csrc_triton.select import select
from csrc_triton.topk import topk
from csrc_triton.winners import CHUNK_ELEMENTS, TILE, product, winners_of


class Shape(NamedTuple):
    """What a choice depends on."""

    target: str
    dtype: str
    d: int
    V: int
    k: int


class Table:
    """Choices by shape; shapes that were not measured get the predicted one."""

    def __init__(self) -> None:
        self.measured: dict[Shape, Choice] = {}

    def choose(self, target: str, dtype: torch.dtype, d: int, V: int, k: int) -> Choice:
        """The choice for a shape."""
        shape = Shape(target, str(dtype), d, V, k)
        return self.measured.get(shape) or choose(target, dtype, d, V, k)

    def save(self, path: str | Path) -> None:
        """Write the measured choices as JSON, whole or not at all."""
        entries = [
            {"shape": s._asdict(), "method": c.method, "config": c.config._asdict()} for s, c in self.measured.items()
        ]
        partial = Path(f"{path}.partial")
        partial.write_text(json.dumps({"triton": triton.__version__, "choices": entries}, indent=1), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It holds something else.
        """
        text = Path(path).read_text(encoding="utf-8")
        table = cls()
        try:
            for entry in json.loads(text)["choices"]:
                choice = Choice(entry["method"], Config(**entry["config"]))
                if choice.method not in METHODS:
                    raise ValueError(f"method is {choice.method!r}: expected one of {', '.join(METHODS)}")
                table.measured[Shape(**entry["shape"])] = choice
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no table of choices ({error}); make one with Table.save") from error
        return table


_active = Table()


def use(table: Table | None) -> None:
    """Let later calls choose by this table; None goes back to predictions."""
    global _active
    _active = table or Table()


def active() -> Table:
    """The table in use."""
    return _active


def measure(F: Tensor, W: Tensor, k: int, table: Table, repeat: int = 5) -> dict[Choice, float]:
    """Time every way for this shape on F's device, enter the fastest in the table, and return all medians in ms.

    Args:
        F: [n, d] rows as they will come, of the dtype that is multiplied.
        W: [V, d], same dtype and device.
        k: as it will be asked for.
        table: where the choice goes.
        repeat: timings of each way, after one that compiles.
    """
    target = target_of(F.device)
    tiles = configs(target, F.dtype)
    choices = [Choice("gemm", tiles[0])]
    if F.dtype != torch.float32:
        choices += [Choice("fused", tile.split(len(W), k)) for tile in tiles]
    times = {choice: _time_ms(choice, F, W, k, repeat) for choice in choices}
    shape = Shape(target, str(F.dtype), F.shape[1], len(W), k)
    table.measured[shape] = min(times, key=lambda choice: times[choice])
    return times


def _time_ms(choice: Choice, F: Tensor, W: Tensor, k: int, repeat: int) -> float:
    fused = choice.method == "fused"
    n, groups = len(F), (choice.config if fused else TILE).groups(len(W))
    step = n if fused else max(1, CHUNK_ELEMENTS // len(W))
    bounds = rows_of(F, Columns(float(torch.linalg.vector_norm(W.float(), dim=1).max()), 0.0, 0, 1.0, 0.0))
    job = Job(bounds.unit, torch.empty(2, n, 2, groups, dtype=torch.int32, device=F.device))

    def once() -> None:
        for start in range(0, n, step):
            rows = slice(start, start + step)
            if fused:
                topk(F[rows], W, job.of_rows(rows), choice.config)
            else:
                winners_of(product(F[rows], W), job.of_rows(rows))
        select(job.winners, bounds, k, max(32, triton.next_power_of_2(k + 16)), job.keys)
        if F.device.type == "cuda":
            torch.cuda.synchronize(F.device)

    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        once()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])
