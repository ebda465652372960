"""Load a causal language model, or adapt one that is already in memory.

`load_model` reads a transformers causal LM from a hub id or a local folder; `as_model` takes a transformers model or a
hooked model (transformer-lens, sae-lens) in memory, recognised by its attributes. Both compare the `Model`'s logits
with the source's own on a few tokens. Where the hand-written linearisation is missing or does not reproduce the model,
the model's own layers are differentiated instead, and that is said.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from querylens_fast.models.autodiff import from_autodiff
from querylens_fast.models.checks import check_finite_weights, check_reproduction, raise_not_finite
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.families import FAMILIES, from_transformers
from querylens_fast.models.fingerprint import behaviour
from querylens_fast.models.folders import load_source, load_tokenizer, parse_device, parse_dtype
from querylens_fast.models.frame import measured_frame, position_limit
from querylens_fast.models.hooked import from_hooked
from querylens_fast.models.model import Linearisation, Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.own_layers import OwnLayers, probe_ids
from querylens_fast.models.refusals import refuse_encoder, refuse_unusable
from querylens_fast.models.weights_only import load_weights_only
from querylens_fast.models.wrappers import unwrap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Adapted:
    """A model adapted before, kept as long as its source lives; it does not keep the source alive itself."""

    state: list[Any]
    """Of the source's weights and hooks then."""
    logits: Tensor
    bare: Model
    """Without its source."""
    whole: ref[Model]

    def answers(self, forward: Callable[[Tensor], Tensor]) -> bool:
        """Whether the source still gives the logits it gave: guards against a change that its state does not show."""
        with torch.no_grad():
            found = _probe(forward, self.bare)
        return found.shape == self.logits.shape and bool((found - self.logits).norm() <= 1e-6 * self.logits.norm())

    def model(self, source: nn.Module) -> Model:
        """The model with its source again; its fingerprint is taken anew."""
        known = self.whole()
        if known is None:
            known = copy.copy(self.bare)
            known.source = source
        vars(known).pop("fingerprint", None)
        return known


_adapted: WeakKeyDictionary[nn.Module, dict[str, _Adapted]] = WeakKeyDictionary()


@torch.no_grad()
def load_model(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    linearisation: Linearisation = "auto",
) -> Model:
    """Load a transformers causal LM. Code that comes with a model is never run.

    Args:
        model: A hub id ("openai-community/gpt2") or a local folder with config.json and weights.
        device: Where its weights live.
        dtype: "float32", "float64", "bfloat16" or "float16".
        tokenizer: Another place to take the tokenizer from; by default the model's own.
        revision: A hub revision.
        linearisation: "hand-written" for the architectures in `families.FAMILIES`; "autodiff" differentiates the
            model's own layers, at two to three times the cost; "auto" takes the first where it reproduces the model's
            logits and else, with a warning, the second. "none" reads the embedding, the unembedding and the final norm
            alone: identity presets and imported transports need no more.

    Raises:
        FileNotFoundError: The folder or hub id cannot be had.
        UnsupportedModelError: The architecture is not supported (the message says why).
        ValueError: Files are damaged or do not fit together.
        TypeError: ``model`` is no name or folder.
    """
    _check_linearisation(linearisation)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a hub id or a folder. A model in memory needs no loading: "
            "pass it where a model is asked for, or to as_model"
        )
    name, torch_dtype, place = str(model), parse_dtype(dtype), parse_device(device)
    if linearisation == "none":
        return load_weights_only(name, torch_dtype, place, tokenizer, revision)
    source = load_source(name, torch_dtype, revision).to(place).eval().requires_grad_(False)
    loaded_tokenizer = load_tokenizer(tokenizer or name, revision, required=bool(tokenizer))
    loaded = _adapt(source, name, loaded_tokenizer, linearisation)
    check_finite_weights(loaded)
    return loaded


def as_model(model: Any, tokenizer: Any = None, linearisation: Linearisation = "auto") -> Model:
    """A `Model` from one already in memory: a `Model`, a transformers causal LM or a hooked model.

    Wrappers (torch.compile, DataParallel, nnsight, nnterp, an unprocessed TransformerBridge) are taken off; their
    tokenizer is kept. The object is never changed; its weights are shared. ``linearisation`` is that of `load_model`,
    for a transformers model.

    Raises:
        UnsupportedModelError: It is none of these, or is refused by name (`refusals`).
    """
    _check_linearisation(linearisation)
    if isinstance(model, Model):
        return model
    if linearisation == "none":
        raise ValueError("linearisation is 'none', which is for load_model; a model in memory has its layers")
    model, wrapper = unwrap(model), model
    if tokenizer is None and wrapper is not model:
        tokenizer = getattr(wrapper, "tokenizer", None)
    hooked = hasattr(model, "cfg") and hasattr(model, "blocks") and hasattr(model, "W_E")
    if not isinstance(model, nn.Module) or not (
        hooked or (hasattr(model, "config") and hasattr(model, "get_input_embeddings"))
    ):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}; expected the result of load_model, a transformers causal LM, "
            "or a hooked model with .cfg, .blocks and .W_E"
        )
    forward = model if hooked else _logits_of(model)
    state = _state_of(model)
    kept = _adapted.get(model, {}).get(linearisation)
    if kept is not None and tokenizer in (None, kept.bare.tokenizer) and kept.state == state and kept.answers(forward):
        return kept.model(model)
    with torch.no_grad():
        if hooked:
            loaded = from_hooked(model)
            logits = _probe(forward, loaded)
            check_reproduction(loaded, logits)
            loaded.behaviour = behaviour(logits)
        else:
            name = str(getattr(model.config, "_name_or_path", "") or "")
            if tokenizer is None and name:
                tokenizer = load_tokenizer(name, None, required=False)
            loaded = _adapt(model, name or type(model).__name__, tokenizer, linearisation)
            logits = _probe(forward, loaded)
    # Adapted once: a reference-style caller passes the same object for each feature and module.
    _adapted.setdefault(model, {})[linearisation] = _Adapted(state, logits, replace(loaded, source=None), ref(loaded))
    return loaded


