"""Jacobian-lens files: read one as a value-side transport, write a transport as one.

The Jacobian lens (arXiv 2607.15495) carries a residual of layer l to the end by J_l = E[∂h_final/∂h_l], which is the
value side's full matrix at resid_post of layer l under other averaging rules: by default it leaves out the first 16
positions and the last of every prompt, among sources and targets, and averages over a prompt's positions before it
averages over prompts. h_final is the stream before the final norm in both, and a row vector v moves as v Jᵀ.

A file is what ``torch.save`` makes of ``{"J": {layer: [D, D]}, "n_prompts": n, "source_layers": [...], "d_model": D}``
with float16 matrices as a rule and, from some writers, a "metadata" dict.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.checkpoints import read_checkpoint
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.runs.atomic_write import whole
from querylens_fast.runs.input_file import digest_of_file
from querylens_fast.transport.transport import FORMAT, Transport

TEXT_LENGTH = 10_000
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 100
_SHORT.maxlevel, _SHORT.maxother = 2, 100
AVERAGING = (
    "Jacobian lens (arXiv 2607.15495): by prompt, without the first 16 positions and the last unless its file says "
    "otherwise"
)


def import_jacobian_lens(path: str | Path, model: Any) -> Transport:
    """Read a fitted Jacobian lens as a transport of ``model``.

    It serves value-side presets in the full order at resid_post of its layers (and mlp_out, which is written there);
    the final layer's matrix is the identity. Everything else (key side, first order, other points, rel_var) is refused
    by name when asked for. Its averaging rules are recorded in the metadata, not ours.

    Args:
        path: The lens file. Only tensors and plain values are unpickled.
        model: The model it was fitted on, as `as_model` takes it, with its raw weights.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no finished lens, or its shapes, layers or values do not fit the model.
    """
    model, path = as_model(model), Path(path)
    if model.convention != "raw lm_head":
        raise ValueError(
            f"model {model.name!r} has processed weights ({model.convention}); a Jacobian lens maps the raw model's "
            "stream: load the model with load_model"
        )
    lens = _read(path)
    matrices = _matrices(path, lens, model)
    recorded = _recorded(path, lens, model.n_layers - 1)
    layers = sorted(matrices)
    metadata = {
        "format": FORMAT,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "convention": model.convention,
        "n_layers": str(model.n_layers),
        "d_model": str(model.d_model),
        "points": ",".join(str(2 * layer + 2) for layer in layers),
        "tokens": f"Jacobian lens {path.name}",
        "averaging": recorded.get("averaging", AVERAGING),
        "submodule": "both",
        "through_norms": "True",
        "n_valid": "0",
        "digest": digest_of_file(path)[:32],
        "n_prompts": _text(lens.get("n_prompts", "unknown")),
        **{f"lens.{key}": value for key, value in recorded.items()},
    }
    return Transport({("value", "full"): torch.stack([matrices[layer] for layer in layers])}, None, metadata)


def export_jacobian_lens(transport: Transport, path: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the value side's full matrices at resid_post as a Jacobian-lens file, whole or not at all.

    Every layer but the last, whose matrix is the identity by definition. The averaging rules stay ours (all valid
    positions of the sample, equally); "metadata" in the file says so.

    Args:
        transport: One that holds the value side in the full order.
        path: The file to write.
        dtype: Of the matrices; float16 is what lens files have.

    Raises:
        ValueError: No value/full matrices, restricted ones, or they overflow dtype.
        OSError: The file could not be written.
    """
    said = transport.metadata
    if said.get("submodule") != "both" or said.get("through_norms") != "True":
        raise ValueError(
            f"this transport has submodule={said.get('submodule')}, through_norms={said.get('through_norms')}; a "
            "Jacobian lens is of whole layers: fit one with both modules and through the norms"
        )
    held = [layer for layer in range(transport.n_layers - 1) if 2 * layer + 2 in transport.points]
    matrices = {layer: transport.matrix("value", "full", 2 * layer + 2).cpu().to(dtype) for layer in held}
    for layer, matrix in matrices.items():
        if not torch.isfinite(matrix).all():
            raise ValueError(f"layer {layer}'s matrix overflows {dtype}; pass dtype=torch.float32")
    content = {
        "J": matrices,
        "n_prompts": int(said.get("n_sequences") or said.get("n_prompts") or 0),
        "source_layers": held,
        "d_model": transport.d_model,
        "metadata": {**said, "averaging": said.get("averaging", "querylens_fast: all valid positions, equally")},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as partial:
            torch.save(content, partial)
    except Exception as error:
        raise OSError(f"lens file could not be written to {str(path)!r}: {error}") from error
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"Jacobian-lens file {str(path)!r} does not exist")
    lens = read_checkpoint(path, "Jacobian-lens file", checksums=True)
    if isinstance(lens, dict) and "jacobian_sum" in lens:
        raise ValueError(
            f"{str(path)!r} is a checkpoint of an unfinished fit; load and save it with its own tool first"
        )
    if not isinstance(lens, dict) or not isinstance(lens.get("J"), dict) or not lens["J"]:
        raise ValueError(f"{str(path)!r} is no Jacobian lens: expected {{'J': {{layer: [d, d]}}, ...}}")
    return lens


