"""Sparse autoencoders and transcoders in plain torch, written in sae-lens's own format.

Training is BatchTopK (Bussmann et al., 2024): the k·B largest activations of a batch are kept, so a token may use more
or fewer than k features. What ships is the JumpReLU dictionary it amounts to, whose one threshold is the mean batch
threshold at the end of training. Features that fell silent learn from what the others leave over (the auxiliary loss of
Gao et al., 2024). Inputs are centred and scaled for training, and both are folded into the weights afterwards.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm


class DictionarySize(NamedTuple):
    """Shape and training length of a dictionary.

    Attributes:
        features: F.
        k: mean number of active features a token, in training.
        batch: tokens a step.
        steps: optimiser steps.
        learning_rate: its peak.
    """

    features: int = 2048
    k: int = 32
    batch: int = 2048
    steps: int = 1200
    learning_rate: float = 2.5e-3


class Dictionary(NamedTuple):
    """A JumpReLU sparse autoencoder or transcoder, D wide with F features, in the units of the model's activations.

    Attributes:
        hook_name: the activation it reads.
        hook_name_out: the activation it writes; None for an autoencoder, which writes what it reads.
        W_enc: [D, F].
        b_enc: [F].
        W_dec: [F, D], rows of unit norm.
        b_dec: [D]; an autoencoder subtracts it from its input too.
        threshold: [F], positive: a feature is active where its pre-activation exceeds it.
    """

    hook_name: str
    hook_name_out: str | None
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor

    def encode(self, inputs: Tensor) -> Tensor:
        """Feature activations [..., F] of inputs [..., D]."""
        centred = inputs if self.hook_name_out else inputs - self.b_dec
        pre = centred @ self.W_enc + self.b_enc
        return pre * (pre > self.threshold)

    def decode(self, features: Tensor) -> Tensor:
        """Reconstruction [..., D] of feature activations [..., F]."""
        return features @ self.W_dec + self.b_dec


class Quality(NamedTuple):
    """How well a dictionary does on a set of tokens.

    Attributes:
        l0: mean number of active features a token.
        explained_variance: 1 − (squared error / squared distance to the mean target).
        fired: [F] bool, features active on at least one token.
    """

    l0: float
    explained_variance: float
    fired: Tensor


def train_dictionary(
    inputs: Tensor, targets: Tensor, hook_name: str, hook_name_out: str | None, size: DictionarySize, seed: int
) -> Dictionary:
    """Trains a transcoder from inputs to targets or, where `hook_name_out` is None, an autoencoder.

    Args:
        inputs: [N, D] activations, any float dtype.
        targets: [N, D] activations to reconstruct; `inputs` itself for an autoencoder.
        hook_name: the activation `inputs` was taken from.
        hook_name_out: the activation `targets` was taken from, or None.
        size: shape and training length.
        seed: draws the initial weights and the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    mean_in, scale_in = _centre_and_scale(inputs)
    mean_out, scale_out = _centre_and_scale(targets)

    directions = torch.randn(size.features, width, generator=generator)
    W_dec = (directions / directions.norm(dim=1, keepdim=True)).requires_grad_()
    W_enc = W_dec.detach().T.clone().requires_grad_()
    b_enc, b_dec = torch.zeros(size.features, requires_grad=True), torch.zeros(width, requires_grad=True)
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=size.learning_rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, size.steps))
    silent_steps = torch.zeros(size.features, dtype=torch.long)
    thresholds: list[float] = []

    with tqdm(range(size.steps), desc=hook_name_out or hook_name, unit="step", mininterval=5) as bar:
        for _ in bar:
            rows = torch.randint(len(inputs), (size.batch,), generator=generator)
            x = (inputs[rows].float() - mean_in) / scale_in
            y = x if hook_name_out is None else (targets[rows].float() - mean_out) / scale_out
            # bfloat16 for the products only: what is compared and summed stays in float32.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pre = (x - b_dec if hook_name_out is None else x) @ W_enc
            acts = torch.relu(pre.float() + b_enc)
            threshold = _batch_threshold(acts.detach(), size.k)
            kept = acts * (acts > threshold)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                reconstruction = kept @ W_dec
            error = y - (reconstruction.float() + b_dec)
            loss = error.square().mean()
            silent = (silent_steps > max(20, size.steps // 20)).nonzero().flatten()
            # A transcoder's silent features may be below zero on every token, where the ReLU passes no gradient.
            reach = acts if hook_name_out is None else pre.float() + b_enc
            total = loss + _silent_loss(reach, W_dec, silent, error.detach()) / 32 if len(silent) else loss

            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=1, keepdim=True)
                silent_steps = torch.where((kept > 0).any(dim=0), 0, silent_steps + 1)
            thresholds.append(threshold)
            bar.set_postfix(loss=f"{loss.item():.4f}", silent=len(silent), refresh=False)

    last = thresholds[-max(1, size.steps // 10) :]
    with torch.no_grad():
        encoder = W_enc * (scale_out / scale_in)
        # An autoencoder subtracts the mean through b_dec; a transcoder, which has none on its input, through b_enc.
        b_enc = b_enc * scale_out - (mean_in @ encoder if hook_name_out else 0)
        threshold = torch.full((size.features,), sum(last) / len(last)) * scale_out
        decoder_bias = b_dec * scale_out + mean_out
        return Dictionary(hook_name, hook_name_out, encoder, b_enc, W_dec.detach(), decoder_bias, threshold)


def _centre_and_scale(activations: Tensor) -> tuple[Tensor, float]:
    """Mean [D] of [N, D], and the scale that makes the mean squared entry of the centred activations one."""
    some = activations[: 2**17].float()
    mean = some.mean(dim=0)
    return mean, float((some - mean).square().mean().sqrt())


def _rate(step: int, steps: int) -> float:
    """Learning rate relative to its peak: linear warmup over 5 % of the steps, cosine decay to 2 %."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batch_threshold(acts: Tensor, k: int, stride: int = 8) -> float:
    """The activation that a mean of k features a token exceed, estimated on every `stride`-th token of [B, F]."""
    some = acts[:: min(stride, len(acts))]
    return float(torch.topk(some.flatten(), k * len(some), sorted=False).values.min())


def _silent_loss(reach: Tensor, W_dec: Tensor, silent: Tensor, error: Tensor) -> Tensor:
    """How much of the error [B, D] the silent features' largest entries in `reach` [B, F] fail to explain: a scalar."""
    top = torch.topk(reach[:, silent], min(len(silent), W_dec.shape[1] // 2), sorted=False)
    chosen = torch.zeros(len(reach), len(silent)).scatter(1, top.indices, top.values)
    return (error - chosen @ W_dec[silent]).square().mean()


@torch.no_grad()
def quality(dictionary: Dictionary, inputs: Tensor, targets: Tensor, batch: int = 4096) -> Quality:
    """L0, explained variance and which features fire, for inputs and targets of [N, D]."""
    mean = targets.float().mean(dim=0)
    active, error, variance = 0, 0.0, 0.0
    fired = torch.zeros(dictionary.W_enc.shape[1], dtype=torch.bool)
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        features = dictionary.encode(x.float())
        active += int((features > 0).sum())
        fired |= (features > 0).any(dim=0)
        error += float((y - dictionary.decode(features)).double().square().sum())
        variance += float((y - mean).double().square().sum())
    return Quality(active / len(inputs), 1 - error / variance, fired)


def save_dictionary(dictionary: Dictionary, folder: Path, model_name: str) -> None:
    """Writes `cfg.json` and `sae_weights.safetensors`, in float16, as sae-lens reads them (into float32)."""
    folder.mkdir(parents=True, exist_ok=True)
    is_transcoder = dictionary.hook_name_out is not None
    # Without the version of the format sae-lens takes this for an old file and drops the metadata.
    metadata = {
        "sae_lens_version": "6.0.0",
        "model_name": model_name,
        "hook_name": dictionary.hook_name,
        "prepend_bos": False,
    }
    config = {
        "d_in": dictionary.W_enc.shape[0],
        "d_sae": dictionary.W_enc.shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
        "architecture": "jumprelu",
    }
    if is_transcoder:
        metadata["hook_name_out"] = dictionary.hook_name_out
        config |= {"d_out": dictionary.W_dec.shape[1], "architecture": "jumprelu_transcoder"}
    weights = {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    save_file({name: w.half().contiguous() for name, w in weights.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")


def read_dictionary(folder: Path) -> Dictionary:
    """Reads back what `save_dictionary` wrote, in float32."""
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    weights = {name: w.float() for name, w in load_file(folder / "sae_weights.safetensors").items()}
    return Dictionary(metadata["hook_name"], metadata.get("hook_name_out"), **weights)