def _adapt(source: Any, name: str, tokenizer: Any, linearisation: Linearisation) -> Model:
    """A `Model` over a transformers causal LM's weights, by hand or by autodiff, checked against its own logits."""
    refuse_unusable(source, name)
    loaded = _linearised(source, name, tokenizer, linearisation)
    loaded.max_positions = position_limit(source)
    return loaded


def _linearised(source: Any, name: str, tokenizer: Any, linearisation: Linearisation) -> Model:
    config = source.config.get_text_config()
    forward = _logits_of(source)
    weight = source.get_input_embeddings().weight
    ids = probe_ids(len(weight), weight.device)
    try:
        theirs = at_least_float32(forward(ids))
    except Exception as error:
        raise UnsupportedModelError(
            f"model {name!r} ({config.model_type}) fails in its own forward pass over {list(ids.shape)} tokens "
            f"({type(error).__name__}: {error})"
        ) from error
    if not bool(torch.isfinite(theirs).all()):
        raise_not_finite(source, _layout(source, name), name)
    refuse_encoder(forward, ids, theirs, name, weight.dtype)
    reason = f"no linearisation is written out for its type {config.model_type!r}"
    if linearisation == "hand-written" or (linearisation == "auto" and config.model_type in FAMILIES):
        try:
            loaded = from_transformers(source, name, tokenizer)
            check_reproduction(loaded, theirs)
            loaded.behaviour = behaviour(theirs)
            return loaded
        except (UnsupportedModelError, AttributeError, KeyError, TypeError, RuntimeError) as error:
            if linearisation == "hand-written":
                raise _as_unsupported(error, name) from error
            reason = f"the linearisation written out for its type does not reproduce it ({error})"
    own = OwnLayers(source, name)
    loaded = from_autodiff(measured_frame(source, own, name, tokenizer), own)
    check_reproduction(loaded, theirs)
    loaded.layout = _layout(source, name)
    loaded.behaviour = behaviour(theirs)
    level = logging.INFO if linearisation == "autodiff" else logging.WARNING
    logger.log(level, "%s: linearised by autodiff through its own layers%s", name, _why(loaded, reason, linearisation))
    return loaded


def _why(loaded: Model, reason: str, linearisation: Linearisation) -> str:
    parts = [] if linearisation == "autodiff" else [f": {reason}"]
    if not loaded.has_submodules:
        parts.append("; each layer is one unit, so resid_mid points, the first order and single modules are refused")
    if loaded.own.token_dependent:
        parts.append("; what its layers read beside the stream (embeddings of their own) is held fixed")
    if loaded.W_E.data_ptr() != loaded.raw_embedding.data_ptr():
        parts.append("; token embeddings are taken as they enter layer 0, alone at position 0")
    if loaded.mixture_of_experts:
        parts.append("; the experts' routing is held fixed")
    return "".join(parts)


def _layout(source: Any, name: str) -> Model | None:
    """The model with the hand-written blocks of a known family, unchecked; None elsewhere."""
    try:
        return from_transformers(source, name, None)
    except (UnsupportedModelError, AttributeError, KeyError, TypeError, RuntimeError):
        return None


def _as_unsupported(error: Exception, name: str) -> UnsupportedModelError:
    if isinstance(error, UnsupportedModelError):
        return error
    return UnsupportedModelError(f"model {name!r} does not have the modules of its type ({error})")


def _state_of(model: nn.Module) -> list[Any]:
    """What changes when a module's weights or hooks do: trained, replaced, processed, moved, cast, hooked."""
    weights = [
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device, t.shape)
        for t in (*model.parameters(), *model.buffers())
    ]
    hooks = [
        (i, tuple(map(id, (*m._forward_hooks.values(), *m._forward_pre_hooks.values(), vars(m).get("forward")))))
        for i, m in enumerate(model.modules())
        if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
    ]
    return [weights, hooks, model.training]


def _probe(forward: Callable[[Tensor], Tensor], model: Model) -> Tensor:
    return at_least_float32(forward(probe_ids(len(model.W_E), model.device))).detach()


def _logits_of(source: Any) -> Callable[[Tensor], Tensor]:
    """A transformers model's plain forward pass."""

    def forward(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return source(input_ids=ids, use_cache=False).logits

    return forward


def _check_linearisation(linearisation: str) -> None:
    if linearisation not in get_args(Linearisation):
        raise ValueError(f"linearisation is {linearisation!r}; expected one of {', '.join(get_args(Linearisation))}")
