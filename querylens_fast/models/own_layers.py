"""A transformers causal LM's own decoder layers: found, traced, and called with the arguments of the model's own pass.

Everything works on a copy of the module tree that shares the weights, so the caller's modules keep their hooks,
settings and configuration. The layers are the `ModuleList` whose modules one forward pass goes through with states
[B, S, D]; the final norm and the head are what that pass calls after the last of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from querylens_fast.models.blocks import Masking
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.layer_arguments import Arguments, alike, repaired, split_call

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention", "linear_attn")
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2")
ROUTER_NAMES = ("gate", "router", "gating")
EAGER = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Configuration fields that choose kernels; only the eager ones can be differentiated twice."""


class Passes(NamedTuple):
    """One forward pass: what each layer was given, [B, S, D], its other arguments, and the last layer's output."""

    streams: list[Tensor]
    arguments: list[Arguments]
    final: Tensor


@dataclass(frozen=True)
class Trace:
    """The readout's modules as one forward pass called them.

    ``final_norm`` is what reads the last layer's output, and where others follow (the dense layer of a BERT's head),
    all of them in a sequence; None: there is none. ``normed`` [B, S, D] is what it gave, or the last layer.
    """

    final_norm: nn.Module | None
    normed: Tensor
    head_input: Tensor


