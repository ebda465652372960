"""Tile shapes of the kernels, by operand dtype and target. One hand-picked choice each; no autotuning."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter was on when the kernels were first imported (Triton decides at decoration)."""


class Config(NamedTuple):
    """How one launch is cut up."""

    block_m: int
    """Rows of F in a tile."""
    block_n: int
    """Columns (rows of W) in a tile; four groups of block_n / 4 columns each."""
    block_k: int
    """Elements of d read at a time."""
    num_warps: int
    num_stages: int

    @property
    def group(self) -> int:
        """Columns in a group, of which a launch keeps the two largest and the two smallest."""
        return self.block_n // 4


_NVIDIA = {
    torch.bfloat16: Config(128, 256, 64, 8, 3),
    torch.float16: Config(128, 256, 64, 8, 3),
    torch.float32: Config(64, 128, 32, 8, 3),
}
# Blackwell's accumulators come back from tensor memory with whole rows in a thread: half the rows, or it spills.
_BLACKWELL = {
    torch.bfloat16: Config(64, 256, 64, 8, 3),
    torch.float16: Config(64, 256, 64, 8, 3),
    torch.float32: Config(64, 128, 32, 8, 3),
}
_AMD = {
    torch.bfloat16: Config(128, 256, 32, 8, 2),
    torch.float16: Config(128, 256, 32, 8, 2),
    torch.float32: Config(64, 128, 32, 8, 2),
}
_INTERPRETER = Config(32, 128, 64, 4, 1)


def topk_config(dtype: torch.dtype, backend: str | None = None, arch: int = 0) -> Config:
    """The tile shape for operands of this dtype.

    Args:
        dtype: float32, float16 or bfloat16.
        backend: "cuda" or "hip"; None asks the running process.
        arch: compute capability of a "cuda" target as a number, e.g. 90.
    """
    if backend is None:
        if INTERPRETED:
            return _INTERPRETER
        backend = "hip" if torch.version.hip else "cuda"
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    if backend == "hip":
        return _AMD[dtype]
    return (_BLACKWELL if arch // 10 == 10 else _NVIDIA)[dtype]
