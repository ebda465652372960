"""Safetensors files that prove their own bytes: written in one pass, with their SHA-256 in the header's metadata.

The digest is that of the whole file, in which its own 64 digits count as zeros. Any reader of safetensors takes such a
file as an ordinary one. Files of other programs and of earlier versions have no digest and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING

from querylens_fast.runs.atomic_write import whole
from querylens_fast.runs.run_record import DamagedFile

if TYPE_CHECKING:
    from torch import Tensor

SEAL_KEY = "querylens_fast.seal"
_BLANK = b"sha256:" + b"0" * 64
# By its form too: the damage may be in the key.
_SEAL = re.compile(rb'"querylens_fast\.seal":"(?P<keyed>[^"]*)"|"sha256:(?P<digits>[0-9a-f]{64})"')
_DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}
"""Widest first, so that every tensor of a file is aligned."""
_CHUNK = 1 << 22
_MAX_HEADER = 100_000_000  # what the safetensors library takes


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file, whole or not at all, and seal it.

    safetensors' own writer makes a second temporary file beside ours, which a killed process leaves behind.
    """
    order, place = list(_DTYPES.values()), 0
    widest_first = sorted(tensors.items(), key=lambda item: order.index(_kind(item[1])))
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in widest_first}
    header: dict[str, object] = {"__metadata__": {**metadata, SEAL_KEY: _BLANK.decode()}}
    for name, tensor in kept.items():
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _kind(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with whole(path) as partial, open(partial, "wb") as file:
        for data in (len(text).to_bytes(8, "little"), text, *map(_bytes_of, kept.values())):
            digest.update(data)
            file.write(data)
        file.seek(8 + text.index(_BLANK) + len("sha256:"))
        file.write(digest.hexdigest().encode())


def check_seal(path: str | Path) -> bool:
    """Compare a safetensors file with its digest, reading all of it (some 2 GB/s); False where it has none.

    Raises:
        FileNotFoundError: No such file.
        DamagedFile: A byte of it has changed.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= _MAX_HEADER else b""
        seal = _SEAL.search(header)
        if seal is None:
            return False
        digits = seal["digits"] or seal["keyed"].removeprefix(b"sha256:")
        blank = header.replace(digits, b"0" * 64, 1) if digits else header
        if _digest(file, size.to_bytes(8, "little") + blank).encode() != digits:
            raise DamagedFile(f"{str(path)!r} is damaged or truncated, or was edited: it is not what was written")
    return True


def problems(path: Path) -> list[str]:
    """What is wrong with a safetensors file: nothing, or a sentence that names it. Without a digest, it is opened."""
    from safetensors import SafetensorError, safe_open

    try:
        if not check_seal(path):
            with safe_open(str(path), framework="pt"):
                pass
    except (DamagedFile, SafetensorError) as error:
        return [str(error) if isinstance(error, DamagedFile) else f"{str(path)!r} is damaged or cut off: {error}"]
    return []


def _kind(tensor: Tensor) -> str:
    return _DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(rest: IO[bytes], begun: bytes) -> str:
    found = hashlib.sha256(begun)
    while chunk := rest.read(_CHUNK):
        found.update(chunk)
    return found.hexdigest()
