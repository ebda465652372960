"""The tokens around a feature's peaks, from the token file beside the feature sample whose digest the sample names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from querylens_fast.queries.files import ResultFile
from querylens_fast.runs.sealed_tensors import check_seal

WIDTH = 12
"""Tokens on each side of a peak."""
MAX_BYTES = 1 << 28
"""Token files that are looked at, at most this large."""


class SampleTokens:
    """The ids of a feature sample's sequences."""

    def __init__(self, ids: np.ndarray, valid: np.ndarray) -> None:
        """Take ids and mask, [B, S]."""
        self.ids, self.valid = ids, valid

    @classmethod
    def beside(cls, sample: ResultFile) -> SampleTokens | None:
        """The token file in the sample's folder whose digest is the one that the sample was made with."""
        wanted = sample.identity.get("tokens_digest")
        for path in sorted(sample.path.parent.glob("*.safetensors")):
            ids, valid = _tokens_of(path)
            if ids is not None and valid.shape == ids.shape and _digest(ids, valid) == wanted:
                return cls(ids.astype(np.int32), valid)
        return None

    def around(self, sequence: int, position: int) -> tuple[list[int], list[int]]:
        """Valid token ids before and after a position of a sequence, at most `WIDTH` each."""
        start, stop = max(0, position - WIDTH), position + WIDTH + 1
        ids, valid = self.ids[sequence], self.valid[sequence]
        before = ids[start:position][valid[start:position]]
        after = ids[position + 1 : stop][valid[position + 1 : stop]]
        return before.tolist(), after.tolist()


def _tokens_of(path: Path) -> tuple[np.ndarray | None, np.ndarray]:
    """(Ids [B, S] int64, mask [B, S] bool) of a token sample; (None, nothing) where the file is none.

    As `models.tokens` reads it, without torch.
    """
    from safetensors import SafetensorError, safe_open

    nothing = np.zeros(0, bool)
    try:
        if path.stat().st_size > MAX_BYTES:
            return None, nothing
        with safe_open(path, framework="np") as file:
            if "tokens" not in file.keys():
                return None, nothing
            check_seal(path)
            ids = np.atleast_2d(file.get_tensor("tokens")).astype(np.int64)
            known = "valid_mask" in file.keys()
            return ids, np.atleast_2d(file.get_tensor("valid_mask")).astype(bool) if known else np.ones_like(ids, bool)
    except (OSError, ValueError, TypeError, SafetensorError):  # another kind of file that lies there
        return None, nothing


def _digest(ids: np.ndarray, valid: np.ndarray) -> str:
    """`models.tokens.Tokens.digest` of the same sample."""
    return hashlib.sha256(str(ids.shape).encode() + ids.tobytes() + valid.tobytes()).hexdigest()[:32]
