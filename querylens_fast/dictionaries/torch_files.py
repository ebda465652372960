"""Files of `torch.save` from elsewhere, read so that nothing in them can run, hang or fill the memory.

Only tensors and plain values are unpickled (``weights_only``). torch.save stores its tensors uncompressed in a zip
archive, so what a file unpacks to is known, and bounded by its size on the disk, before anything is read. The
archive's checksums are verified.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

MOST_PICKLE_MIB = 64
"""Of the pickled structure without the tensors' data; real files have a few KiB."""


def read_torch_file(path: Path, what: str) -> Any:
    """What a file of torch.save holds, its tensors on the CPU.

    Args:
        path: The file.
        what: What it is taken for, such as "Jacobian-lens file", for errors.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, is no file of torch.save (of torch 1.6 or later), or holds more than tensors
            and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                    raise ValueError(f"its entry {member.filename[:100]!r} is compressed, which torch.save does not do")
                if member.filename.endswith(".pkl") and member.file_size > MOST_PICKLE_MIB << 20:
                    raise ValueError(f"its structure takes over {MOST_PICKLE_MIB} MiB without any tensor data")
            if broken := archive.testzip():
                raise ValueError(f"the checksum of its entry {broken[:100]!r} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zipfile and torch's unpickler raise for bytes that are not theirs
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(
            f"{what} {str(path)!r} is damaged, or holds more than tensors and plain values ({said}); fetch it "
            "again, or save it with torch.save as tensors in plain dicts"
        ) from error
