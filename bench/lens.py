"""Query Lens for whole dictionaries: the transport against the GEMM floor, and all features against walks one by one.

    python -m bench lens [--model FOLDER | --shape gpt2-small] [--width N] [--sequences 32] [--directions 32]

Both sides in one process and one run. The peer is the reference's way: for each feature one forward-mode (value) or
reverse-mode (key) pass through every later or earlier module of the model, over the same cached residuals; `--features`
a dictionary are timed and the rest extrapolated. `--directions` walks only so many of the d_model basis directions and
scales up (the cost is linear in them). Before any ratio is printed the two answers are compared. `sweeps` says what the
floor is. Break-even is the number of features a layer from which fitting first is the faster way.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

import querylens_fast as ql
from bench import sweeps
from bench.cases import MODEL_SHAPES
from bench.machine import machine, sync
from bench.record import save
from querylens_fast.demo.showcase import load_example
from querylens_fast.models.folders import parse_dtype
from querylens_fast.transport.jacobians import Side

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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
    return t.mean((0, 1), dtype=torch.promote_types(t.dtype, torch.float32))


def bench_side(
    model: ql.Model, dictionaries: list[ql.Dictionary], tokens: ql.Tokens, side: Side, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one side, after its answers have been compared with the walks'."""
    pre, mid, _ = model.residuals(tokens.ids)
    n = min(options.directions or model.d_model, model.d_model)
    swept, figures = sweeps.full_sweep(model, tokens, side, n, options.memory)
    whole = swept.sums[side, "full"][0] / tokens.n_valid
    about = {"model": model.name, "fingerprint": model.fingerprint, "tokens": tokens.source}
    about |= {"n_layers": str(model.n_layers), "d_model": str(model.d_model), "n_valid": str(tokens.n_valid)}
    transport = ql.Transport({(side, "full"): whole.clone()}, None, about)
    figures["time_shares"] = sweeps.time_shares(model, tokens, side, options.memory)
    walk_s, read_s, worst = [], [], 0.0
    if n < model.d_model:
        # What was not walked reads as the identity, so that the read-out sees vectors of a real size.
        whole[:, n:] = torch.eye(model.d_model, device=whole.device)[n:]
    reading = ql.Transport({(side, "full"): whole}, torch.zeros(model.d_model), about)
    for layer, dictionary in enumerate(dictionaries):
        chosen = torch.linspace(0, dictionary.n_features - 1, options.features).long()
        vectors, point = dictionary.vectors(side, chosen).to(model.device, model.dtype), dictionary.point(side)
        one_by_one(model, (pre, mid), vectors[0], max(point, 2 * model.n_layers - 1), side)
        sync(model.device)
        start = time.perf_counter()
        walked = torch.stack([one_by_one(model, (pre, mid), v, point, side) for v in vectors])
        sync(model.device)
        walk_s.append((time.perf_counter() - start) / options.features)
        moved = transport.apply(vectors, side, "full", point)
        worst = max(worst, float((moved - walked)[:, :n].norm() / walked[:, :n].norm()))
        if layer % max(1, len(dictionaries) // options.readouts) == 0:
            spent = sweeps.seconds(
                lambda d=dictionary: ql.signatures(d, model, preset=f"query_lens_{side}", transport=reading, k=25),
                model.device,
            )
            read_s.append(spent / dictionary.n_features)
    if worst > TOLERANCE[model.dtype]:
        raise SystemExit(f"{side}: the fitted transport and the walks disagree by {worst:.1e}; nothing is timed")
    sizes = [d.n_features for d in dictionaries]
    figures["signatures_s"] = sum(read_s) / len(read_s) * sum(sizes)
    figures["one_by_one_s"] = sum(s * size for s, size in zip(walk_s, sizes, strict=True))
    figures["ratio"] = figures["one_by_one_s"] / (figures["fit_s"] + figures["signatures_s"])
    saved_by_one_each = sum(walk_s) - len(walk_s) * sum(read_s) / len(read_s)
    figures["break_even_features_a_layer"] = figures["fit_s"] / saved_by_one_each
    return {**figures, "relative_difference": worst, "features_walked": options.features * len(dictionaries)}


def bench(
    model: ql.Model, dictionaries: list[ql.Dictionary], tokens: ql.Tokens, options: argparse.Namespace
) -> dict[str, Any]:
    """All figures of one model in one dtype."""
    parameters = sweeps.block_parameters(model)
    neurons = model.blocks[0].mlp.W_in.shape[0]
    rate = sweeps.gemm_rate(model.d_model, neurons, model.dtype, model.device)
    found: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": {"d_model": model.d_model, "layers": model.n_layers, "block_parameters": parameters},
        "tokens": tokens.n_valid,
        "features": sum(d.n_features for d in dictionaries),
    }
    sides = {side: bench_side(model, dictionaries, tokens, side, options) for side in ("value", "key")}
    first = sweeps.first_order_sweep(model, tokens, options.memory)
    # A shared machine's rate drifts; the floor takes the better of the rates before and after.
    rate = max(rate, sweeps.gemm_rate(model.d_model, neurons, model.dtype, model.device))
    floor = 2 * model.d_model * tokens.n_valid * parameters / rate
    for figures in (*sides.values(), first):
        figures["fit_over_floor"] = figures["fit_s"] / floor
    return {**found, "gemm_gflops": rate / 1e9, "floor_s": floor, **sides, "first_order_both_sides": first}


