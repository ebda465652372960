"""Rows: a dictionary's vectors, in memory or read in part from a file.

`FileRows` knows where a matrix lies in its file and reads the asked rows with plain reads into fresh memory: nothing
is mapped, so memory grows by what is asked and a file that shrinks or a disk that fails is an error, not a signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import FileIO
from typing import Protocol

import torch
from torch import Tensor

from querylens_fast.models.norms import at_least_float32

FeatureIds = Tensor | slice

MIN_LENGTH = 1e-8
GAP_BYTES = 4096
"""A gap between wanted rows that is read along with them: reading less than a page costs as much."""


class Rows(Protocol):
    """Rows [n, D] that can be read in part. ``str()`` says where they are from."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def read(self, ids: FeatureIds) -> Tensor: ...


@dataclass(frozen=True)
class MemoryRows:
    """Rows of a matrix in memory, or of a memory-mapped tensor."""

    matrix: Tensor
    origin: str = "a matrix in memory"

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def read(self, ids: FeatureIds) -> Tensor:
        return self.matrix[ids if isinstance(ids, slice) else ids.to(self.matrix.device)]

    def __str__(self) -> str:
        return self.origin


@dataclass(frozen=True)
class SummedRows:
    """Rows that are sums over the middle axis of a tensor [n, m, D]: a cross-layer decoder's writes to m layers."""

    rows: Rows
    m: int

    @property
    def shape(self) -> tuple[int, int]:
        n, width = self.rows.shape
        return n, width // self.m

    def read(self, ids: FeatureIds) -> Tensor:
        return self.rows.read(ids).unflatten(1, (self.m, -1)).sum(1)

    def __str__(self) -> str:
        return str(self.rows)


def unit_rows(vectors: Tensor) -> Tensor:
    """Vectors [n, D] over their length, in float32 or wider; over 1e-8 where they are shorter, as sae-lens does."""
    wide = at_least_float32(vectors)
    # In float64: squares of numbers from 2e19 overflow float32.
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True, dtype=torch.float64)
    return wide / length.clamp_min(MIN_LENGTH).to(wide.dtype)


@dataclass(frozen=True)
class CarriedRows:
    """Rows carried by a weight [D, m] of the model: W r for each row r [m]; computed in float32 or wider.

    Attributes:
        rows: The rows.
        weight: The weight.
        unit_norm: Carry r / |r| instead.
    """

    rows: Rows
    weight: Tensor
    unit_norm: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.weight.shape[0]

    def read(self, ids: FeatureIds) -> Tensor:
        return self.carry(self.rows.read(ids))

    def carry(self, rows: Tensor) -> Tensor:
        """Rows that were read already, carried."""
        rows = rows.to(self.weight.device)
        dtype = torch.promote_types(torch.promote_types(rows.dtype, self.weight.dtype), torch.float32)
        rows = unit_rows(rows) if self.unit_norm else rows
        return rows.to(dtype) @ self.weight.mT.to(dtype)

    def __str__(self) -> str:
        return str(self.rows)


@dataclass(frozen=True)
class FileRows:
    """Rows [n, D] of a matrix that lies uncompressed in a file; only what is asked is read.

    Attributes:
        path: The file.
        name: The tensor's name, for messages.
        offset: Byte at which the matrix starts.
        dtype: Of the file; reads keep it.
        shape: (n, D).
        transposed: The file holds it as [D, n].
    """

    path: str
    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, int]
    transposed: bool

    def read(self, ids: FeatureIds) -> Tensor:
        """Rows [m, D] in the order of ids, contiguous, in the file's dtype. Cost: D reads a run for [D, n] files.

        Raises:
            ValueError: The file ends before the rows do.
            OSError: The file is gone or cannot be read.
        """
        if isinstance(ids, slice):
            ids = torch.arange(self.shape[0])[ids]
        wanted, places = ids.cpu().unique(return_inverse=True)
        with open(self.path, "rb", buffering=0) as file:
            found = (self._read_columns if self.transposed else self._read_rows)(file, wanted)
        return found if torch.equal(wanted, ids) else found[places]

    def _read_rows(self, file: FileIO, wanted: Tensor) -> Tensor:
        D = self.shape[1]
        found = torch.empty(len(wanted), D, dtype=self.dtype)
        for run, first, last in _runs(wanted, GAP_BYTES // (D * self.dtype.itemsize)):
            if last - first == run.stop - run.start:
                self._fill(file, first * D, found[run])
            else:
                span = torch.empty(last - first, D, dtype=self.dtype)
                self._fill(file, first * D, span)
                found[run] = span[wanted[run] - first]
        return found

    def _read_columns(self, file: FileIO, wanted: Tensor) -> Tensor:
        n, D = self.shape
        found = torch.empty(D, len(wanted), dtype=self.dtype)
        for run, first, last in _runs(wanted, GAP_BYTES // self.dtype.itemsize):
            whole = last - first == run.stop - run.start
            span = torch.empty(0 if whole else last - first, dtype=self.dtype)
            for d in range(D):
                self._fill(file, d * n + first, found[d, run] if whole else span)
                if not whole:
                    found[d, run] = span[wanted[run] - first]
        return found.T.contiguous()

    def _fill(self, file: FileIO, element: int, out: Tensor) -> None:
        """Read elements of the matrix from ``element`` on into contiguous memory."""
        file.seek(self.offset + element * self.dtype.itemsize)
        left = memoryview(out.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        while left:
            got = file.readinto(left)
            if not got:
                row = element % self.shape[0] if self.transposed else element // self.shape[1]
                raise ValueError(f"{self} ends early, at row {row} or after it: the file is truncated; fetch it again")
            left = left[got:]

    def __str__(self) -> str:
        return f"tensor {self.name!r} of {self.path!r}"


def _runs(ids: Tensor, gap: int) -> list[tuple[slice, int, int]]:
    """(places in ids, first row, last row + 1) of runs of ascending ids with gaps of at most ``gap`` rows."""
    if not len(ids):
        return []
    breaks = (ids.diff() > gap + 1).nonzero().squeeze(1) + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(ids)]
    return [(slice(a, b), int(ids[a]), int(ids[b - 1]) + 1) for a, b in zip(starts, stops, strict=True)]
