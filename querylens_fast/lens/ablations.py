"""Ablations: token_change and zero_out, the model run with the dictionary spliced in.

The reference sets one feature's activation to a value at every position, runs the model twice for each feature, and
averages the logits' difference over all positions, pads included. Here one clean pass serves every feature: the
spliced output changes by (value − activation) · decoder row, only the layers above are run again, for many features
at once, and since the unembedding is linear the mean over positions is taken before it: each feature ends as one
vector [D], read out by `streamed_topk`. (A model with a soft cap on its logits has to go through the logits.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as nnf
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.sae import Coder
from querylens_fast.models.blocks import Masking
from querylens_fast.models.model import Model
from querylens_fast.models.norms import AnyNorm, Norm, at_least_float32
from querylens_fast.models.tokens import Tokens
from querylens_fast.transport.jacobians import Budget, batches


@torch.no_grad()
def ablate(
    model: Model,
    tokens: Tokens,
    dictionary: Dictionary,
    features: Tensor,
    value: float,
    invert_sign: bool = False,
    max_memory_gib: float = 2.0,
) -> Tensor:
    """Mean change when each feature's activation is set to ``value`` everywhere (paper §4 baselines).

    Args:
        model: The model.
        tokens: The sample; every position counts, pads included, and no padding mask is used.
        dictionary: A SAE or transcoder that can be run, or MLP neurons.
        features: Feature ids [n].
        value: The activation they are set to (token_change: 10; zero_out: 0).
        invert_sign: clean − changed instead of changed − clean (zero_out).
        max_memory_gib: Bound on the working memory.

    Returns:
        Differences of normed final residuals [n, D], to be read out by W_U; for a model with a logit soft cap,
        differences of logits [n, V].
    """
    budget = Budget.plan(model, tokens.ids.shape[1], max_memory_gib)
    width = model.d_model if model.logit_softcap is None else model.vocab_size
    dtype = torch.promote_types(model.dtype, torch.float32)
    total = torch.zeros(len(features), width, dtype=dtype, device=model.device)
    for rows in batches(len(tokens.ids), budget.rows):
        ids = tokens.ids[rows].to(model.device)
        splice = _splice(model, dictionary, ids)
        clean = _finish(model, splice.changed(None, value)[0], splice.point)
        for chosen in batches(len(features), budget.directions):
            changed = splice.changed(features[chosen].to(model.device), value)
            for i, residual in zip(
                range(chosen.start, chosen.stop), _finish_many(model, changed, splice.point), strict=True
            ):
                total[i] += _output_sum(model, residual, clean)
    mean = total / tokens.ids.numel()
    return -mean if invert_sign else mean


@torch.no_grad()
def activations(model: Model, dictionary: Dictionary, ids: Tensor) -> Tensor:
    """The activations [B, S, n] of a dictionary's features on ids [B, S], from a plain forward pass."""
    return _splice(model, dictionary, ids).acts


def _output_sum(model: Model, changed: Tensor, clean: Tensor) -> Tensor:
    """Σ over positions of the change in normed residuals, or in logits where they are capped."""
    normed, reference = (model.final_norm(x) for x in (changed, clean))
    if model.logit_softcap is None:
        return at_least_float32(normed - reference).sum((0, 1))
    total = torch.zeros(model.vocab_size, dtype=torch.promote_types(model.dtype, torch.float32), device=model.device)
    for now, before in zip(normed, reference, strict=True):
        total += at_least_float32(model.cap(model.unembed(now)) - model.cap(model.unembed(before))).sum(0)
    return total


