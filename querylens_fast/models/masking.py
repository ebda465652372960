"""Which keys a query sees, and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Masking:
    """Which key a query may see, and where each token sits.

    ``valid`` [B, S] bool is the padding mask of the Jacobians (None: the plain forward pass, everything valid).
    Rotary positions count valid tokens only; causal and sliding windows go by index. ``ids`` [B, S] are the tokens, for
    models whose layers read them beside the stream.
    """

    valid: Tensor | None
    shape: tuple[int, int]
    device: torch.device
    ids: Tensor | None = None

    def positions(self) -> Tensor:
        """Rotary position of each token, [B, S] int64."""
        if self.valid is None:
            return torch.arange(self.shape[1], device=self.device).expand(self.shape)
        return (self.valid.long().cumsum(-1) - 1).clamp_min(0)

    def visible(self, window: int | None) -> Tensor:
        """[B or 1, 1, S, S] bool: may query (second-last axis) attend to key (last axis)?"""
        index = torch.arange(self.shape[1], device=self.device)
        distance = index[:, None] - index[None, :]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        seen = seen[None, None]
        return seen if self.valid is None else seen & self.valid[:, None, None, :]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first cos.shape[-1] coordinates of x [..., S, E] by the angles; the rest stays."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat((turn(turned, cos, sin), rest), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `turn`."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat((turn_back(turned, cos, sin), rest), dim=-1)
    first, second = (x * sin).chunk(2, dim=-1)
    return x * cos + torch.cat((second, -first), dim=-1)