class OwnLayers:
    """The decoder layers of a transformers causal LM, on a copy of its module tree that shares its weights.

    Raises:
        UnsupportedModelError: No list of layers takes a residual stream [B, S, D] in turn (the message says what was
            found), or the stream changes between two layers.
    """

    def __init__(self, source: Any, name: str) -> None:
        self.model = share(source)
        self._prepare(name)
        self.layers = self._find_layers()
        self.token_dependent = self._check_arguments()

    @classmethod
    def around(cls, model: Any, layers: list[nn.Module], name: str) -> OwnLayers:
        """Of a model that may be changed and whose layers are known already; nothing is checked."""
        made = cls.__new__(cls)
        made.model, made.layers = model.eval(), layers
        made._prepare(name)
        return made

    def _prepare(self, name: str) -> None:
        self.name, self.token_dependent = name, False
        for config in _configs(self.model):
            for field in EAGER:
                if field in vars(config):
                    setattr(config, field, "eager")
            if getattr(config, "use_cache", False):
                config.use_cache = False
        self.vocab_size = len(self.model.get_input_embeddings().weight)
        self.device = self.model.get_input_embeddings().weight.device
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        self._takes = {n for m in (self.model, decoder) for n in inspect.signature(m.forward).parameters}
        self._pass = lru_cache(maxsize=4)(self._pass)
        self.any_tokens = lru_cache(maxsize=4)(self._any_tokens)

    def __len__(self) -> int:
        return len(self.layers)

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """The copy's logits [B, S, V], under the padding mask ``valid`` if there is one."""
        given: dict[str, Any] = {"use_cache": False} if "use_cache" in self._takes else {}
        if valid is not None:
            given["attention_mask"] = valid.long()
            if "position_ids" in self._takes:
                given["position_ids"] = Masking(valid, (ids.shape[0], ids.shape[1]), ids.device).positions()
        with torch.no_grad():
            return self.model(input_ids=ids, **given).logits

    def passes(self, masking: Masking) -> Passes:
        """Streams and arguments of one forward pass over the masking's tokens (token 0 where it names none).

        The last four maskings' passes are kept: masks and rotary angles are the same for every direction.
        """
        if masking.ids is None and self.token_dependent:
            raise UnsupportedModelError(
                f"model {self.name!r} gives its layers inputs that depend on the tokens, so a changed residual stream "
                "cannot be run on from there without them"
            )
        return self._pass(self.any_tokens(masking.shape) if masking.ids is None and masking.valid is None else masking)

    def _pass(self, masking: Masking) -> Passes:
        ids = masking.ids
        if ids is None:
            ids = torch.zeros(masking.shape, dtype=torch.int64, device=self.device)
        streams: list[Tensor] = []
        arguments: list[Arguments] = []
        final: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, rest, named = split_call(args, kwargs)
            streams.append(x)
            arguments.append(repaired(rest, named))

        def after(_module: nn.Module, _args: Any, out: Any) -> None:
            final.append(first_tensor(out))

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(removing(layer.register_forward_pre_hook(before, with_kwargs=True)))
            hooks.enter_context(removing(self.layers[-1].register_forward_hook(after)))
            self.forward(ids, masking.valid)
        return Passes(streams, arguments, final[-1])

    def _any_tokens(self, shape: tuple[int, int]) -> Masking:
        """An unmasked pass over token 0, one object a shape, for what depends on neither tokens nor padding."""
        return Masking(None, shape, self.device, torch.zeros(shape, dtype=torch.int64, device=self.device))

    def call(self, layer: int, module: nn.Module, x: Tensor, masking: Masking) -> Tensor:
        """The output [B, S, D] of ``module`` (layer ``layer`` or a version of it) on x [B, S, D]."""
        given = self.passes(masking).arguments[layer]
        return first_tensor(module(x, *given.positional, **given.named))

    def front(self, ids: Tensor) -> Tensor:
        """The residual stream before layer 0, [B, S, D]; the layers are not run."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(split_call(args, kwargs)[0])
            raise _Reached

        with removing(self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)):
            try:
                self.forward(ids.to(self.device))
            except _Reached:
                pass
        return found[0]

    def trace(self, ids: Tensor) -> Trace:
        """Find the final norm and the head's input in one forward pass over ids [B, S]."""
        head = self.model.get_output_embeddings()
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        last: list[Tensor] = []
        given: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if module is self.layers[-1]:
                last.append(first_tensor(out))
            elif module is head:
                given.append(tensors[0])
            elif last and not given and tensors and isinstance(out, Tensor):
                calls.append((module, tensors[0], out))

        with ExitStack() as hooks:
            for module in self.model.modules():
                if id(module) not in inside or module is self.layers[-1]:
                    hooks.enter_context(removing(module.register_forward_hook(record, with_kwargs=True)))
            self.forward(ids)
        chain: list[nn.Module] = []
        state = last[0]
        for position, (module, x, out) in enumerate(calls):
            # A module is noted after those inside it: take the outermost of those that read the same.
            if same(x, state) and not any(same(x, later) for _, later, _ in calls[position + 1 :]):
                chain.append(module)
                state = out
        norm = nn.Sequential(*chain) if len(chain) > 1 else next(iter(chain), None)
        return Trace(norm, state, given[0] if given else last[0])

    def between_head_and_logits(self, ids: Tensor, values: Tensor) -> Tensor:
        """What the model makes of the head's output ``values`` [B, S, V] before it returns logits (scale, cap)."""
        head = self.model.get_output_embeddings()
        with removing(head.register_forward_hook(lambda _m, _a, _o: values)):
            return self.forward(ids)

    def _find_layers(self) -> list[nn.Module]:
        """The `ModuleList` whose modules a forward pass calls in turn with [B, S, D]; checked to chain."""
        called: dict[int, list[tuple[Tensor | None, Tensor | None]]] = {}

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            tensor = args[0] if args else kwargs.get("hidden_states")
            called.setdefault(id(module), []).append((tensor, first_tensor(out)))

        lists = [(path, m) for path, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        with ExitStack() as hooks:
            for module in {id(child): child for _, m in lists for child in m}.values():
                hooks.enter_context(removing(module.register_forward_hook(record, with_kwargs=True)))
            self.forward(probe_ids(self.vocab_size, self.device))
        ran = [(path, m) for path, m in lists if all(len(called.get(id(child), ())) == 1 for child in m)]
        outer = [(p, m) for p, m in ran if not any(p.startswith(other + ".") for other, _ in ran)]
        streams = [(p, m) for p, m in outer if all(_is_stream(*called[id(c)][0]) for c in m)]
        if len(streams) != 1:
            again = [p for p, m in lists if any(len(called.get(id(child), ())) > 1 for child in m)]
            more = f"; more than once a pass: {again}" if again else ""
            raise UnsupportedModelError(
                f"model {self.name!r} ({type(self.model).__name__}): no single list of layers takes one residual "
                f"stream [batch, positions, d_model] through it (lists that ran: {[p for p, _ in outer] or 'none'}"
                f"{more})"
            )
        layers = list(streams[0][1])
        for i in range(len(layers) - 1):
            out, following = called[id(layers[i])][0][1], called[id(layers[i + 1])][0][0]
            if out is None or following is None or not same(out, following):
                raise UnsupportedModelError(
                    f"model {self.name!r} ({type(self.model).__name__}) changes its residual stream between layers "
                    f"{i} and {i + 1}, so its layers alone do not carry a direction"
                )
        return layers

    def _check_arguments(self) -> bool:
        """Whether two sequences give the layers other arguments (token embeddings of their own, say).

        Raises:
            UnsupportedModelError: What a layer is given beside the stream depends on an earlier layer's output.
        """
        ids = probe_ids(self.vocab_size, self.device)
        shape = (ids.shape[0], ids.shape[1])
        first, second = (self._pass(Masking(None, shape, self.device, i)).arguments for i in (ids, ids.flip(-1)))

        def shifted(_module: nn.Module, _args: Any, out: Any) -> Any:
            x = first_tensor(out)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
            moved = x + noise * x.std()
            return type(out)((moved, *out[1:])) if isinstance(out, tuple | list) else moved

        with removing(self.layers[0].register_forward_hook(shifted)):
            third = self._pass(Masking(None, shape, self.device, ids))
        after_later = (*third.streams[2:], third.final)[: len(self.layers) - 1]
        for i, expected in enumerate(after_later, start=1):
            with torch.no_grad():
                found = first_tensor(self.layers[i](third.streams[i], *first[i].positional, **first[i].named))
            if not (found - expected).norm() <= 1e-3 * expected.norm():
                raise UnsupportedModelError(
                    f"model {self.name!r} ({type(self.model).__name__}): layer {i} reads what earlier layers hand it "
                    "beside the residual stream (keys and values or router states shared between layers), so the "
                    "stream alone does not carry a direction"
                )
        return not all(alike(a[:2], b[:2]) for a, b in zip(first, second, strict=True))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and the same numbers."""
    return a.shape == b.shape and torch.equal(a, b)


class _Reached(Exception):
    """Ends a forward pass before layer 0."""


def probe_ids(vocab_size: int, device: torch.device) -> Tensor:
    """Two sequences of twelve tokens, the same at every load."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (2, 12), generator=generator).to(device)


def share(module: Any) -> Any:
    """A copy of a module tree whose weights are the original's own memory, in evaluation mode, without gradients."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(module, memo).eval()


def routers(layer: nn.Module) -> Iterator[nn.Module]:
    """The routers of a layer's mixtures of experts: a module named so beside experts, or a class named so."""
    for module in layer.modules():
        children = dict(module.named_children())
        expert = any("expert" in name for name in children) or any(
            "Expert" in type(c).__name__ for c in children.values()
        )
        for name, child in children.items():
            if name in ROUTER_NAMES and (expert or name != "gate"):
                yield child


def child(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of the names under which the layer has a module."""
    return next((n for n in names if isinstance(getattr(layer, n, None), nn.Module)), None)


def first_tensor(out: Any) -> Tensor:
    """A module's hidden states among what it returned."""
    return out[0] if isinstance(out, tuple | list) else out


@contextmanager
def removing(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object in the module tree."""
    found = [getattr(m, "config", None) for m in model.modules()]
    found += [c.get_text_config() for c in found if hasattr(c, "get_text_config")]
    return list({id(c): c for c in found if c is not None and hasattr(c, "__dict__")}.values())


def _is_stream(given: Tensor | None, out: Tensor | None) -> bool:
    return (
        isinstance(given, Tensor)
        and isinstance(out, Tensor)
        and given.ndim == 3
        and given.shape == out.shape
        and given.is_floating_point()
    )
