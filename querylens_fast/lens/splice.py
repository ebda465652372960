"""Splices: the model run with a dictionary's output in place of the activation that it models.

`splice` runs the layers below once; `Splice.changed` sets features to values, many at a time; `run_from` runs the
layers above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as nnf
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.hook_points import HookPoint
from querylens_fast.dictionaries.sae import Coder
from querylens_fast.models.blocks import Attention
from querylens_fast.models.model import Model
from querylens_fast.models.norms import AnyNorm, Norm
from querylens_fast.models.units import Beside


def run_from(model: Model, x: Tensor, point: int, ids: Tensor, *, last: int | None = None) -> Tensor:
    """Run the modules from a point of the residual stream to the end, on x [C, B, S, D] of the tokens ids [B, S].

    Returns the final residuals [C, B, S, D], or of the ``last`` positions only, [C, B, last, D].
    """
    C, B, S = x.shape[:3]
    x = x.flatten(0, 1)
    masking = model.masking(ids.repeat(C, 1))
    modules, wanted = 2 * model.n_layers, slice(0 if last is None else S - last, None)
    for i in range(point, modules):
        block = model.blocks[i // 2]
        if i == modules - 1 and model.own is None:
            x = x[:, wanted]  # an MLP sees one position at a time
        x = x + (block.mlp(x) if i % 2 else block.attention(x, masking))
    return (x[:, wanted] if x.shape[1] == S else x).unflatten(0, (C, B))


@dataclass(frozen=True)
class Splice:
    """The clean pass up to a dictionary, and what changing a feature does to the residual stream at ``point``.

    ``output`` [B, S, m] is what the dictionary writes, ``direction(features)`` [C, 1, 1, m] (times a scale of each
    position) what one unit of each feature adds to it, and ``stream`` turns outputs [C, B, S, m] into the stream.
    """

    point: int
    output: Tensor
    acts: Tensor
    direction: Callable[[Tensor], Tensor]
    stream: Callable[[Tensor], Tensor]

    def clean(self) -> Tensor:
        """The stream at ``point`` with no feature changed, [1, B, S, D]."""
        return self.stream(self.output[None])

    def changed(self, features: Tensor, values: Tensor | float) -> Tensor:
        """The stream at ``point`` with each feature [C] set to its value ([C] or one for all), [C, B, S, D]."""
        values = torch.as_tensor(values).to(self.output).reshape(-1, 1, 1, 1)
        delta = values - self.acts[..., features].movedim(-1, 0)[..., None]
        return self.stream(self.output + delta * self.direction(features))


def splice(model: Model, dictionary: Dictionary, ids: Tensor, error_term: bool = False) -> Splice:
    """Run the model on ids [B, S] up to a dictionary and put the dictionary's output in place of what it models.

    Args:
        model: The model.
        dictionary: A SAE or transcoder that can be run, or MLP neurons.
        ids: Token ids [B, S]; no padding mask is used.
        error_term: Add the difference between the model's own activation and the dictionary's output, so that nothing
            changes but what `Splice.changed` sets.

    Raises:
        ValueError: The dictionary reads or writes where nothing can be put in.
    """
    residuals = model.residuals(ids)
    sites = _Sites(model, dictionary.writes.layer, residuals)
    point, stream = sites.write(dictionary)
    if dictionary.kind == "neurons":
        mlp = sites.mlp
        hidden = mlp.hidden(mlp.norm(sites.middle))
        mixed = nnf.linear(hidden, mlp.W_out, mlp.b_out)
        to_stream = lambda y: sites.beside_mlp + mlp.post_norm(y)  # noqa: E731
        return Splice(point, mixed, hidden, lambda f: mlp.W_out.mT[f][:, None, None], to_stream)
    coder = _coder_on(dictionary, model)
    x = _Sites(model, dictionary.reads.layer, residuals).at(dictionary.reads, dictionary)
    acts = coder.encode(x)
    scale, _ = coder.output_scale(x)
    # As sae-lens splices a transcoder in, and so the reference's answers: encoder and decoder, without the skip path.
    output = sites.at(dictionary.writes, dictionary) if error_term else coder.decode(acts, x, skip=False)
    return Splice(point, output, acts, lambda f: coder.decoder_rows(f)[:, None, None] * scale, stream)


def encoder_at(model: Model, dictionary: Dictionary, ids: Tensor) -> Callable[[slice], Tensor]:
    """Run the model on ids [B, S]; returns positions → the dictionary's activations [B, P, n] there.

    Raises:
        ValueError: The dictionary reads where its activations cannot be taken.
    """
    sites = _Sites(model, dictionary.reads.layer, model.residuals(ids))
    if dictionary.kind == "neurons":
        mlp = sites.mlp
        return lambda part: mlp.hidden(mlp.norm(sites.middle[:, part]))
    coder, x = _coder_on(dictionary, model), sites.at(dictionary.reads, dictionary)
    if coder.architecture == "temporal":  # its codes depend on all positions before
        acts = coder.encode(x)
        return lambda part: acts[:, part]
    return lambda part: coder.encode(x[:, part])


class _Sites:
    """Clean activations of one layer, and what the stream becomes when something else stands in their place.

    Where attention and MLP are side by side, both read the stream before the layer (``middle`` is that too), and both
    are added at its end.
    """

    def __init__(self, model: Model, layer: int, residuals: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
        pre, mid, final = residuals
        self.model, self.layer, block = model, layer, model.blocks[layer]
        self.masking, self.attention, self.mlp = model.masking(pre[layer][..., 0]), block.attention, block.mlp
        self.before, self.middle = pre[layer], mid[layer]
        self.after = pre[layer + 1] if layer + 1 < model.n_layers else final
        self.beside_attention, self.beside_mlp, self.attention_to = self.before, self.middle, 1
        if isinstance(self.attention, Beside):
            self.attention, self.mlp = self.attention.attention, self.attention.mlp
            self.middle, self.attention_to = self.before, 2
            self.beside_attention = self.before + self.mlp(self.before)
            self.beside_mlp = self.before + self.attention(self.before, self.masking)

    def _check(self, hook: HookPoint) -> None:
        """Raise ValueError for a place inside a layer that is one unit and not of two known parts side by side."""
        apart = self.model.has_submodules or (self.attention_to == 2 and hook.site.name != "resid_mid")
        if not apart and hook.site.name not in ("resid_pre", "resid_post"):
            raise ValueError(
                f"{hook.name!r} is inside a layer, but model {self.model.name!r} has layers that are one unit: only "
                "resid_pre and resid_post can be read or written there"
            )

    def at(self, hook: HookPoint, dictionary: Dictionary) -> Tensor:
        """The model's own activation at a hook point of the dictionary, [B, S, m]."""
        self._check(hook)
        attention, mlp, to = self.attention, self.mlp, self.attention_to
        found = {
            "resid_pre": lambda: self.before,
            "resid_mid": lambda: self.middle,
            "mlp_in": lambda: self.middle,
            "resid_post": lambda: self.after,
            "attn_normed": lambda: _without_scale(attention.norm)(self.before),
            "attn_input": lambda: attention.norm(self.before),
            "z": self._mixed_values,
            "attn_raw": lambda: nnf.linear(self._mixed_values(), attention.W_O, attention.b_O),
            "attn_out": lambda: (self.middle if to == 1 else self.after) - self.beside_attention,
            "mlp_normed": lambda: _without_scale(mlp.norm)(self.middle),
            "mlp_input": lambda: mlp.norm(self.middle),
            "after_attn_norm": lambda: mlp.norm(self.middle),
            "mlp_post": lambda: mlp.hidden(mlp.norm(self.middle)),
            "mlp_raw": lambda: nnf.linear(mlp.hidden(mlp.norm(self.middle)), mlp.W_out, mlp.b_out),
            "mlp_out": lambda: self.after - self.beside_mlp,
        }.get(hook.site.name)
        if found is None:
            raise _cannot_splice(dictionary)
        return found()

    def write(self, dictionary: Dictionary) -> tuple[int, Callable[[Tensor], Tensor]]:
        """(the point of the stream that changes, the stream there for outputs [C, B, S, m] of the dictionary)."""
        self._check(dictionary.writes)
        attention, mlp, to = self.attention, self.mlp, self.attention_to
        found = {
            "resid_pre": (0, lambda y: y),
            "z": (
                to,
                lambda y: self.beside_attention + attention.post_norm(nnf.linear(y, attention.W_O, attention.b_O)),
            ),
            "attn_raw": (to, lambda y: self.beside_attention + attention.post_norm(y)),
            "attn_out": (to, lambda y: self.beside_attention + y),
            "resid_mid": (1, lambda y: y),
            "mlp_in": (2, lambda y: self.beside_mlp + mlp(y.flatten(0, 1)).unflatten(0, y.shape[:2])),
            "mlp_normed": (2, lambda y: self.beside_mlp + mlp.project(mlp.hidden(_scaled(mlp.norm, y)))),
            "mlp_input": (2, lambda y: self.beside_mlp + mlp.project(mlp.hidden(y))),
            "mlp_post": (2, lambda y: self.beside_mlp + mlp.project(y)),
            "mlp_raw": (2, lambda y: self.beside_mlp + mlp.post_norm(y)),
            "mlp_out": (2, lambda y: self.beside_mlp + y),
            "resid_post": (2, lambda y: y),
        }.get(dictionary.writes.site.name)
        if found is None:
            raise _cannot_splice(dictionary)
        return 2 * self.layer + found[0], found[1]

    def _mixed_values(self) -> Tensor:
        """Each head's values, mixed by its attention pattern: what W_O reads, [B, S, H·E]."""
        if not isinstance(self.attention, Attention):
            self.attention.refuse("activation at hook_z")
        linear = self.attention.linearise(self.before, self.masking)
        return self.attention._merge(linear.pattern @ linear.v)


def _cannot_splice(dictionary: Dictionary) -> ValueError:
    return ValueError(
        f"dictionary {dictionary.name!r} reads {dictionary.hook_name!r} and writes {dictionary.hook_name_out!r}: it "
        "cannot be spliced into the model"
    )


def _without_scale(norm: AnyNorm) -> AnyNorm:
    """The norm up to its hook_normalized, which lies before scale and bias."""
    return replace(norm, weight=None, bias=None) if isinstance(norm, Norm) else norm


def _scaled(norm: AnyNorm, x: Tensor) -> Tensor:
    """What the norm does after its hook_normalized."""
    if not isinstance(norm, Norm):
        return x
    x = x if norm.weight is None else x * norm.weight
    return x if norm.bias is None else x + norm.bias


_moved: WeakKeyDictionary[Coder, dict[object, Coder]] = WeakKeyDictionary()


def _coder_on(dictionary: Dictionary, model: Model) -> Coder:
    """The dictionary's coder on the model's device and dtype, kept for as long as the coder itself."""
    coder, key = dictionary.coder, (model.device, model.dtype)
    moved = _moved.setdefault(coder, {})
    if key not in moved:
        moved[key] = coder.to(*key)
    return moved[key]
