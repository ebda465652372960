"""Patches of Triton's interpreter for tests: bfloat16 products, and programs in another order.

The interpreter keeps bfloat16 as raw 16-bit integers, and its ``tl.dot`` multiplies those integers. Programs of a grid
run in the order of their ids, which hides any dependence between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen_bfloat16() -> None:
    """Make the interpreter's ``tl.dot`` convert bfloat16 operands to float32 first; does nothing when repeated."""
    original = interpreter.InterpreterBuilder.create_dot
    if getattr(original, "widens_bfloat16", False):
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, _widened(a), _widened(b), d, *rest)

    create_dot.widens_bfloat16 = True  # pyright: ignore[reportFunctionMemberAccess]
    interpreter.InterpreterBuilder.create_dot = create_dot  # pyright: ignore[reportAttributeAccessIssue]


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Run the programs of every grid in a random order: results that change depend on an order no GPU promises."""
    builder, random = interpreter.interpreter_builder, np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)

    def set_grid_dim(*grid: int) -> None:
        nonlocal order
        order = random.permutation(int(np.prod(grid)))
        type(builder).set_grid_dim(builder, *grid)

    def set_grid_idx(x: int, y: int, z: int) -> None:
        grid = builder.grid_dim
        place = order[(x * grid[1] + y) * grid[2] + z]
        type(builder).set_grid_idx(builder, *(int(i) for i in np.unravel_index(place, grid)))

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
