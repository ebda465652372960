"""Ablations: token_change and zero_out, the model run with the dictionary spliced in.

The reference sets one feature's activation to a value at every position, runs the model twice for each feature, and
averages the logits' difference over all positions, pads included. Here one clean pass serves every feature: the
spliced output changes by (value − activation) · decoder row, only the layers above are run again, for many features
at once, and since the unembedding is linear the mean over positions is taken before it: each feature ends as one
vector [D], read out by `streamed_topk`. (A model with a soft cap on its logits has to go through the logits.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.hook_points import parse_hook
from querylens_fast.dictionaries.sae import Coder
from querylens_fast.models.blocks import Masking
from querylens_fast.models.model import Model
from querylens_fast.models.norms import AnyNorm, Norm, at_least_float32
from querylens_fast.models.tokens import Tokens
from querylens_fast.transport.jacobians import Budget, batches

DeltaAt = Callable[[Tensor], Tensor]


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


def finish_many(model: Model, x: Tensor, point: int, last_only: bool = False) -> Tensor:
    """TEMP"""
    shape = x.shape
    x = x.flatten(0, 1)
    masking = Masking(None, (x.shape[0], x.shape[1]), x.device)
    end = 2 * model.n_layers
    for i in range(point, end):
        block = model.blocks[i // 2]
        if i == end - 1 and last_only:
            x = x[:, -1:]
        x = x + (block.mlp(x) if i % 2 else block.attention(x, masking))
    x = x[:, -1] if last_only else x
    return x.unflatten(0, shape[:2])


class Spliced:
    def __init__(self, s, true):
        self.s, self.point, self.clean, self.acts = s, s.point, true, s.acts

    def changed(self, features, alphas):
        if features is None:
            return self.s.finish(self.clean[None])
        delta = alphas[:, None, None, None] - self.acts[..., features].movedim(-1, 0)[..., None]
        return self.s.finish(self.clean + delta * self.s.direction(features))


def splice(model, dictionary, ids, error_term=True):
    s = _splice(model, dictionary, ids)
    pre, mid, final = model.residuals(ids)
    points = [x for pair in zip(pre, mid) for x in pair] + [final]
    return Spliced(s, points[s.point] if error_term and dictionary.kind != "neurons" else s.clean)


class _Splice:
    """The clean pass up to a dictionary, and what changing a feature does to the residual stream at ``point``."""

    def __init__(self, point: int, clean: Tensor, acts: Tensor, direction: DeltaAt, finish: DeltaAt) -> None:
        self.point, self.clean, self.acts, self.direction, self.finish = point, clean, acts, direction, finish

    def changed(self, features: Tensor | None, value: float) -> Tensor:
        """The stream at ``point`` with each feature set to value, [C, B, S, D]; features None: unchanged, C = 1."""
        if features is None:
            return self.finish(self.clean[None])
        delta = value - self.acts[..., features].movedim(-1, 0)[..., None]
        return self.finish(self.clean + delta * self.direction(features))


def _splice(model: Model, dictionary: Dictionary, ids: Tensor) -> _Splice:
    pre, mid, final = model.residuals(ids)
    layer = dictionary.layer
    block, before, middle = model.blocks[layer], pre[layer], mid[layer]
    after = pre[layer + 1] if layer + 1 < model.n_layers else final
    if dictionary.kind == "neurons":
        hidden = block.mlp.hidden(block.mlp.norm(middle))

        def mlp_output(mixed: Tensor) -> Tensor:
            return middle + block.mlp.post_norm(mixed)

        mixed = torch.nn.functional.linear(hidden, block.mlp.W_out, block.mlp.b_out)
        return _Splice(2 * layer + 2, mixed, hidden, lambda f: block.mlp.W_out.mT[f][:, None, None], mlp_output)
    coder = _coder_on(dictionary, model)
    read, write = _places(dictionary)
    inputs = {
        "hook_resid_pre": before,
        "hook_resid_mid": middle,
        "hook_mlp_in": middle,
        "hook_resid_post": after,
        "hook_mlp_out": after - middle,
        "hook_attn_out": middle - before,
    }
    x = _mlp_input(block.mlp.norm, middle, read) if read in ("mlp.hook_in", "ln2.hook_normalized") else inputs.get(read)
    base = {"hook_mlp_out": middle, "hook_attn_out": before}.get(write)
    point = {"hook_resid_pre": 0, "hook_resid_mid": 1, "hook_attn_out": 1}.get(write, 2) + 2 * layer
    if x is None or write not in inputs:
        raise ValueError(f"dictionary {dictionary.name!r} reads {read!r} and writes {write!r}: it cannot be spliced in")
    acts = coder.encode(x)
    scale, _ = coder.output_scale(x)
    # As sae-lens splices a transcoder in, and so the reference's answers: encoder and decoder, without the skip path.
    output = coder.decode(acts, x, skip=False)

    def direction(features: Tensor) -> Tensor:
        return coder.decoder_rows(features)[:, None, None] * scale

    return _Splice(point, output if base is None else base + output, acts, direction, lambda stream: stream)


def _mlp_input(norm: AnyNorm, middle: Tensor, read: str) -> Tensor:
    """The MLP's normed input; a hooked model's RMSNorm has its hook_normalized before the scale, LayerNorm after it."""
    if read == "ln2.hook_normalized" and isinstance(norm, Norm) and not norm.centred:
        norm = Norm(None, None, norm.eps, centred=False)
    return norm(middle)


def _coder_on(dictionary: Dictionary, model: Model) -> Coder:
    """The dictionary's coder on the model's device and dtype, kept for the next call."""
    key = (model.device, model.dtype)
    moved: dict[object, Coder] = vars(dictionary).setdefault("_moved_coders", {})
    if key not in moved:
        moved[key] = dictionary.coder.to(*key)
    return moved[key]


_PLACES = {"": "hook_resid_post", "output": "hook_resid_post", "mlp": "hook_mlp_out", "self_attn": "hook_attn_out"}


def _places(dictionary: Dictionary) -> tuple[str, str]:
    """(read, write) hook places; a transformers module name stands for the hook of its output."""
    read = (parse_hook(dictionary.hook_name) or (0, "hook_resid_post"))[1]
    write = (parse_hook(dictionary.hook_name_out or dictionary.hook_name) or (0, "hook_resid_post"))[1]
    read = {"mlp.input": "mlp.hook_in", "pre_feedforward_layernorm.output": "mlp.hook_in"}.get(read, read)
    return _PLACES.get(read, read), _PLACES.get(write, write)
