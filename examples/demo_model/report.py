"""The figures of the training report, measured on what was saved."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .corpus import LICENCE, Bigram, Document, bigram_loss, chunks, spread_sample
from .dictionaries import Dictionary, quality
from .language_model import edited, model_loss


class Text(NamedTuple):
    """The corpus as the training sees it.

    Attributes:
        documents: what was read, sorted by name.
        train: [N] int64.
        held_out: [N] int64.
        bigram: fitted to `train`.
    """

    documents: list[Document]
    train: Tensor
    held_out: Tensor
    bigram: Bigram


def language_model_report(model: GPT2LMHeadModel, text: Text, sample: Tensor) -> dict[str, Any]:
    """Losses in nats a token over rows of the model's context and on the sample; a row's first isn't predicted."""
    held_out = chunks(text.held_out, model.config.n_positions)
    held_out_loss = model_loss(model, held_out)
    held_out_bytes = sum(len(d.text.encode()) for d in text.documents if d.held_out)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": model_loss(model, spread_sample(text.train, len(held_out), model.config.n_positions)),
        "held_out_loss": held_out_loss,
        "held_out_bits_per_byte": held_out_loss * len(text.held_out) / math.log(2) / held_out_bytes,
        "bigram_held_out_loss": bigram_loss(text.bigram, held_out),
        "sample_loss": model_loss(model, sample),
        "sample_bigram_loss": bigram_loss(text.bigram, sample),
    }


def without_first(kept: Tensor) -> Tensor:
    """All positions of [B, S, D] but the first of each row, as [N, D].

    At the first position the model can attend to nothing else: its activations are a function of one token alone, and
    models often park outliers there. Dictionaries are neither trained nor measured on it.
    """
    return kept[:, 1:].flatten(0, 1)


def dictionary_report(
    dictionary: Dictionary, known: dict[str, Tensor], held_out: dict[str, Tensor], tokens: int = 400_000
) -> dict[str, Any]:
    """Figures on held-out text; a feature is dead if no token of it nor of `tokens` training tokens makes it active."""
    hook, hook_out = dictionary.hook_name, dictionary.hook_name_out or dictionary.hook_name
    result = quality(dictionary, without_first(held_out[hook]), without_first(held_out[hook_out]))
    with_first = quality(dictionary, held_out[hook].flatten(0, 1), held_out[hook_out].flatten(0, 1))
    inputs, targets = without_first(known[hook])[:tokens], without_first(known[hook_out])[:tokens]
    fired = result.fired | quality(dictionary, inputs, targets).fired
    norms = held_out[hook].float().norm(dim=-1).mean(dim=0)
    return {
        "hook_name": hook,
        "hook_name_out": dictionary.hook_name_out,
        "features": len(fired),
        "threshold": float(dictionary.threshold[0]),
        "l0": result.l0,
        "explained_variance": result.explained_variance,
        "explained_variance_with_first_position": with_first.explained_variance,
        "dead_fraction": float((~fired).float().mean()),
        "dead_tokens": len(inputs) + len(without_first(held_out[hook])),
        "first_position_norm_ratio": float(norms[0] / norms[1:].mean()),
    }


def splice_report(model: GPT2LMHeadModel, dictionary: Dictionary, sample: Tensor) -> dict[str, float]:
    """Loss on the sample with the reconstruction in place of the activation, at every position but the first.

    `loss_recovered` is (zero − spliced) / (zero − clean), zero being the loss with zeros in place of the activation.
    """
    read: list[Tensor] = []

    def keep(inputs: Tensor) -> Tensor:
        read[:] = [inputs]
        return inputs

    def spliced(replacement: Callable[[Tensor], Tensor]) -> float:
        def replace(output: Tensor) -> Tensor:
            inputs = read[0] if dictionary.hook_name_out else output
            return torch.cat([output[:, :1], replacement(inputs)[:, 1:]], dim=1)

        edits = {dictionary.hook_name: keep} if dictionary.hook_name_out else {}
        with edited(model, {**edits, dictionary.hook_name_out or dictionary.hook_name: replace}):
            return model_loss(model, sample)

    clean = model_loss(model, sample)
    loss = spliced(lambda inputs: dictionary.decode(dictionary.encode(inputs)))
    zero = spliced(torch.zeros_like)
    return {
        "loss_clean": clean,
        "loss_spliced": loss,
        "loss_zero": zero,
        "loss_recovered": (zero - loss) / (zero - clean),
    }


def corpus_report(text: Text, digest: str) -> dict[str, Any]:
    """What was read, how it was split, and under which licence it stands."""
    held_out = [d for d in text.documents if d.held_out]
    known = [d for d in text.documents if not d.held_out]
    return {
        "source": f"standard library of Python {platform.python_version()}: source, docstrings, language reference",
        "licence": f"Python Software Foundation License Version 2 ({LICENCE})",
        "sha256": digest,
        "train": {"documents": len(known), "characters": sum(len(d.text) for d in known), "tokens": len(text.train)},
        "held_out": {
            "documents": len(held_out),
            "characters": sum(len(d.text) for d in held_out),
            "tokens": len(text.held_out),
            "names": [d.name for d in held_out],
        },
    }


def plain(value: Any) -> Any:
    """Named tuples as dictionaries, for JSON."""
    return {name: plain(each) for name, each in value._asdict().items()} if hasattr(value, "_asdict") else value
