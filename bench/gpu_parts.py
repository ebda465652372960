"""The parts of `bench.gpu_check`, each run in a process of its own: ``python -m bench.gpu_parts NAME [--interpret]``.

A part prints what it knows as a line of JSON as soon as it knows it, so that one that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

GRID = (
    (768, 50257, 10),
    (1152, 262144, 25),
    (2048, 128256, 32),
    (3584, 151936, 100),
    (4096, 128256, 25),
    (5120, 151936, 10),
    (5120, 262144, 100),
)
"""d, V, k."""
GRID_ROWS = 8192
SWEEPS = {"gpt2-small": 32, "gemma3-1b": 32}
"""Basis directions timed."""
TUNED = ((16384, 2304, 262144, 32), (16384, 768, 50257, 25), (8192, 5120, 151936, 32))
"""n, d, V, k."""
Found = Iterator[dict[str, Any]]


class Context(NamedTuple):
    """What every part is told."""

    interpreted: bool = False
    seed: int = 0
    repeat: int = 5
    folder: Path = Path()
    """Where traces and tables go."""

    @property
    def device(self) -> str:
        """Of the tensors."""
        return "cpu" if self.interpreted else "cuda"


def about(context: Context) -> Found:
    """The machine, and the rates of the library's products."""
    import torch

    from bench.machine import machine
    from bench.sweeps import gemm_rate

    if not context.interpreted and not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing is checked or measured (--interpret checks the logic on a CPU)")
    device = torch.device(context.device)
    yield {"machine": machine(device)}
    d, neurons = (64, 128) if context.interpreted else (2304, 9216)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rate = gemm_rate(d, neurons, dtype, device) / 1e12
        yield {"rates": {f"{str(dtype).removeprefix('torch.')}_tflops": rate}}


def kernel(context: Context, name: str, dtype: str) -> Found:
    """One kernel against torch (`bench.gpu_kernels`)."""
    import torch

    from bench.gpu_kernels import KERNELS, data

    yield KERNELS[name](data(getattr(torch, dtype), context.device, context.seed))


def checks(context: Context, dtype: str, method: str) -> Found:
    """Every mode of the streamed top-k in a dtype and by a method, on random and adversarial rows."""
    from bench.checks import run_all

    ok = True
    for name, result in run_all(context.device, context.seed, dtype, method):
        ok &= result["ok"]
        yield {"ok": ok, "checks": {name: result}}


def stages(context: Context, name: str, dtype: str, method: str) -> Found:
    """The stages of a call on one block of rows, and what is left of the whole call's time: glue."""
    import torch

    from bench.cases import CASES
    from bench.topk import chunked, inputs
    from csrc_triton.columns import prepare
    from csrc_triton.finish import Exact, Results, finish
    from csrc_triton.job import Job
    from csrc_triton.rows import rows_of
    from csrc_triton.select import select
    from querylens_fast.topk import triton_backend as backend
    from querylens_fast.topk.api import streamed_topk
    from querylens_fast.topk.request import Request

    case = CASES[name]._replace(k=32)
    case = _small(case) if context.interpreted else case
    F, W = inputs(case, case.rows, getattr(torch, dtype), context.device)
    n, k, scaled = len(F), case.k, dtype == "float32"
    narrow = torch.float16 if scaled else F.dtype
    request = Request(F, W, k, method=method)
    prepared = partial(prepare, W, narrow, scaled=scaled)
    columns = prepared()
    assert columns is not None
    run = backend._Pass(request, backend.choose(request, narrow), columns, exact=not scaled)
    room = torch.empty(2, n, 2, run.groups, dtype=torch.int32, device=F.device)
    results = Results(
        torch.empty(2, n, k, device=F.device),
        torch.empty(2, n, k, dtype=torch.int64, device=F.device),
        torch.empty(n, 2, dtype=torch.int32, device=F.device),
    )
    how = Exact(None, None, run.tile.group)
    operands, made = (F.to(narrow), W.to(narrow)), {}
    yield {"choice": str(run.choice), "rows": n}
    tasks: dict[str, Callable[[], object]] = {
        "product alone": lambda: chunked(*operands, lambda _: None),
        "prepare W": prepared,
        "rows": lambda: made.update(rows=rows_of(F, columns.bounds, scaled=scaled)),
        "product and winners": lambda: run._winners(
            made["rows"], Job(made["rows"].unit, room, run.keys), slice(0, n), None
        ),
        "select": lambda: made.update(found=select(room, made["rows"], k, run.slots, run.keys)),
        "finish": lambda: finish(F, W, made["found"], made["rows"], results, how, run.keys),
        "whole call": lambda: streamed_topk(F, W, k, backend="triton", method=method),
    }
    ms: dict[str, float] = {}
    for stage, task in tasks.items():
        times = _times(context, {stage: task})
        ms[stage] = times[stage]["p50_ms"]
        yield {"times": times}
    inner = sum(ms[stage] for stage in ("prepare W", "rows", "product and winners", "select", "finish"))
    yield {"glue_ms": ms["whole call"] - inner, "flags": torch.bincount(results.flags.flatten(), minlength=5).tolist()}


