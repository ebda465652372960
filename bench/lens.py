"""Query Lens for whole dictionaries: the transport against the GEMM floor, and all features against walks one by one.

    python -m bench lens [--model FOLDER] [--width N] [--sequences 32] [--length 32] [--features 20]

Both sides in one process and one run, medians. The peer is the reference's way: for each feature one forward-mode
(value) or reverse-mode (key) pass through every later or earlier module of the model, over the same cached residuals;
`--features` are timed and the rest extrapolated. Before any ratio is printed the two answers are compared. The floor of
a sweep is 2 · d_model · tokens · parameters of the blocks at the GEMM rate measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

import querylens_fast as ql
from bench.topk import machine
from querylens_fast.demo.showcase import load_example
from querylens_fast.walks import Side


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_rate(d: int, dtype: torch.dtype, rows: int = 4096) -> float:
    """FLOP/s of this machine's best product with d on one side and 4d on the other."""
    rates = []
    for k, n in ((d, 4 * d), (4 * d, d), (d, d)):
        a, b = torch.randn(rows, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
        out = a @ b

        def ten_times(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            for _ in range(10):
                torch.mm(a, b, out=out)

        ten_times()
        rates.append(10 * 2 * rows * k * n / seconds(ten_times, 5))
    return max(rates)


def one_by_one(
    model: ql.Model, residuals: tuple[list[Tensor], list[Tensor]], v: Tensor, point: int, side: Side
) -> Tensor:
    """The reference's walk for one feature, module by module."""
    pre, mid = residuals
    masking = model.masking(pre[0][..., 0])
    t = v.expand_as(pre[0])
    for i in range(point, 2 * model.n_layers) if side == "value" else range(point - 1, -1, -1):
        block, x = model.blocks[i // 2], (mid if i % 2 else pre)[i // 2]

        def module(y: Tensor, i: int = i, block: Any = block) -> Tensor:
            return block.mlp(y) if i % 2 else block.attention(y, masking)

        t = t + (jvp(module, (x,), (t,))[1] if side == "value" else vjp(module, x)[1](t)[0])
    return t.mean((0, 1))


def bench(model: ql.Model, dictionaries: list[ql.Dictionary], tokens: ql.Tokens, n_timed: int) -> dict[str, Any]:
    """All figures of one model."""
    pre, mid, _ = model.residuals(tokens.ids)
    parameters = sum(
        w.numel() for b in model.blocks for p in (b.attention, b.mlp) for w in vars(p).values() if isinstance(w, Tensor)
    )
    rate = gemm_rate(model.d_model, model.dtype)
    floor = 2 * model.d_model * tokens.n_valid * parameters / rate
    result: dict[str, Any] = {
        "model": {"d_model": model.d_model, "layers": model.n_layers, "block_parameters": parameters},
        "tokens": tokens.n_valid,
        "features": sum(d.n_features for d in dictionaries),
        "gemm_gflops": rate / 1e9,
        "floor_s": floor,
    }
    for side in ("value", "key"):
        fit_s = seconds(lambda s=side: ql.fit_transport(model, tokens, sides=(s,), orders=("full",), progress=False))
        transport = ql.fit_transport(model, tokens, sides=(side,), orders=("full",), progress=False)
        preset = f"query_lens_{side}"

        def read_all(transport: ql.Transport = transport, preset: str = preset) -> None:
            for dictionary in dictionaries:
                ql.signatures(dictionary, model, preset=preset, transport=transport, k=25)

        read_s = seconds(read_all)
        walks_s = errors = 0.0
        for dictionary in dictionaries:
            chosen = torch.linspace(0, dictionary.n_features - 1, n_timed).long()
            vectors, point = dictionary.vectors(side, chosen).to(model.dtype), dictionary.point(side)
            start = time.perf_counter()
            walked = torch.stack([one_by_one(model, (pre, mid), v, point, side) for v in vectors])
            walks_s += (time.perf_counter() - start) / n_timed * dictionary.n_features
            moved = transport.apply(vectors, side, "full", point)
            errors = max(errors, float((moved - walked).norm() / walked.norm()))
        if errors > 1e-3:
            raise SystemExit(f"{preset}: the fitted transport and the walks disagree by {errors:.1e}; nothing is timed")
        result[side] = {
            "fit_s": fit_s,
            "fit_over_floor": fit_s / floor,
            "signatures_s": read_s,
            "one_by_one_s": walks_s,
            "ratio": walks_s / (fit_s + read_s),
            "relative_difference": errors,
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a transformers folder; its MLP neurons are the dictionaries (default: the demo)"
    )
    parser.add_argument("--width", type=int, help="this many random directions a layer in place of the dictionaries")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--features", type=int, default=20, help="features timed one by one, a dictionary")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    if options.model:
        model = ql.load_model(options.model)
        dictionaries = [ql.neuron_dictionary(model, layer) for layer in range(model.n_layers)]
        ids = torch.randint(0, model.vocab_size, (options.sequences, options.length))
        tokens = ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), "random ids")
    else:
        example = load_example()
        model, dictionaries = example.model, example.dictionaries
        ids = example.held_out.ids[: options.sequences, : options.length].contiguous()
        tokens = ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), "demo, held out")
    if options.width:
        dictionaries = [
            ql.directions(torch.randn(options.width, model.d_model), layer=layer) for layer in range(model.n_layers)
        ]
    figures = bench(model, dictionaries, tokens, options.features)
    result = {
        "machine": machine(torch.device("cpu")),
        "command": f"python -m bench lens {' '.join(arguments or [])}".strip(),
        **figures,
    }
    for side in ("value", "key"):
        r = result[side]
        print(
            f"{side}: transport {r['fit_s']:.2f} s ({r['fit_over_floor']:.2f} × the GEMM floor), signatures of "
            f"{result['features']} features {r['signatures_s']:.2f} s; one by one {r['one_by_one_s']:.0f} s: "
            f"{r['ratio']:.0f} ×"
        )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
