"""A small GPT-2: training, held-out loss, and the activations its dictionaries are trained on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from .corpus import chunks

logger = logging.getLogger(__name__)


class TrainingRun(NamedTuple):
    """What a training run leaves beside the weights.

    Attributes:
        curve: (step, mean training loss in nats since the last point).
        seconds: time spent in training steps, over all its resumptions.
    """

    curve: list[tuple[int, float]]
    seconds: float


class ModelSize(NamedTuple):
    """Shape and training length of the language model.

    Attributes:
        vocab_size: V, tokens.
        d_model: D, width of the residual stream; a multiple of 32, the width of a head.
        layers: number of blocks.
        context: tokens a row.
        batch: rows a step.
        steps: optimiser steps.
        learning_rate: its peak, reached after 5 % of the steps.
    """

    vocab_size: int = 4096
    d_model: int = 160
    layers: int = 4
    context: int = 128
    batch: int = 32
    steps: int = 4200
    learning_rate: float = 3e-3


def new_model(size: ModelSize, end_id: int, pad_id: int, seed: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 with tied embeddings and no dropout, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.context,
        n_embd=size.d_model,
        n_layer=size.layers,
        n_head=max(1, size.d_model // 32),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=pad_id,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def next_token_loss(model: GPT2LMHeadModel, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of every token but the first in each row of [B, S]: a scalar."""
    hidden = model.transformer(rows).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())


def training_batch(stream: Tensor, size: ModelSize, seed: int, step: int) -> Tensor:
    """The rows of one step, [batch, context].

    They depend on nothing but the arguments, so that a run which resumes sees what an unbroken one sees. Every epoch
    cuts the stream at another offset and shuffles the pieces.
    """
    per_epoch = max(1, (len(stream) // size.context - 1) // size.batch)
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 10_007 + epoch)
    offset = int(torch.randint(size.context, (1,), generator=generator))
    rows = chunks(stream[offset:], size.context)
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[index * size.batch : (index + 1) * size.batch]]


def train_model(
    model: GPT2LMHeadModel, stream: Tensor, size: ModelSize, seed: int, checkpoint: Path, every: int = 200
) -> TrainingRun:
    """Trains the model in place with AdamW, linear warmup and cosine decay, in bfloat16 autocast.

    Args:
        model: the model to train.
        stream: [N] int64 training tokens.
        size: batch, steps and learning rate.
        seed: orders the rows.
        checkpoint: where the state is kept every `every` steps; training goes on from it if the file exists.
        every: steps between checkpoints and between points of the returned curve.

    Returns:
        The loss curve and the time taken.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.learning_rate, betas=(0.9, 0.95), fused=True)
    warmup = max(1, size.steps // 20)

    def rate(step: int) -> float:
        progress = (step - warmup) / max(1, size.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, curve, recent, earlier = 0, [], [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, earlier = state["step"], state["seconds"]
        curve = [(int(step), float(loss)) for step, loss in state["curve"]]
        logger.info("language model: going on from step %d of %s", start, checkpoint)

    model.train()
    began = time.perf_counter() - earlier
    steps = range(start, size.steps)
    with tqdm(steps, "language model", initial=start, total=size.steps, unit="step", mininterval=5) as bar:
        for step in bar:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = next_token_loss(model, training_batch(stream, size, seed, step))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            bar.set_postfix(loss=f"{recent[-1]:.3f}", refresh=False)
            if (step + 1) % every == 0 or step + 1 == size.steps:
                curve.append((step + 1, sum(recent) / len(recent)))
                recent = []
                run = TrainingRun(curve, time.perf_counter() - began)
                _save_checkpoint(checkpoint, model, optimizer, schedule, step + 1, run)
    model.eval()
    return TrainingRun(curve, time.perf_counter() - began)


def _save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    step: int,
    run: TrainingRun,
) -> None:
    """Writes the training state beside `path`, then renames it, so that a broken write loses nothing."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "step": step,
        "curve": run.curve,
        "seconds": run.seconds,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@torch.no_grad()
def model_loss(model: GPT2LMHeadModel, rows: Tensor, batch: int = 64) -> float:
    """Mean held-out cross-entropy in nats of every token but the first in each row of [B, S]."""
    total = sum(float(next_token_loss(model, part)) * len(part) for part in rows.split(batch))
    return total / len(rows)


def site(model: GPT2LMHeadModel, hook_name: str) -> nn.Module:
    """The module whose output a TransformerLens hook name stands for.

    Raises:
        ValueError: if the hook is none of resid_post, mlp.hook_in and mlp_out.
    """
    _, layer, hook = hook_name.split(".", 2)
    block = model.transformer.h[int(layer)]
    modules = {"hook_resid_post": block, "mlp.hook_in": block.ln_2, "hook_mlp_out": block.mlp}
    if hook not in modules:
        raise ValueError(f"hook_name is {hook_name!r}: expected blocks.<layer>. and one of {', '.join(modules)}")
    return modules[hook]


@contextmanager
def edited(model: GPT2LMHeadModel, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside this context the output [B, S, D] of each named hook is replaced by what its function returns."""

    def hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        def replace(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        return replace

    handles = [site(model, name).register_forward_hook(hook(edit)) for name, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(model: GPT2LMHeadModel, rows: Tensor, hook_names: list[str], batch: int = 64) -> dict[str, Tensor]:
    """Activations at each hook for every token of [B, S]: hook name to [B, S, D] float16."""
    kept = {name: torch.empty(*rows.shape, model.config.n_embd, dtype=torch.float16) for name in hook_names}
    place = slice(0, 0)

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def edit(output: Tensor) -> Tensor:
            kept[name][place] = output.to(torch.float16)
            return output

        return edit

    with edited(model, {name: keep(name) for name in hook_names}):
        for start in tqdm(range(0, len(rows), batch), desc="activations", unit="batch", mininterval=5):
            place = slice(start, start + batch)
            model.transformer(rows[place])
    return kept
