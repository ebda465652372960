"""Orientation: which axis of a stored matrix counts features.

It differs by format (sae-lens keeps W_enc as [D, n], Qwen-Scope as [n, D]). Shapes and biases decide where they can,
else the format's entry; where neither does, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from querylens_fast.dictionaries.formats import Format, split_axes
from querylens_fast.dictionaries.rows import Rows, SummedRows
from querylens_fast.dictionaries.tensor_files import StoredTensor


@dataclass(frozen=True)
class Sides:
    """The matrices of a dictionary file, turned to [n, D]."""

    name: str
    format: Format
    match: re.Match[str]
    tensors: Mapping[str, StoredTensor]
    vectors: Mapping[str, Tensor]

    def of(self, specs: Sequence[str]) -> Rows | None:
        """The rows of the first of these tensors that the file holds."""
        for spec in specs:
            key, axes = split_axes(spec, self.match)
            if key in self.tensors:
                tensor = self.tensors[key]
                if axes == "n,m,d" and len(tensor.shape) == 3:
                    return SummedRows(tensor.rows(False), tensor.shape[1])
                return tensor.rows(self._is_transposed(key, tensor.shape, axes))
        return None

    def _is_transposed(self, key: str, shape: tuple[int, ...], axes: str) -> bool:
        """Does the file hold this matrix as [D, n]? By its shape where that tells, else as the format has it."""
        if len(shape) != 2:
            raise ValueError(f"dictionary {self.name!r}: {key} is {list(shape)}; expected a matrix")
        n, known_by = self._n_features()
        if n is not None and n not in shape:
            raise ValueError(
                f"dictionary {self.name!r}: {key} is {list(shape)} but {known_by}; expected one axis of {n}"
            )
        if n is not None and shape[0] != shape[1]:
            return shape[0] != n
        if axes == "?" and shape[0] == shape[1]:
            raise ValueError(
                f"dictionary {self.name!r}: {key} is square {list(shape)}, so its orientation is not known; "
                "store it as safetensors with W_dec [n, d] and W_enc [d, n]"
            )
        return key == "W_enc" if axes == "?" else axes == "d,n"

    def _n_features(self) -> tuple[int | None, str]:
        """How many features there are, and what says so."""
        for name in ("b_enc", "b_gate", "threshold"):
            if name in self.vectors and self.vectors[name].ndim == 1:
                return len(self.vectors[name]), f"{name} has {len(self.vectors[name])} entries"
        for spec in self.format.values:
            key, axes = split_axes(spec, self.match)
            if key in self.tensors and axes != "?" and len(self.tensors[key].shape) >= 2:
                shape = self.tensors[key].shape
                return shape[axes.split(",").index("n")], f"{key} is {list(shape)}"
        return None, ""
