"""What a module's output matrix reads: the heads' outputs of an attention (hook_z), the neurons of an MLP (hook_post).

Modules are numbered as in `transport.jacobians`: 2l is layer l's attention, 2l + 1 its MLP. Where a layer is one unit,
both lie in what stands for module 2l.
"""

from __future__ import annotations

from torch import Tensor

from querylens_fast.models.autodiff import AutodiffMLP, AutodiffPart
from querylens_fast.models.blocks import MLP, Attention
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.models.units import Beside, Nothing


def home(model: Model, module: int) -> int:
    """The module, of those that are linearised, in which ``module`` lies: itself, or the layer that is one unit."""
    return module - module % 2 if isinstance(model.blocks[module // 2].mlp, Nothing) else module


def output_weight(model: Model, module: int) -> Tensor:
    """The module's output matrix, [D, W]: W_O (W = heads · head width) or W_out (W = neurons).

    Raises:
        UnsupportedModelError: The module has no single one (a mixture of experts), or it is not recognised.
    """
    block = model.blocks[module // 2]
    part = block.mlp if home(model, module) % 2 else block.attention
    if isinstance(part, Beside):
        part = part.parts[module % 2]
    if isinstance(part, Attention):
        return part.W_O
    if isinstance(part, MLP):
        return part.W_out
    part = part.part if isinstance(part, AutodiffMLP) else part
    if isinstance(part, AutodiffPart):
        return part.output_weight(module)
    raise UnsupportedModelError(f"{part.name} has no single output matrix")
