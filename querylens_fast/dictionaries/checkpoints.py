"""Checkpoints: torch's ``.pt`` files read without running what is in them, and bounded by their own size."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from querylens_fast.dictionaries.pickles import PlainUnpickler, RefusedPickleError, check_keys

MAX_PICKLE_BYTES = 1 << 28
"""The pickle of a checkpoint names its tensors; it does not hold them."""
_LEGACY_PICKLES = 5
"""Before torch 1.6: magic number, version, machine, the object, the keys of its storages."""
_TENSOR_CALLS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
                 "_rebuild_parameter_with_state")  # fmt: skip


def read_checkpoint(path: Path, what: str = "file", *, checksums: bool = False) -> Any:
    """What a ``.pt`` file holds, on the CPU; tensors are memory-mapped where the file is of torch 1.6 or later.

    Args:
        path: The file.
        what: For errors, like "tuned-lens params file".
        checksums: Read all of the file and compare it with the archive's checksums, as well.

    Raises:
        ValueError: The file is damaged or truncated, holds more than tensors and plain values, is compressed, or claims
            more than it has. Nothing in it is run.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_archive(path, checksums)
        else:
            with open(path, "rb") as file:
                for _ in range(_LEGACY_PICKLES):
                    _check_pickle(file, path.stat().st_size)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        # A damaged file makes torch's reader raise nearly anything.
        raise ValueError(
            f"{what} {str(path)!r} is damaged or truncated, or holds more than tensors and plain values "
            f"({type(error).__name__}: {_first_line(error)}); fetch it again, or save its tensors with safetensors"
        ) from error


def _check_archive(path: Path, checksums: bool) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise RefusedPickleError("it is compressed, which torch.save does not do")
        if sum(member.file_size for member in members) > size:
            raise RefusedPickleError("its entries claim more bytes than the file has")
        pickles = [member for member in members if member.filename.rsplit("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise RefusedPickleError(f"it has {len(pickles)} entries data.pkl; expected one of moderate size")
        with archive.open(pickles[0]) as file:
            _check_pickle(file, size)
        if checksums and (broken := archive.testzip()):
            raise RefusedPickleError(f"the checksum of its entry {broken[:100]!r} is wrong")


def _check_pickle(file: IO[bytes], size: int) -> None:
    """Read a pickle with stand-ins for tensors, so that torch's own reader meets nothing that hangs or allocates."""
    unpickler = PlainUnpickler(file, _stand_in)

    def storage(pid: Any) -> Any:
        numel = pid[4] if isinstance(pid, tuple) and len(pid) > 4 else None
        if not isinstance(numel, int) or not 0 <= numel <= size:
            raise RefusedPickleError(f"a storage claims {numel!r} elements; the file has {size} bytes")
        return _StandIn()

    unpickler.persistent_load = storage  # type: ignore[method-assign]
    unpickler.load()


class _StandIn:
    """Takes the place of a tensor, a storage or a dtype."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _OrderedDict(dict[Any, Any]):
    """Takes the place of an OrderedDict, which may come with a list of pairs and with attributes."""

    def __init__(self, pairs: Any = ()) -> None:
        check_keys(key for key, _ in pairs)
        super().__init__(pairs)

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
        return _OrderedDict
    is_tensor = (module, name) in {("torch._utils", call) for call in _TENSOR_CALLS}
    is_storage = module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage")
    is_value = module == "torch" and (name in ("Size", "device") or isinstance(getattr(torch, name, None), torch.dtype))
    is_bytes = (module, name) == ("_codecs", "encode")
    if is_tensor or is_storage or is_value or is_bytes:
        return _StandIn
    raise RefusedPickleError(f"asks for {module}.{name}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no further message"])[0]
