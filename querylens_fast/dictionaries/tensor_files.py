"""Tensor files: where each tensor lies in a ``.safetensors``, ``.npz`` or ``.pt`` file, without reading it.

No file runs code: ``.npz`` is read without pickles and ``.pt`` with ``weights_only``. Tensors that lie uncompressed in
their file (safetensors; ``.npz`` as numpy.savez writes it) are read in part; those of a ``.pt`` are mapped by torch; a
compressed ``.npz`` member and a ``.pt`` of the format before torch 1.6 are read whole.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from querylens_fast.dictionaries.rows import FileRows, MemoryRows, Rows

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DAMAGE = (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, struct.error)
_ZIP_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class StoredTensor:
    """A float tensor of a file: its shape, and how to have its rows or all of it."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None = None
    """Byte in the file where its elements start, row by row; None for a tensor that is held or mapped."""
    held: Tensor | None = None

    def rows(self, transposed: bool) -> Rows:
        """Rows [n, D] of a matrix [n, D], or [D, n] when transposed; a tensor [n, m, D] counts as [n, m·D]."""
        if self.offset is None:
            matrix = self.read().flatten(1)
            return MemoryRows(matrix.mT if transposed else matrix, f"tensor {self.name!r} of {self.path!r}")
        a, b = self.shape[0], _product(self.shape[1:])
        return FileRows(self.path, self.name, self.offset, self.dtype, (b, a) if transposed else (a, b), transposed)

    def read(self) -> Tensor:
        """The whole tensor."""
        if self.held is not None:
            return self.held
        count = _product(self.shape)
        flat = FileRows(self.path, self.name, self.offset or 0, self.dtype, (1, count), False)
        return flat.read(slice(None)).view(self.shape)


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def open_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(the float tensors of a file by name, the file's own metadata).

    Raises:
        ValueError: The file is damaged or truncated, holds more than tensors, or no tensors by name.
    """
    opener: Callable[[Path], tuple[dict[str, StoredTensor], dict[str, str]]]
    opener = {".safetensors": _open_safetensors, ".npz": _open_npz}.get(path.suffix, _open_torch)
    try:
        return opener(path)
    except DAMAGE as error:
        raise ValueError(
            f"dictionary file {str(path)!r} is damaged or truncated, or holds more than tensors: {error}"
        ) from error


def _open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    # safe_open has checked the header; it keeps to itself where the tensors start.
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES.get(entry.get("dtype", ""))
        if name != "__metadata__" and dtype is not None:
            start = 8 + length + entry["data_offsets"][0]
            found[name] = StoredTensor(str(path), name, tuple(entry["shape"]), dtype, offset=start)
    return found, metadata


def _open_npz(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    import numpy as np

    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file, np.load(path, allow_pickle=False) as arrays:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as entry:
                major, _ = np.lib.format.read_magic(entry)
                reader = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = reader(entry)
                start = entry.tell()
            if dtype.kind != "f" or not dtype.isnative:
                continue
            if start + dtype.itemsize * math.prod(shape) != member.file_size:
                raise ValueError(
                    f"dictionary file {str(path)!r}: {name} says {list(shape)} of {dtype} but its entry has "
                    f"{member.file_size - start} bytes; fetch the file again"
                )
            if member.compress_type == zipfile.ZIP_STORED and not fortran:
                offset, held = _member_start(file, member) + start, None
                torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
            else:
                offset, held = None, torch.from_numpy(np.ascontiguousarray(arrays[name]))
                torch_dtype = held.dtype
            found[name] = StoredTensor(str(path), name, shape, torch_dtype, offset, held)
    return found, {}


def _member_start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Byte where a stored zip member's data starts."""
    file.seek(member.header_offset)
    _, name_length, extra_length = _ZIP_HEADER.unpack(file.read(_ZIP_HEADER.size))
    return member.header_offset + _ZIP_HEADER.size + name_length + extra_length


def _open_torch(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}; expected named tensors")
    return {
        name: StoredTensor(str(path), name, tuple(value.shape), value.dtype, held=value)
        for name, value in loaded.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }, {}
