"""Rows: a dictionary's vectors, in memory or read in part from a memory-mapped file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FeatureIds = Tensor | slice


class Rows(Protocol):
    """Rows [n, D] that can be read in part."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def read(self, ids: FeatureIds) -> Tensor: ...


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a matrix in memory."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def read(self, ids: FeatureIds) -> Tensor:
        return self.matrix[ids if isinstance(ids, slice) else ids.to(self.matrix.device)]


@dataclass(frozen=True)
class FileRows:
    """Rows of a tensor in a safetensors file; ``transposed`` when the file holds [D, n]. Only what is asked is read."""

    path: str
    name: str
    shape: tuple[int, int]
    transposed: bool

    def read(self, ids: FeatureIds) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            view = file.get_slice(self.name)
            parts = [view[:, a:b].mT if self.transposed else view[a:b] for a, b in _runs(ids, self.shape[0])]
        return torch.cat(parts) if parts else torch.empty(0, self.shape[1])


def _runs(ids: FeatureIds, n: int) -> list[tuple[int, int]]:
    """Contiguous runs [start, stop) that cover ids in order."""
    if isinstance(ids, slice):
        start, stop, _ = ids.indices(n)
        return [(start, stop)] if stop > start else []
    values = ids.tolist()
    runs: list[tuple[int, int]] = []
    for i in values:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
