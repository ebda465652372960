"""The tokens around a feature's peaks, from the token file beside the feature sample whose digest the sample names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from querylens_fast.models.tokens import Tokens, load_tokens
from querylens_fast.queries.files import ResultFile

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
            found = _tokens_of(path)
            if found is not None and found.digest == wanted:
                return cls(found.ids.numpy().astype(np.int32), found.valid_mask.numpy())
        return None

    def around(self, sequence: int, position: int) -> tuple[list[int], list[int]]:
        """Valid token ids before and after a position of a sequence, at most `WIDTH` each."""
        start, stop = max(0, position - WIDTH), position + WIDTH + 1
        ids, valid = self.ids[sequence], self.valid[sequence]
        before = ids[start:position][valid[start:position]]
        after = ids[position + 1 : stop][valid[position + 1 : stop]]
        return before.tolist(), after.tolist()


def _tokens_of(path: Path) -> Tokens | None:
    """The file's token sample, or None where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        with safe_open(path, framework="np") as file:
            if "tokens" not in file.keys():
                return None
        return load_tokens(path)
    except (OSError, ValueError, SafetensorError):  # another kind of file that lies there
        return None