def case(context: Context, name: str, dtype: str) -> Found:
    """One shape end to end beside its peers."""
    import torch

    from bench.cases import CASES
    from bench.topk import inputs

    case = CASES[name]._replace(k=32)
    case = _small(case) if context.interpreted else case
    F, W = inputs(case, case.rows, getattr(torch, dtype), context.device)
    yield from _beside_peers(context, F, W, case.k, everything=True)


def shapes(context: Context, dtype: str) -> Found:
    """Depths, vocabularies and k of other models, beside the GEMM and the chunks."""
    import torch

    from bench.cases import Case
    from bench.topk import inputs

    for d, V, k in GRID[:2] if context.interpreted else GRID:
        shape = Case("", d, V, GRID_ROWS, k)
        shape = _small(shape) if context.interpreted else shape
        F, W = inputs(shape, shape.rows, getattr(torch, dtype), context.device)
        yield from _named(f"{d} x {V}, k={k}", _beside_peers(context, F, W, shape.k))


def kinds(context: Context, dtype: str) -> Found:
    """Rows that are not Gaussian, beside the GEMM and the chunks."""
    import torch

    from bench.cases import CASES
    from bench.topk import KINDS, inputs

    for kind in KINDS[1:]:
        case = _small(CASES["gemma-2-2b"]) if context.interpreted else CASES["gemma-2-2b"]
        F, W = inputs(case, min(case.rows, GRID_ROWS), getattr(torch, dtype), context.device, kind)
        yield from _named(kind, _beside_peers(context, F, W, case.k))


def _named(name: str, found: Found) -> Found:
    """One of several cases of a part: one that is wrong or fails does not stop the others."""
    try:
        for line in found:
            yield {name: line} | ({} if line.get("ok", True) else {"ok": False})
    except Exception as error:
        yield {name: {"failed": f"{type(error).__name__}: {error}"[:500]}, "ok": False}


def _small(case: Any) -> Any:
    return case._replace(d=32, V=300, rows=6, k=5)


def _beside_peers(context: Context, F: Any, W: Any, k: int, *, everything: bool = False) -> Found:
    """Check against float64, then time ours beside the GEMM and chunks, and each other task by itself."""
    from bench.cases import CHUNKED, GEMM
    from bench.topk import check, tasks
    from querylens_fast.topk.api import streamed_topk

    ours = streamed_topk(F, W, k, backend="triton")
    try:
        yield {"error": check(F, W, k, ours), "widened": ours.widened_rows / (2 * len(F))}
    except SystemExit as wrong:
        yield {"ok": False, "error": str(wrong)}
        return
    known = tasks(F, W, k)
    known["ours"] = lambda: streamed_topk(F, W, k, backend="triton")
    first = ("ours", GEMM, CHUNKED)
    yield {"times": _times(context, {name: known.pop(name) for name in first})}
    for name, task in (known | _readout(F, W, k)).items() if everything else ():
        try:
            yield {"times": _times(context, {name: task})}
        except Exception as error:
            yield {"peers that failed": {name: f"{type(error).__name__}: {error}"[:300]}}