def report(result: dict[str, Any]) -> None:
    """One model's figures as text."""
    model = result["model"]
    print(
        f"\n{model['layers']} layers, d_model {model['d_model']}, {result['tokens']} tokens, {result['dtype']}: "
        f"{result['gemm_gflops']:.0f} GFLOP/s, floor of a full sweep {result['floor_s']:.1f} s"
    )
    for side in ("value", "key"):
        r = result[side]
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in r["time_shares"].items())
        scaled = "" if r["directions_timed"] == model["d_model"] else f", {r['directions_timed']} directions timed"
        print(
            f"{side}: full sweep {r['fit_s']:.1f} s ({r['fit_over_floor']:.2f} x the floor{scaled}): {shares}\n"
            f"  signatures of {result['features']} features {r['signatures_s']:.1f} s; one by one "
            f"{r['one_by_one_s']:.0f} s ({r['features_walked']} walked): {r['ratio']:.0f} x; "
            f"break-even at {r['break_even_features_a_layer']:.0f} features a layer"
        )
    first = result["first_order_both_sides"]
    print(
        f"first order, both sides: {first['fit_s']:.2f} s ({first['fit_over_floor']:.3f} x the floor), "
        f"{first['closed_form']:.0%} of the modules in closed form"
    )


def subject(options: argparse.Namespace, dtype: torch.dtype) -> tuple[ql.Model, list[ql.Dictionary], ql.Tokens]:
    """The model, its dictionaries and the sample that the options name."""
    generator = torch.Generator().manual_seed(0)
    if options.shape or options.model:
        if options.shape:
            torch.manual_seed(0)
            source = MODEL_SHAPES[options.shape]().to(options.device, dtype).eval().requires_grad_(False)
            model = ql.as_model(source, linearisation=options.linearisation)
        else:
            model = ql.load_model(
                options.model, device=options.device, dtype=dtype, linearisation=options.linearisation
            )
        ids = torch.randint(0, model.vocab_size, (options.sequences, options.length), generator=generator)
        source = "random ids"
        dictionaries = [ql.neuron_dictionary(model, layer) for layer in range(model.n_layers)]
    else:
        example = load_example()
        model = ql.as_model(example.model.source.to(options.device, dtype))
        dictionaries, source = example.dictionaries, "demo, held out"
        ids = example.held_out.ids[: options.sequences, : options.length].contiguous()
    if options.width:
        dictionaries = [
            ql.directions(torch.randn(options.width, model.d_model, generator=generator), layer=layer)
            for layer in range(model.n_layers)
        ]
    return model, dictionaries, ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), source)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; its MLP neurons are the dictionaries")
    parser.add_argument("--shape", choices=list(MODEL_SHAPES), help="random weights; default without both: the demo")
    parser.add_argument("--width", type=int, help="this many random directions a layer in place of the dictionaries")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--features", type=int, default=20, help="features timed one by one, a dictionary")
    parser.add_argument("--directions", type=int, help="basis directions timed (default: all)")
    parser.add_argument("--readouts", type=int, default=1 << 30, help="dictionaries whose read-out is timed")
    parser.add_argument("--dtype", default="float32", help="one or more, separated by commas")
    parser.add_argument("--linearisation", choices=["hand-written", "autodiff"], default="hand-written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB for the sweeps")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    command = f"python -m bench lens {' '.join(arguments or [])}".strip()
    about = {"machine": machine(torch.device(options.device)), "command": command}
    with torch.no_grad():
        for dtype in map(parse_dtype, options.dtype.split(",")):
            results.append(bench(*subject(options, dtype), options))
            report(results[-1])
            if options.out:
                save(options.out, {**about, "results": results})
    if options.out:
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
