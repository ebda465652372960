"""Tile shapes and the choice between the two ways, by target, dtype and shape.

The table's entries are predictions from the compiled code (instructions of main loop and epilogue, registers, shared
memory: ``python -m bench.compile_check``); they have not been measured on a GPU. `tune` measures them on yours.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter was on when the kernels were first imported (Triton decides at decoration)."""
METHODS = ("fused", "gemm")
"""The fused kernel; or a library product into a bounded chunk, and one pass over that."""


class Config(NamedTuple):
    """Tile and launch parameters of one launch."""

    block_m: int
    """Rows of F in a tile."""
    block_n: int
    """Columns (rows of W) in a tile; 4 · splits groups of equally many columns."""
    block_k: int
    """Elements of d read at a time."""
    num_warps: int
    num_stages: int
    blocks_per_sm: int = 1
    """Programs that share a multiprocessor."""
    splits: int = 1
    """Parts of a tile that have four groups each."""
    parts: int = 1
    """Parts of a tile whose winners are found one by one, at least the splits; chosen by the code that comes of it."""

    @property
    def group(self) -> int:
        """Columns in a group, of which a launch keeps the two largest and the two smallest."""
        return self.block_n // (4 * self.splits)

    def groups(self, V: int) -> int:
        """Groups of all columns, those of the last tile in full."""
        return 4 * self.splits * -(-V // self.block_n)

    def split(self, V: int, k: int) -> Config:
        """With twice as many groups where two of the k best often share a wide one: these are scored in full."""
        return self._replace(splits=2) if self.group > 32 and k * k >= 2 * self.groups(V) else self


class Choice(NamedTuple):
    """The method and tile for a shape."""

    method: str
    """One of METHODS."""
    config: Config
    """The fused kernel's tile."""


TMA_TARGETS = ("sm_90", "sm_100", "interpreter")
WIDE = Config(128, 256, 64, 8, 3)
SQUARE = Config(128, 128, 64, 4, 3, blocks_per_sm=2)
_NARROW_DTYPES = (torch.bfloat16, torch.float16)
# Blackwell's accumulators come back from tensor memory with whole rows in a thread: half the rows, or it spills.
_NARROW = {
    "sm_80": (WIDE, SQUARE),
    "sm_90": (WIDE._replace(parts=2), SQUARE),
    "sm_100": (Config(64, 256, 64, 8, 3), Config(64, 128, 64, 4, 3, blocks_per_sm=2)),
    "gfx942": (Config(128, 256, 32, 8, 2), Config(128, 128, 32, 4, 2, blocks_per_sm=2)),
}
_INTERPRETER = (Config(32, 128, 64, 4, 1), Config(16, 64, 32, 4, 1, blocks_per_sm=2))
SHORT_D = 1024
"""Below this d the main loop is too short to hide a wide tile's epilogue: two blocks share a multiprocessor instead."""


def configs(target: str, dtype: torch.dtype) -> tuple[Config, ...]:
    """The tile configurations for operands of this dtype.

    Args:
        target: "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter".
        dtype: float16 or bfloat16; with float32 the tile is not used, as its product is the library's.

    Raises:
        ValueError: Another target or dtype.
    """
    if target == "interpreter":
        return _INTERPRETER
    if target not in _NARROW or dtype not in (*_NARROW_DTYPES, torch.float32):
        raise ValueError(
            f"no kernel for {dtype} on {target!r}: expected float32, float16 or bfloat16 on {', '.join(_NARROW)}"
        )
    return _NARROW[target]


def statistics_config(target: str, dtype: torch.dtype) -> Config:
    """The tile of a call with row statistics: half the scores a thread, for the registers of the sums."""
    if target == "interpreter":
        return _INTERPRETER[1]
    tile = configs(target, dtype)[-1]
    # Ampere has operands in registers too.
    rows = 64 if target == "sm_80" else tile.block_m
    return tile._replace(block_m=rows, num_warps=8, blocks_per_sm=1)


def choose(target: str, dtype: torch.dtype, d: int, V: int, k: int) -> Choice:
    """The predicted best choice for a shape; `tune.Table` holds measured ones."""
    tiles = configs(target, dtype)
    if dtype == torch.float32:
        # There are no float32 tensor cores: the library's product is faster.
        return Choice("gemm", tiles[0])
    tile = tiles[1] if d < SHORT_D and target != "interpreter" else tiles[0]
    return Choice("fused", tile.split(V, k))


def target_of(device: torch.device) -> str:
    """The table's name of a device; a compute capability that is not in it counts as the next lower one."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def multiplies_bfloat16() -> bool:
    """Whether ``tl.dot`` is right for bfloat16: everywhere but in Triton's unpatched interpreter (see its tests)."""
    if not INTERPRETED:
        return True
    from triton.runtime.interpreter import InterpreterBuilder

    return getattr(InterpreterBuilder.create_dot, "widens_bfloat16", False)


def programs_of(F: Tensor, config: Config) -> int:
    """Programs of a persistent grid on F's device."""
    if INTERPRETED:
        return 3
    return torch.cuda.get_device_properties(F.device).multi_processor_count * config.blocks_per_sm


def uses_tma(F: Tensor, W: Tensor) -> bool:
    """Whether operands go through TMA descriptors: Hopper and later, rows and bases in multiples of 16 bytes."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (F, W))
    return aligned and target_of(F.device) in TMA_TARGETS


def light(config: Config) -> Config:
    """The tile for an epilogue that needs more registers (a ragged tile, float keys): half the scores a thread."""
    if config.block_m > 64:
        return config._replace(block_m=config.block_m // 2, parts=1)
    return config._replace(num_warps=8, parts=1)


def persistent(*, tma: bool, terms: bool, plain: bool) -> bool:
    """Whether programs loop over tiles: only where loop, tile and epilogue fit into the registers together."""
    return tma and plain and not terms