def _readout(F: Any, W: Any, k: int) -> dict[str, Callable[[], object]]:
    """transformer-lens's chunked readout of the top side, where it is installed."""
    try:
        from transformer_lens.tools.analysis import logit_readout  # type: ignore[import-not-found]
    except ImportError:
        return {}
    config = SimpleNamespace(d_model=F.shape[1])
    peer = SimpleNamespace(W_U=W.T.contiguous(), b_U=W.new_zeros(len(W)), cfg=config, training=False)
    peer.unembed = peer.W_U
    name = f"transformer-lens {importlib.metadata.version('transformer-lens')} logit_readout (top side)"
    return {name: lambda: logit_readout(peer, F, apply_ln=False, top_k=k, chunk_size=max(64, (1 << 30) // len(W)))}


def _times(context: Context, tasks: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    import torch

    from bench.timing import measure

    return measure(tasks, torch.device(context.device), 1 if context.interpreted else context.repeat)


def million(context: Context, dtype: str) -> Found:
    """Features against features, d = 2304, the top 32: a part, then all."""
    import torch

    from bench.timing import seconds
    from querylens_fast.topk.api import streamed_topk

    n, d, V = (24, 32, 700) if context.interpreted else (1 << 20, 2304, 1 << 20)
    F, W = (torch.randn(size, d, device=context.device, dtype=getattr(torch, dtype)) for size in (n, V))
    for name, rows in (("first_s", n // 8), ("part_s", n // 8), ("all_s", n)):
        part = F[:rows]
        run = partial(streamed_topk, part, W, 5 if context.interpreted else 32, bottom=False, backend="triton")
        yield {name: seconds(run, F.device), "rows": rows}


def tuning(context: Context, dtype: str) -> Found:
    """Every tile and method at real shapes; the table of choices goes into a file."""
    import torch

    from csrc_triton import tune

    table = tune.Table()
    for n, d, V, k in ((6, 32, 300, 5),) if context.interpreted else TUNED:
        F, W = (torch.randn(size, d, device=context.device).to(getattr(torch, dtype)) for size in (n, V))
        times = tune.measure(F, W, k, table, 1 if context.interpreted else context.repeat)
        yield {"choices": {f"{n} x {V} x {d}": {str(c): {"p50_ms": ms} for c, ms in times.items()}}}
        table.save(context.folder / f"tuning-{dtype}.json")


def trace(context: Context, dtype: str) -> Found:
    """A profiler trace of one call of several blocks, and the time and number of each kernel in it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from querylens_fast.topk.api import streamed_topk

    n, d, V, k = (6, 32, 300, 5) if context.interpreted else (65536, 2304, 262144, 32)
    F, W = (torch.randn(size, d, device=context.device).to(getattr(torch, dtype)) for size in (n, V))
    streamed_topk(F, W, k, backend="triton")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 if context.interpreted else 2]) as seen:
        streamed_topk(F, W, k, backend="triton")
        if not context.interpreted:
            torch.cuda.synchronize()
    attribute = "self_cpu_time_total" if context.interpreted else "self_device_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, attribute))[:25]
    yield {"kernels": {e.key[:80]: {"all_ms": getattr(e, attribute) / 1e3, "number": e.count} for e in events}}
    seen.export_chrome_trace(str(context.folder / f"trace-{dtype}.json.gz"))


def graph(context: Context) -> Found:
    """The blocks of a pass are captured as a CUDA graph and replayed with the same result."""
    import torch

    from csrc_triton.columns import prepare
    from querylens_fast.topk import triton_backend as backend
    from querylens_fast.topk.request import Request

    n, d, V = (4, 32, 300) if context.interpreted else (4096, 1024, 65536)
    F, W = (torch.randn(size, d, device=context.device).half() for size in (n, V))
    request = Request(F, W, 5, block_rows=n // 2)
    columns = prepare(W, torch.float16, scaled=False)
    assert columns is not None
    run = backend._Pass(request, backend.choose(request, torch.float16), columns, exact=True)
    plain = again = run.blocks(request, run.slots)
    if not context.interpreted:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            again = run.blocks(request, run.slots)
        for part in again:
            part.zero_()
        captured.replay()
        torch.cuda.synchronize()
    yield {"ok": all(bool((a == b).all()) for a, b in zip(plain, again, strict=True))}


def transport(context: Context) -> Found:
    """The demo's transport on the device against the CPU in float64."""
    from bench.checks import transport as check

    yield check(context.device)


def sweep(context: Context, shape: str, dtype: str) -> Found:
    """Full sweeps of a model of that shape, from some directions, beside the GEMM floor."""
    import torch

    import querylens_fast as ql
    from bench import sweeps
    from bench.cases import MODEL_SHAPES, SMALL_SHAPES

    torch.manual_seed(0)
    source = (SMALL_SHAPES if context.interpreted else MODEL_SHAPES)[shape]()
    model = ql.as_model(source.to(context.device, getattr(torch, dtype)).eval().requires_grad_(False))
    sequences, length = (2, 8) if context.interpreted else (1024, 32)
    ids = torch.randint(0, model.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
    tokens = ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), "random ids")
    rate = sweeps.gemm_rate(model.d_model, model.blocks[0].mlp.W_in.shape[0], model.dtype, model.device)
    floor = 2 * model.d_model * tokens.n_valid * sweeps.block_parameters(model) / rate
    yield {"tokens": tokens.n_valid, "floor_s": floor}
    for side in ("value", "key"):
        _, found = sweeps.full_sweep(model, tokens, side, min(SWEEPS[shape], model.d_model), 8.0)
        yield {side: found | {"fit_over_floor": found["fit_s"] / floor}}


PARTS: dict[str, Callable[..., Found]] = {
    part.__name__: part
    for part in (about, kernel, checks, stages, case, shapes, kinds, million, tuning, trace, graph, transport, sweep)
}


def without_times(value: Any, name: str = "") -> Any:
    """What the interpreter found; what it took says nothing of a GPU."""
    if isinstance(value, dict):
        return {key: without_times(each, key) for key, each in value.items()}
    timed = name.endswith(("_s", "_ms", "_floor", "_tflops", "_batch"))
    return None if timed else value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_parts", description=__doc__)
    parser.add_argument("name", help="a part and its arguments, as one word: kernel,fused,bfloat16")
    parser.add_argument("--folder", type=Path, default=Path(), help="for traces and tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--interpret", action="store_true")
    given = parser.parse_args(arguments)
    if given.interpret:
        # Triton decides when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
        from bench.interpreter import widen_bfloat16

        widen_bfloat16()
    part, *rest = given.name.split(",")
    context = Context(given.interpret, given.seed, given.repeat, given.folder)
    for found in PARTS[part](context, *rest):
        print(json.dumps(without_times(found) if given.interpret else found), flush=True)


if __name__ == "__main__":
    main()
