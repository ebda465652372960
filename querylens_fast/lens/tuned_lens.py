"""Tuned lenses (arXiv 2303.08112): one affine translator a layer, in the parameter files of the tuned-lens library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from querylens_fast.dictionaries.checkpoints import read_checkpoint
from querylens_fast.runs.input_file import digest_of_file

_TRANSLATOR = re.compile(r"\d+\.(weight|bias)")


@dataclass(frozen=True)
class TunedLens:
    """v + W_l v + b_l for a value at resid_post of layer l, and v itself at the last layer.

    Attributes:
        params: "{l}.weight" [D, D] and "{l}.bias" [D] of each layer l.
        path: Where they were read from; shown in errors.
        digest: Of the file.
    """

    params: dict[str, Tensor]
    path: str
    digest: str = ""

    @property
    def identity(self) -> dict[str, str]:
        """What tells this lens from another, for a result's metadata."""
        return {"path": self.path, "digest": self.digest}

    def __call__(self, vectors: Tensor, layer: int, n_layers: int) -> Tensor:
        """Translated vectors [n, D].

        Raises:
            ValueError: The file has no translator for the layer, or one of another width.
        """
        if layer == n_layers - 1:
            return vectors
        missing = [name for name in (f"{layer}.weight", f"{layer}.bias") if name not in self.params]
        if missing:
            raise ValueError(
                f"tuned lens {self.path!r} has no {' and '.join(missing)}; it holds {len(self.params)} tensors"
            )
        weight, bias = (self.params[f"{layer}.{part}"].to(vectors) for part in ("weight", "bias"))
        if weight.shape != (vectors.shape[1],) * 2:
            raise ValueError(
                f"tuned lens {self.path!r}: {layer}.weight is {list(weight.shape)}, but d_model is {vectors.shape[1]}"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"tuned lens {self.path!r}: {layer}.bias is {list(bias.shape)}, but {layer}.weight is "
                f"{list(weight.shape)}"
            )
        return vectors + torch.nn.functional.linear(vectors, weight, bias)


def load_tuned_lens(path: str | Path) -> TunedLens:
    """Read a parameter file; only tensors are admitted.

    Raises:
        FileNotFoundError: No such file. A missing lens is never taken for the identity.
        ValueError: The file is damaged or holds more than tensors, or a translator is not of finite floats.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"tuned-lens params file {str(path)!r} does not exist")
    params = read_checkpoint(path, "tuned-lens params file", checksums=True)
    if not isinstance(params, dict) or not all(isinstance(v, Tensor) for v in params.values()):
        raise ValueError(f"tuned-lens params file {str(path)!r} does not hold named tensors")
    for name, tensor in params.items():
        if _TRANSLATOR.fullmatch(str(name)):
            _check(path, str(name), tensor)
    return TunedLens(dict(params), str(path), digest_of_file(path)[:32])


def _check(path: Path, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a translator's tensor is a square matrix or a vector of finite floats."""
    expected = "a square matrix" if name.endswith("weight") else "a vector"
    if tensor.ndim != (2 if name.endswith("weight") else 1) or len(set(tensor.shape)) != 1:
        raise ValueError(f"tuned lens {str(path)!r}: {name} is {list(tensor.shape)}; expected {expected}")
    if not tensor.is_floating_point():
        raise ValueError(f"tuned lens {str(path)!r}: {name} holds {tensor.dtype}; expected floats")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"tuned lens {str(path)!r}: {name} holds NaN or infinite values; fetch it again")
