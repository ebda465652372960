"""Transport files: safetensors, checked when they are read.

Tensors by name: ``matrix.SIDE.ORDER`` [P or 2L, D, D], or with groups ``group.SIDE.ORDER`` [G, P or 2L, D, D];
``energy.SIDE.ORDER`` [P, R, D, D]; ``group_energy.SIDE.ORDER`` [G, P, D, D]; ``inside.ORDER.MODULE`` [G, D, W];
``centre`` [D]; ``group_centres`` [G, D]. The metadata says which model and sample.
Whatever is wrong with a file, from a flipped bit to another program's content, is a ValueError that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.runs.input_file import fits_memory
from querylens_fast.runs.sealed_tensors import SEAL_KEY, check_seal, write_tensors
from querylens_fast.transport.jacobians import Order, Side

FORMAT = "querylens_fast.transport/1"
MOST_LAYERS = 10_000
"""A bound on what is believed of a file; no model has so many."""
Table = dict[tuple[Side, Order], Tensor]
Inside = dict[tuple[Order, int], Tensor]


def write_transport(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write the file completely or not at all.

    Raises:
        OSError: It could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_tensors(path, tensors, metadata)
    except Exception as error:
        raise OSError(f"transport could not be written to {str(path)!r}: {error}") from error
    return path


def read_transport(path: Path) -> tuple[dict[str, Table], Inside, dict[str, Tensor], dict[str, str]]:
    """(tables by kind, what is kept inside modules, the other tensors, the metadata) of a transport file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, truncated or no transport; a tensor has another name, shape or dtype than a
            transport's, or holds NaN or infinite values.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"transport file {str(path)!r} does not exist; make one with fit_transport(...).save")
    tables: dict[str, Table] = {"matrix": {}, "energy": {}, "group": {}, "group_energy": {}}
    others: dict[str, Tensor] = {}
    inside: Inside = {}
    try:
        with fits_memory(path):
            check_seal(path)
        with fits_memory(path), safe_open(str(path), framework="pt") as file:
            metadata = {key: value for key, value in (file.metadata() or {}).items() if key != SEAL_KEY}
            layout = _Layout(path, metadata)
            for name in sorted(file.keys()):
                layout.check_shape(name, file.get_slice(name))
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                layout.check_values(name, tensor)
                kind, *pair = name.split(".")
                if kind == "inside":
                    inside[pair[0], int(pair[1])] = tensor  # type: ignore[index]
                elif pair:
                    tables[kind][pair[0], pair[1]] = tensor  # type: ignore[index]
                else:
                    others[name] = tensor
    except SafetensorError as error:
        raise ValueError(f"transport file {str(path)!r} is damaged or truncated: {error}") from error
    if not (tables["matrix"] or tables["group"]):
        raise ValueError(f"transport file {str(path)!r} holds no matrices; fit it again")
    return tables, inside, others, metadata


class _Layout:
    """What the tensors of a file have to be, by its metadata."""

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.path = str(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{self.path!r} is a safetensors file but no transport (format {metadata.get('format')!r})"
            )
        missing = [name for name in ("model", "fingerprint", "tokens", "n_valid") if name not in metadata]
        if missing:
            raise ValueError(f"transport file {self.path!r}: its metadata has no {', '.join(missing)}; fit it again")
        layers = self._integer(metadata, "n_layers", 1, MOST_LAYERS)
        self.d = self._integer(metadata, "d_model", 1, 1 << 30)
        n_valid = self._integer(metadata, "n_valid", 0, 1 << 60)
        self.last = last = 2 * layers
        points = self._integers(metadata, "points") if "points" in metadata else list(range(last + 1))
        sizes = self._integers(metadata, "group_n_valid") if "group_n_valid" in metadata else []
        if points != sorted(set(points)) or not points or points[0] < 0 or points[-1] > last:
            raise ValueError(f"transport file {self.path!r}: points {points} are not rising from 0 to {last}")
        if sizes and (min(sizes) < 1 or sum(sizes) != n_valid or len(sizes) < 2):
            raise ValueError(f"transport file {self.path!r}: groups of {sizes} positions do not add up to {n_valid}")
        self.n_groups, self.kept = len(sizes), {"full": len(points), "first_order": last}

    def check_shape(self, name: str, tensor: Any) -> None:
        """Raise ValueError unless a tensor of this name and shape, which is not read, belongs to a transport."""
        shape, (kind, *pair) = list(tensor.get_shape()), name.split(".")
        square, sides = [self.d, self.d], ("value", "key")
        expected: list[int] | None = {"centre": [self.d], "group_centres": [self.n_groups, self.d]}.get(name)
        if kind == "inside" and len(pair) == 2 and len(shape) == 3 and shape[2]:
            known = pair[0] in self.kept and pair[1].isdecimal() and int(pair[1]) < self.last
            expected = [max(1, self.n_groups), self.d, shape[2]] if known else None
        elif len(pair) == 2 and pair[0] in sides and pair[1] in self.kept:
            n = self.kept[pair[1]]
            # The first order keeps a term for each module, but an energy for each point.
            n_energies = n if pair[1] == "full" else n + 1
            if kind == "energy" and len(shape) == 4:
                expected = [n_energies, max(1, shape[1]), *square]
            elif kind == "group_energy":
                expected = [self.n_groups, n_energies, *square]
            elif kind in ("matrix", "group"):
                expected = [*([self.n_groups] if kind == "group" else []), n, *square]
        if expected is None or (name.startswith("group") and not self.n_groups):
            raise ValueError(f"transport file {self.path!r} holds {name!r} {shape}, which no transport has")
        if shape != expected:
            raise ValueError(f"transport file {self.path!r}: {name} is {shape}; expected {expected} by its metadata")

    def check_values(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError unless a tensor holds finite floats."""
        if not tensor.is_floating_point():
            raise ValueError(f"transport file {self.path!r}: {name} holds {tensor.dtype}; expected floats")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"transport file {self.path!r}: {name} holds NaN or infinite values; fit it again")

    def _integer(self, metadata: dict[str, str], name: str, low: int, high: int) -> int:
        found = self._integers(metadata, name)
        if len(found) != 1 or not low <= found[0] <= high:
            shown = metadata.get(name, "")[:100]
            raise ValueError(f"transport file {self.path!r}: {name} is {shown!r}; expected {low} to {high}")
        return found[0]

    def _integers(self, metadata: dict[str, str], name: str) -> list[int]:
        text = metadata.get(name, "")
        try:
            if len(text) > 1 << 20:
                raise ValueError("too long")
            return [int(part) for part in text.split(",")]
        except ValueError:
            shown = text if len(text) < 100 else f"{text[:100]}…"
            raise ValueError(f"transport file {self.path!r}: {name} is {shown!r}; expected integers") from None
