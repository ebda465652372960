"""Digests of a dictionary's whole content, so that a resumed run goes on with exactly what it began with.

Cost: one read of the vectors, a block at a time (sha256: some 2 GB/s). What a file gave is remembered within the
process for as long as its size, modification time and inode stay.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from querylens_fast.dictionaries.rows import CarriedRows, FileRows, Rows, SummedRows
from querylens_fast.dictionaries.sae import Coder

BLOCK_BYTES = 1 << 24


class SideDigest(NamedTuple):
    """All vectors of one side as a digest, and the features whose vector holds NaN or inf."""

    digest: str
    not_finite: tuple[int, ...]


_known: dict[tuple[Any, ...], SideDigest] = {}


def side_digests(values: Rows | None, keys: Rows | None) -> dict[str, SideDigest]:
    """The digests of the sides that there are, "value" and "key".

    The same for one dictionary in any file format, orientation and dtype that holds the same numbers.
    """
    sides = {side: rows for side, rows in (("value", values), ("key", keys)) if rows is not None}
    if values is keys:
        return dict.fromkeys(sides, _rows_digest(sides["value"]))
    with ThreadPoolExecutor(2, "digest") as pool:  # hashing releases the interpreter's lock
        return dict(zip(sides, pool.map(_rows_digest, sides.values()), strict=True))


def content_digest(sides: Mapping[str, SideDigest], coder: Coder | None) -> str:
    """32 hexadecimal digits of all vectors and of what running the dictionary needs beside them."""
    parts = [f"{side}:{found.digest}" for side, found in sides.items()]
    parts += [] if coder is None else [_coder_digest(coder)]
    return hashlib.sha256(",".join(parts).encode()).hexdigest()[:32]


def _rows_digest(rows: Rows) -> SideDigest:
    if isinstance(rows, SummedRows | CarriedRows):
        return _rows_digest(rows.rows)  # what is done to them is the layout's or the model's
    place = None
    if isinstance(rows, FileRows):
        file = os.stat(rows.path)
        place = rows, file.st_size, file.st_mtime_ns, file.st_ino
        if place in _known:
            return _known[place]
    n, width = rows.shape
    digest = hashlib.sha256(f"{n},{width}".encode())
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    not_finite: list[int] = []
    for start in range(0, n, step):
        block = _wide(rows.read(slice(start, min(start + step, n))))
        digest.update(_bytes(block))
        if not bool(block.sum().isfinite()):
            not_finite += (~block.isfinite().all(1)).nonzero()[:, 0].add(start).tolist()
    found = SideDigest(digest.hexdigest(), tuple(not_finite))
    if place is not None:
        _known[place] = found
    return found


def _coder_digest(coder: Coder) -> str:
    """Of everything but W_enc and W_dec, which are the keys and the values."""
    settings = coder.architecture, coder.k, coder.normalisation, coder.apply_b_dec_to_input
    options: Mapping[str, Any] = coder.options
    digest = hashlib.sha256(repr((*settings, coder.rescale_by_decoder_norm, sorted(options.items()))).encode())
    for name, weight in sorted(coder.weights.items()):
        if name not in ("W_enc", "W_dec"):
            digest.update(f"{name}{list(weight.shape)}".encode() + _bytes(_wide(weight)))
    return digest.hexdigest()


def _wide(x: Tensor) -> Tensor:
    """x on the CPU in float32; in float64 where it is and float32 does not hold its numbers."""
    found = x.detach().to("cpu", torch.float32)
    return found if x.dtype != torch.float64 or torch.equal(found.double(), x.cpu()) else x.detach().cpu()


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
