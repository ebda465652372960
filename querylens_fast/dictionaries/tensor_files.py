"""Tensor files: where each tensor lies in a ``.safetensors``, ``.npz`` or ``.pt`` file, without reading it.

No file runs code, and none is believed about its size: what it claims is checked against the bytes it has. Tensors that
lie uncompressed in their file (safetensors; ``.npz`` as numpy.savez writes it) are read in part; those of a ``.pt`` are
memory-mapped by torch; a compressed ``.npz`` member and a ``.pt`` of the format before torch 1.6 are read whole.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from querylens_fast.dictionaries.checkpoints import read_checkpoint
from querylens_fast.dictionaries.rows import FileRows, MemoryRows, Rows

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_INFLATION = 20
MAX_INFLATED_BYTES = 1 << 28
"""A compressed member larger than both bounds (times its compressed size, bytes) is taken for a zip bomb."""
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
"""Where training loops keep the tensors in a checkpoint that holds other things too."""
_ZIP_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class StoredTensor:
    """A float tensor of a file: its shape, and how to read its rows or all of it."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None = None
    """Byte in the file where its elements start, row by row; None for a tensor that ``load`` gives."""
    load: Callable[[], Tensor] | None = None

    def rows(self, transposed: bool) -> Rows:
        """Rows [n, D] of a matrix [n, D], or [D, n] when transposed; a tensor [n, m, D] counts as [n, m·D]."""
        if self.offset is None:
            matrix = self.read().flatten(1)
            return MemoryRows(matrix.mT if transposed else matrix, f"tensor {self.name!r} of {self.path!r}")
        a, b = self.shape[0], math.prod(self.shape[1:])
        return FileRows(self.path, self.name, self.offset, self.dtype, (b, a) if transposed else (a, b), transposed)

    def read(self) -> Tensor:
        """The whole tensor."""
        if self.load is not None:
            return self.load()
        flat = FileRows(self.path, self.name, self.offset or 0, self.dtype, (1, math.prod(self.shape)), False)
        return flat.read(slice(None)).view(self.shape)


Opened = tuple[dict[str, StoredTensor], dict[str, str]]


def open_tensors(path: Path) -> Opened:
    """(the float tensors of a file by name, the file's own metadata).

    Raises:
        ValueError: The file is damaged or truncated, holds more than tensors, no tensors by name, or claims more than
            it has.
    """
    if path.suffix not in (".safetensors", ".npz"):
        return _open_torch(path)
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_npz(path)
    except Exception as error:
        # A damaged file makes these readers raise nearly anything.
        raise ValueError(
            f"dictionary file {str(path)!r} is damaged or truncated, or holds more than tensors "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error


def _open_safetensors(path: Path) -> Opened:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata() or {})
    # safe_open has checked the header against the file; it does not say where the tensors start.
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


def _open_npz(path: Path) -> Opened:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two of its entries have the same name")
        members = [_npz_member(path, archive, member, file) for member in entries]
    return {tensor.name: tensor for tensor in members if tensor is not None}, {}


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO) -> StoredTensor | None:
    """One array of a ``.npz``; None where it holds no floats."""
    import numpy as np

    name = member.filename.removesuffix(".npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others inflate without bound at once
        raise ValueError(f"{name} is compressed in another way than numpy does; save it with numpy.savez")
    with archive.open(member) as entry:
        major, _ = np.lib.format.read_magic(entry)
        reader = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(entry)
        start = entry.tell()
    if dtype.kind != "f" or not dtype.isnative or dtype.itemsize > 8:
        return None
    stored = member.compress_type == zipfile.ZIP_STORED
    held = path.stat().st_size if stored else max(MAX_INFLATED_BYTES, MAX_INFLATION * member.compress_size)
    if min(shape, default=0) < 0 or start + dtype.itemsize * math.prod(shape) != member.file_size:
        raise ValueError(
            f"{name} says {list(shape)} of {dtype} but its entry has {member.file_size - start} bytes; fetch the file "
            "again"
        )
    if member.file_size > held:
        raise ValueError(
            f"{name} unpacks to {member.file_size} bytes from {member.compress_size}; such a file is not unpacked: "
            "save it with numpy.savez, uncompressed"
        )
    torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    if stored and not fortran:
        return StoredTensor(str(path), name, shape, torch_dtype, _member_start(file, member) + start)

    def load() -> Tensor:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(np.ascontiguousarray(arrays[name]))

    return StoredTensor(str(path), name, shape, torch_dtype, load=load)


def _member_start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Byte where a stored zip member's data starts."""
    file.seek(member.header_offset)
    _, name_length, extra_length = _ZIP_HEADER.unpack(file.read(_ZIP_HEADER.size))
    return member.header_offset + _ZIP_HEADER.size + name_length + extra_length


def _open_torch(path: Path) -> Opened:
    loaded = read_checkpoint(path, "dictionary file")
    for key in CHECKPOINT_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"dictionary file {str(path)!r} holds a {type(loaded).__name__}; expected named tensors")
    size = path.stat().st_size
    found = {}
    for name, value in loaded.items():
        if isinstance(name, str) and _is_plain(value):
            if value.nbytes > size:
                raise ValueError(
                    f"dictionary file {str(path)!r}: {name} is {list(value.shape)} of {value.dtype}, more than the "
                    f"file's {size} bytes; save the tensor itself, not an expanded view of it"
                )
            found[name] = StoredTensor(str(path), name, tuple(value.shape), value.dtype, load=_giving(value))
    return found, {}


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _giving(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value.detach().resolve_neg()
