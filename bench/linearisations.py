"""A transport through a model's own layers against the hand-written linearisation: time and peak memory.

    python -m bench linearisations [--only gpt2 ...] [--repeat 1] [--out FILE]

Both fit the same random model (d = 192, four layers, float32) on the same sample, both sides of the full order, taking
turns in one process; their matrices are compared first. Peak memory is that of anonymous pages above what the process
had before the fit, the result's own matrices taken off, to be held against ``max_memory_gib``; later fits of a process
reuse what earlier ones left to it, so that it says something of the first model only (``--only``).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import querylens_fast as ql
from bench.machine import machine
from bench.million import anonymous_mib, peak_memory
from bench.record import RESULTS, save

D_MODEL, LAYERS, VOCAB, SEQUENCES, LENGTH, MAX_GIB = 192, 4, 1000, 8, 32, 0.5
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 4 * D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "head_dim": 48}
MODELS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=4),
    "gpt_neox (parallel)": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED),
    "gpt2, 256 wide": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=256, n_layer=LAYERS, n_head=4),
    "gpt_neox (parallel), 256 wide": lambda: transformers.GPTNeoXConfig(
        **{**SHAPE, "hidden_size": 256, "intermediate_size": 1024}
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=D_MODEL
    ),
}
WAYS = ("hand-written", "autodiff")


def fit(model: ql.Model, tokens: ql.Tokens) -> tuple[ql.Transport, float, float]:
    """(the transport, seconds, peak MiB above what was there before and the result holds)."""
    before, start = anonymous_mib(), time.perf_counter()
    with peak_memory() as peak:
        found = ql.fit_transport(model, tokens, orders=("full",), max_memory_gib=MAX_GIB, progress=False)
        seconds = time.perf_counter() - start
    held = sum(m.nbytes for m in found.matrices.values()) / 2**20
    return found, seconds, peak() - before - held


def measure(name: str, repeat: int) -> dict[str, Any]:
    """One row of the record. Raises SystemExit where the two ways do not agree."""
    torch.manual_seed(0)
    source = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    tokens = ql.load_tokens(torch.randint(0, VOCAB, (SEQUENCES, LENGTH)))
    models = {way: ql.as_model(source, linearisation=way) for way in WAYS}  # type: ignore[arg-type]
    fits: dict[str, list[tuple[ql.Transport, float, float]]] = {way: [] for way in WAYS}
    for _ in range(repeat):
        for way in WAYS:
            fits[way].append(fit(models[way], tokens))
    last = {way: fits[way][-1][0].matrices for way in WAYS}
    difference = max(float((last["autodiff"][k] - m).norm() / m.norm()) for k, m in last["hand-written"].items())
    if not difference < 1e-4:
        raise SystemExit(f"{name}: the two linearisations differ by {difference:.1e}")
    seconds = {way: statistics.median(s for _, s, _ in fits[way]) for way in WAYS}
    return {
        "model": name,
        "submodules": models["autodiff"].has_submodules,
        "difference": difference,
        "seconds": seconds,
        "all_seconds": {way: [s for _, s, _ in fits[way]] for way in WAYS},
        "ratio": seconds["autodiff"] / seconds["hand-written"],
        "peak_mib": {way: max(p for _, _, p in fits[way]) for way in WAYS},
        "max_memory_mib": MAX_GIB * 1024,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench linearisations", description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path, help="record (default: bench/results/linearisations-DATE.json)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("querylens_fast").setLevel(logging.ERROR)
    where = machine(torch.device("cpu"))
    out = options.out or RESULTS / f"linearisations-{where['date']}.json"
    rows: list[dict[str, Any]] = []
    for name in options.only:
        row = measure(name, options.repeat)
        rows.append(row)
        save(out, {"machine": where, "d_model": D_MODEL, "sequences": SEQUENCES, "length": LENGTH, "rows": rows})
        ours, own = (row["seconds"][way] for way in WAYS)
        memory = ", ".join(f"{row['peak_mib'][way]:.0f}" for way in WAYS)
        print(
            f"{name:30s} {ours:6.2f} s by hand, {own:6.2f} s by autodiff = {row['ratio']:.2f}; peak MiB {memory}",
            flush=True,
        )


if __name__ == "__main__":
    main()
