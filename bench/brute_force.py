"""Transport of one vector by brute force: derivatives of a transformers model's own forward pass, routing held fixed.

Never imports the product: it is what the product is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def decoder_layers(source: Any, n_layers: int) -> nn.ModuleList:
    """The model's decoder layers: the last list of that many modules that is in no other one."""
    lists = [(path, m) for path, m in source.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    return [m for path, m in lists if not any(path.startswith(f"{outer}.") for outer, _ in lists)][-1]


def hold_routing_fixed(source: Any) -> None:
    """Detach what every router of a mixture of experts gives."""
    for module in source.modules():
        names = {name: type(child).__name__ for name, child in module.named_children()}
        experts = any("expert" in f"{name} {kind}".lower() for name, kind in names.items())
        for name, kind in names.items():
            if "Router" in kind or "TopKGating" in kind or (name in ("gate", "router") and experts):
                getattr(module, name).register_forward_hook(lambda _m, _a, out: _detached(out))


def _detached(out: Any) -> Any:
    if isinstance(out, tuple | list):
        return type(out)(_detached(o) for o in out)
    return out.detach() if isinstance(out, Tensor) else out


class BruteForce:
    """One differentiable forward pass; ``inject`` [B, S, D] zeros are added to the stream at a chosen place."""

    def __init__(self, source: Any, n_layers: int, ids: Tensor, valid: Tensor) -> None:
        hold_routing_fixed(source)
        self.source, self.ids, self.valid = source, ids, valid
        self.layers = decoder_layers(source, n_layers)
        self.weight = valid[..., None].to(next(source.parameters()).dtype)

    def value(self, layer: int, v: Tensor) -> Tensor:
        """Mean over valid positions of the final stream's change when v is added after ``layer`` (−1: before 0)."""
        with torch.enable_grad():
            start, final = self._run(layer)
            seed = torch.zeros_like(final).requires_grad_()
            (pulled,) = torch.autograd.grad(final, start, seed, create_graph=True)
            (moved,) = torch.autograd.grad(pulled, seed, v * self.weight)
        return (moved * self.weight).sum((0, 1)) / self.weight.sum()

    def key(self, v: Tensor) -> Tensor:
        """Mean over valid positions of the gradient, before layer 0, of the final stream along v at valid positions."""
        with torch.enable_grad():
            start, final = self._run(-1)
            (moved,) = torch.autograd.grad(final, start, v * self.weight)
        return (moved * self.weight).sum((0, 1)) / self.weight.sum()

    def _run(self, layer: int) -> tuple[Tensor, Tensor]:
        found: dict[str, Tensor] = {}

        def add(x: Tensor) -> Tensor:
            found["start"] = torch.zeros_like(x).requires_grad_()
            return x + found["start"]

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (add(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": add(kwargs["hidden_states"])}

        def after(_module: nn.Module, _args: Any, out: Any) -> Any:
            return type(out)((add(out[0]), *out[1:])) if isinstance(out, tuple | list) else add(out)

        def last(_module: nn.Module, _args: Any, out: Any) -> None:
            found["final"] = out[0] if isinstance(out, tuple | list) else out

        hooks = [
            self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
            if layer < 0
            else self.layers[layer].register_forward_hook(after),
            self.layers[-1].register_forward_hook(last),
        ]
        mask = {} if bool(self.valid.all()) else {"attention_mask": self.valid.long()}
        try:
            self.source(input_ids=self.ids, use_cache=False, **mask)
        finally:
            for hook in hooks:
                hook.remove()
        return found["start"], found["final"]