def _finish(model: Model, x: Tensor, point: int) -> Tensor:
    """Run the modules from a point to the end on x [B, S, D]."""
    masking = Masking(None, (x.shape[0], x.shape[1]), x.device)
    for i in range(point, 2 * model.n_layers):
        block = model.blocks[i // 2]
        x = x + (block.mlp(x) if i % 2 else block.attention(x, masking))
    return x


def _finish_many(model: Model, x: Tensor, point: int) -> Tensor:
    """`_finish` on [C, B, S, D] at once."""
    return _finish(model, x.flatten(0, 1), point).unflatten(0, x.shape[:2])


@dataclass(frozen=True)
class _Splice:
    """The clean pass up to a dictionary, and what changing a feature does to the residual stream at ``point``.

    ``output`` [B, S, m] is what the dictionary writes, ``direction(features)`` [C, 1, 1, m] (times a scale of each
    position) what one unit of each feature adds to it, and ``stream`` turns outputs [C, B, S, m] into the stream.
    """

    point: int
    output: Tensor
    acts: Tensor
    direction: Callable[[Tensor], Tensor]
    stream: Callable[[Tensor], Tensor]

    def changed(self, features: Tensor | None, value: float) -> Tensor:
        """The stream at ``point`` with each feature set to value, [C, B, S, D]; features None: unchanged, C = 1."""
        if features is None:
            return self.stream(self.output[None])
        delta = value - self.acts[..., features].movedim(-1, 0)[..., None]
        return self.stream(self.output + delta * self.direction(features))


def _splice(model: Model, dictionary: Dictionary, ids: Tensor) -> _Splice:
    residuals = model.residuals(ids)
    sites = _Sites(model, dictionary.writes.layer, residuals)
    point, stream = sites.write(dictionary)
    if dictionary.kind == "neurons":
        mlp = sites.block.mlp
        hidden = mlp.hidden(mlp.norm(sites.middle))
        mixed = nnf.linear(hidden, mlp.W_out, mlp.b_out)
        to_stream = lambda y: sites.middle + mlp.post_norm(y)  # noqa: E731
        return _Splice(point, mixed, hidden, lambda f: mlp.W_out.mT[f][:, None, None], to_stream)
    coder = _coder_on(dictionary, model)
    x = _Sites(model, dictionary.reads.layer, residuals).read(dictionary)
    acts = coder.encode(x)
    scale, _ = coder.output_scale(x)
    # As sae-lens splices a transcoder in, and so the reference's answers: encoder and decoder, without the skip path.
    output = coder.decode(acts, x, skip=False)
    return _Splice(point, output, acts, lambda f: coder.decoder_rows(f)[:, None, None] * scale, stream)


class _Sites:
    """Clean activations of one layer, and what the stream becomes when something else stands in their place."""

    def __init__(self, model: Model, layer: int, residuals: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
        pre, mid, final = residuals
        self.layer, self.block, self.masking = layer, model.blocks[layer], model.masking(pre[layer][..., 0])
        self.before, self.middle = pre[layer], mid[layer]
        self.after = pre[layer + 1] if layer + 1 < model.n_layers else final

    def read(self, dictionary: Dictionary) -> Tensor:
        """What the dictionary reads, [B, S, m]."""
        attention, mlp = self.block.attention, self.block.mlp
        found = {
            "resid_pre": lambda: self.before,
            "resid_mid": lambda: self.middle,
            "mlp_in": lambda: self.middle,
            "resid_post": lambda: self.after,
            "attn_normed": lambda: _without_scale(attention.norm)(self.before),
            "attn_input": lambda: attention.norm(self.before),
            "z": self._mixed_values,
            "attn_raw": lambda: nnf.linear(self._mixed_values(), attention.W_O, attention.b_O),
            "attn_out": lambda: self.middle - self.before,
            "mlp_normed": lambda: _without_scale(mlp.norm)(self.middle),
            "mlp_input": lambda: mlp.norm(self.middle),
            "after_attn_norm": lambda: mlp.norm(self.middle),
            "mlp_post": lambda: mlp.hidden(mlp.norm(self.middle)),
            "mlp_raw": lambda: nnf.linear(mlp.hidden(mlp.norm(self.middle)), mlp.W_out, mlp.b_out),
            "mlp_out": lambda: self.after - self.middle,
        }.get(dictionary.reads.site.name)
        if found is None:
            raise _cannot_splice(dictionary)
        return found()

    def write(self, dictionary: Dictionary) -> tuple[int, Callable[[Tensor], Tensor]]:
        """(the point of the stream that changes, the stream there for outputs [C, B, S, m] of the dictionary)."""
        attention, mlp = self.block.attention, self.block.mlp
        found = {
            "resid_pre": (0, lambda y: y),
            "z": (1, lambda y: self.before + attention.post_norm(nnf.linear(y, attention.W_O, attention.b_O))),
            "attn_raw": (1, lambda y: self.before + attention.post_norm(y)),
            "attn_out": (1, lambda y: self.before + y),
            "resid_mid": (1, lambda y: y),
            "mlp_in": (2, lambda y: self.middle + mlp(y.flatten(0, 1)).unflatten(0, y.shape[:2])),
            "mlp_normed": (2, lambda y: self.middle + mlp.project(mlp.hidden(_scaled(mlp.norm, y)))),
            "mlp_input": (2, lambda y: self.middle + mlp.project(mlp.hidden(y))),
            "mlp_post": (2, lambda y: self.middle + mlp.project(y)),
            "mlp_raw": (2, lambda y: self.middle + mlp.post_norm(y)),
            "mlp_out": (2, lambda y: self.middle + y),
            "resid_post": (2, lambda y: y),
        }.get(dictionary.writes.site.name)
        if found is None:
            raise _cannot_splice(dictionary)
        return 2 * self.layer + found[0], found[1]

    def _mixed_values(self) -> Tensor:
        """Each head's values, mixed by its attention pattern: what W_O reads, [B, S, H·E]."""
        linear = self.block.attention.linearise(self.before, self.masking)
        return self.block.attention._merge(linear.pattern @ linear.v)


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