def _matrices(path: Path, lens: dict[str, Any], model: Model) -> dict[int, Tensor]:
    """The matrix of each layer, [D, D] in float32 or wider; the last layer's is the identity."""
    try:
        found = {int(layer): matrix for layer, matrix in lens["J"].items()}
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = {}
    if len(found) != len(lens["J"]):
        shown = _text(list(lens["J"])[:4])
        raise ValueError(f"{str(path)!r}: 'J' has keys {shown}; expected layer numbers, each once")
    last, d = model.n_layers - 1, model.d_model
    beyond = sorted(layer for layer in found if not 0 <= layer <= last)
    if beyond:
        raise ValueError(f"{str(path)!r} has matrices for layers {_text(beyond)}; model {model.name!r} has 0 to {last}")
    checked = {layer: _checked(path, layer, matrix, d) for layer, matrix in found.items()}
    return checked | {last: torch.eye(d)}


def _checked(path: Path, layer: int, matrix: Any, d: int) -> Tensor:
    """The matrix in float32 (or wider), or a ValueError."""
    plain = isinstance(matrix, Tensor) and matrix.layout == torch.strided and matrix.device.type == "cpu"
    if not plain or not matrix.is_floating_point() or matrix.shape != (d, d):
        found = f"{list(matrix.shape)} of {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"{str(path)!r}: J of layer {layer} is {found}; expected floats [{d}, {d}], as the model has")
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{str(path)!r}: J of layer {layer} holds NaN or infinite values")
    return matrix


def _recorded(path: Path, lens: dict[str, Any], last: int) -> dict[str, str]:
    """The lens's own metadata as text.

    Raises:
        ValueError: It is no dict, or says that the lens carries to another layer than the last.
    """
    recorded = lens.get("metadata")
    if recorded is None:
        recorded = {}
    if not isinstance(recorded, dict):
        raise ValueError(f"{str(path)!r}: its metadata is a {type(recorded).__name__}; expected a dict")
    target = recorded.get("target_layer", lens.get("target_layer"))
    if target is not None and (type(target) is not int or target not in (last, -1)):
        raise ValueError(
            f"{str(path)!r} carries to layer {_text(target)}, not to the last ({last}): it does not lead to the readout"
        )
    return {_text(key): _text(value) for key, value in recorded.items()}


def _text(value: Any) -> str:
    """A value of a foreign file as text of bounded length: nested lists can be exponentially long."""
    if isinstance(value, bool | int | float | str):
        return str(value)[:TEXT_LENGTH]
    return _SHORT.repr(value)
