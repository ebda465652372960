"""Signatures of a block of features on a bfloat16 checkpoint of Gemma-2-2B's width and vocabulary.

    python -m bench signatures [--features 8192] [--repeat 3] [--out FILE.json]

The checkpoint has one layer with random weights; it is written to a temporary folder and loaded as any other. Timed, in
turns: ``signatures(preset="logit_lens_value", k=25)`` of the features, and their product with W_U alone in bfloat16.
A few rows are compared with float64 first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import querylens_fast as ql
from bench.machine import machine
from bench.record import save
from bench.timing import measure
from bench.topk import chunked

D, VOCABULARY, K = 2304, 256000, 25
GOAL_S = 15.0


def checkpoint() -> ql.Model:
    """A random Gemma 2 with one layer, saved and loaded in bfloat16."""
    import transformers

    config = transformers.Gemma2Config(
        hidden_size=D, intermediate_size=9216, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, vocab_size=VOCABULARY, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return ql.load_model(folder, dtype="bfloat16")


def check(found: ql.Signatures, features: torch.Tensor, model: ql.Model) -> float:
    """Largest error of four rows' scores against float64, over the largest score; SystemExit beyond 1e-4."""
    rows = torch.linspace(0, len(features) - 1, 4).long()
    # A feature's vector is rounded to the model's dtype, and once more after the norm.
    narrow = features[rows].to(model.W_U.dtype)
    x = model.final_norm(narrow.float()).to(model.W_U.dtype).double()
    S = torch.cat([x @ part.double().T for part in model.W_U.split(1 << 15)], 1)
    error = 0.0
    for ids, scores, largest in (
        (found.top_ids, found.top_scores, True),
        (found.bottom_ids, found.bottom_scores, False),
    ):
        expected = S.topk(K, largest=largest).values
        for values in (S.gather(1, ids[rows]), scores[rows].double()):
            error = max(error, float(((values - expected).abs() / S.abs().amax()).max()))
    if not error < 1e-4:
        raise SystemExit(f"wrong results: relative error {error:.3g}; no time reported")
    return error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench signatures", description=__doc__)
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    model = checkpoint()
    features = torch.randn(options.features, D, generator=torch.Generator().manual_seed(0))
    dictionary = ql.directions(features, layer=0)
    narrow = features.to(torch.bfloat16)

    def ours() -> ql.Signatures:
        return ql.signatures(dictionary, model, preset="logit_lens_value", k=K)

    error = check(ours(), features, model)
    tasks = {"ours": ours, "gemm alone bf16": lambda: chunked(narrow, model.W_U, lambda S: None)}
    times = measure(tasks, torch.device("cpu"), options.repeat)
    seconds, gemm = (times[name]["p50_ms"] / 1e3 for name in tasks)
    record = {
        "machine": machine(torch.device("cpu")),
        "shape": {"features": options.features, "d": D, "V": VOCABULARY, "k": K, "dtype": "bfloat16"},
        "error": error,
        "times": times,
        "seconds": seconds,
        "over_gemm": seconds / gemm,
        "goal_s": GOAL_S,
    }
    print(f"{options.features} features: {seconds:.2f} s, {seconds / gemm:.3f} x the product alone ({gemm:.2f} s); "
          f"relative error {error:.1e}")  # fmt: skip
    if options.out:
        save(options.out, record)


if __name__ == "__main__":
    main()
