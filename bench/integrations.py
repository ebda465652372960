"""Exports and calls of other tools on the CPU, beside what those tools do. ``python -m bench integrations --help``.

neuronpedia: the whole bulk folder of a dictionary at GPT-2's shape, without vectors, in a fresh process.
saedashboard: SAEDashboard's per-feature logit work on some rows (its own functions where it is installed, else its
    formula in plain torch) beside ours.
sae-lens: statistics of W_dec @ W_U as sae-lens's notebook has them, and ours; each in a fresh process for its memory.
logit_readout: transformer-lens's chunked top-k, which gives the entropy too, beside ours with and without it, where the
    installed transformer-lens has it (4.x, in an environment of its own: it excludes sae-lens).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.machine import machine
from bench.record import RESULTS, save
from bench.timing import measure

DEFAULT_OUT = RESULTS / "cpu-integrations.json"
PARTS = ("neuronpedia", "saedashboard", "sae-lens", "logit_readout")


def tokenizer_of(vocabulary: int) -> Any:
    """A real tokenizer of so many words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"Ġw{i}" if i % 2 else f"w{i}": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def gpt2_shaped(d: int, vocabulary: int) -> Any:
    """One layer of GPT-2's width and vocabulary, random."""
    import transformers

    import querylens_fast as ql

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocabulary, n_embd=d, n_layer=1, n_head=d // 64, n_positions=16)
    return ql.as_model(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer_of(vocabulary))


def neuronpedia(n: int, d: int, vocabulary: int) -> dict[str, Any]:
    """Export n features; the number that were written is counted from the files."""
    import gzip

    import querylens_fast as ql

    model = gpt2_shaped(d, vocabulary)
    dictionary = ql.directions(torch.randn(n, d, generator=torch.Generator().manual_seed(1)), layer=0, name="bench")
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        folder = ql.export_neuronpedia(
            dictionary, model, name, model_id="gpt2-small", source_set="bench", vectors=False, neighbours=10
        )
        seconds = time.perf_counter() - start
        files = list((folder / "features").iterdir())
        rows = sum(gzip.decompress(p.read_bytes()).count(b"\n") for p in files)
        mib = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20
    if rows != n:
        raise SystemExit(f"wrong results: {rows} lines of {n}; no time reported")
    return {"seconds": seconds, "features": n, "files": len(files), "mib": mib, "peak_mib": peak_mib()}


def saedashboard(n: int, d: int, vocabulary: int) -> dict[str, Any]:
    """Logits, two top-k and a histogram a feature, as SAEDashboard's loop has them, on n features; and ours."""
    from querylens_fast.topk.api import streamed_topk

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(vocabulary, d, generator=generator)
    F = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    W_U = W.T.contiguous()

    table, histogram, used = _dashboards_functions()

    def theirs() -> list[Any]:
        return [(table(row), histogram(row)) for row in F @ W_U]

    ours = streamed_topk(F, W, 10, histogram=50)  # type: ignore[arg-type]
    assert ours.top_scores is not None
    error = float((torch.tensor([x for x, _ in theirs()]) - ours.top_scores).abs().max())
    if error > 1e-4:
        raise SystemExit(f"wrong results: error {error:.3g}; no time reported")
    tasks = {"ours": lambda: streamed_topk(F, W, 10, histogram=50), "per feature": theirs}  # type: ignore[arg-type]
    return {"features": n, "error": error, "SAEDashboard": used, "times": measure(tasks, F.device, 3)}


def _dashboards_functions() -> tuple[Callable[[Tensor], list[float]], Callable[[Tensor], Any], str]:
    """Functions of a row of logits (both tables, returning the top scores; histogram), and whose they are."""
    try:
        from sae_dashboard.components import LogitsHistogramData  # type: ignore[import-not-found]
        from sae_dashboard.data_parsing_fns import get_logits_table_data  # type: ignore[import-not-found]
    except ImportError:

        def table(row: Tensor) -> list[float]:
            sides = row.topk(10, largest=False), row.topk(10)
            return [(side.indices.tolist(), side.values.tolist()) for side in sides][1][1]

        return table, lambda row: torch.histc(row, 50).int().tolist(), "not installed: its formula in plain torch"
    return (
        lambda row: get_logits_table_data(row, 10).top_logits,
        lambda row: LogitsHistogramData.from_data(row, 50, "5 ticks", None),
        version("sae-dashboard"),
    )


def sae_lens(n: int, d: int, vocabulary: int, ours: bool) -> dict[str, Any]:
    """Statistics of W_dec @ W_U in this process: ours, or the formulas of sae-lens's notebook on the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    W_U, W_dec = (torch.randn(shape, generator=generator) / d**0.5 for shape in ((d, vocabulary), (n, d)))
    before, start = peak_mib(), time.perf_counter()
    if ours:
        from querylens_fast.integrations.sae_lens import get_W_U_W_dec_stats_df

        frame, _ = get_W_U_W_dec_stats_df(W_dec, SimpleNamespace(W_U=W_U))
        found = {name: frame[name].tolist()[:64] for name in ("mean", "std", "skewness", "kurtosis")}
    else:
        projection = W_dec @ W_U
        mean = projection.mean(dim=1, keepdim=True)
        centered = projection - mean
        std = torch.pow((centered**2).mean(dim=1, keepdim=True), 0.5)
        scores = centered / std
        moments = [torch.mean(torch.pow(scores, power), dim=1) for power in (3.0, 4.0)]
        columns = dict(zip(("mean", "std", "skewness", "kurtosis"), (mean[:, 0], std[:, 0], *moments), strict=True))
        found = {name: column[:64].tolist() for name, column in columns.items()}
    seconds = time.perf_counter() - start
    used = {"seconds": seconds, "peak_mib": peak_mib(), "extra_mib": peak_mib() - before, "first": found}
    return used | ({"product_seconds": product_seconds(W_dec, W_U)} if ours else {})


def product_seconds(W_dec: Tensor, W_U: Tensor, rows: int = 512, columns: int = 2048) -> float:
    """What the float32 product of all rows takes by itself, from some rows: the floor of statistics that need it."""
    from querylens_fast.topk.products import full_float32, linear

    some, W = W_dec[:rows], W_U.mT.contiguous()
    with torch.no_grad(), full_float32(W.device):
        linear(some, W[:columns])
        start = time.perf_counter()
        for part in W.split(columns):
            linear(some, part)
    return (time.perf_counter() - start) * len(W_dec) / len(some)


def logit_readout(n: int, d: int, vocabulary: int) -> dict[str, Any]:
    """transformer-lens's chunked readout and ours on the same vectors."""
    try:
        from transformer_lens.tools.analysis import logit_readout as theirs  # type: ignore[import-not-found]
    except ImportError as error:
        return {"skipped": str(error).splitlines()[0]}
    from querylens_fast.topk.api import streamed_topk

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(vocabulary, d, generator=generator) / d**0.5
    F = torch.randn(n, d, generator=generator)
    peer = SimpleNamespace(W_U=W.T.contiguous(), b_U=torch.zeros(vocabulary), cfg=SimpleNamespace(d_model=d))
    peer.unembed, peer.training = peer.W_U, False
    wanted, found = theirs(peer, F, apply_ln=False, top_k=10), streamed_topk(F, W, 10, bottom=False, statistics=True)
    assert found.top_scores is not None and found.statistics is not None
    errors = (wanted.values - found.top_scores).abs().max(), (wanted.entropy - found.statistics.entropy).abs().max()
    if max(errors) > 1e-3:
        raise SystemExit(f"wrong results: errors of scores and entropy {errors}; no time reported")
    tasks = {
        "ours": lambda: streamed_topk(F, W, 10, bottom=False),
        "ours with entropy": lambda: streamed_topk(F, W, 10, bottom=False, statistics=True),
        "transformer-lens logit_readout": lambda: theirs(peer, F, apply_ln=False, top_k=10),
    }
    return {
        "features": n,
        "error": float(max(errors)),
        "transformer-lens": version("transformer-lens"),
        "times": measure(tasks, F.device, 3),
    }


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _alone(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """A part in a fresh process."""
    sizes = ["--features", options.features, "--sae-lens-features", options.sae_lens_features]
    sizes += ["--sae-lens-rows", options.sae_lens_rows, "--rows", options.rows]
    sizes += ["--d", options.d, "--vocabulary", options.vocabulary]
    command = [sys.executable, "-m", "bench", "integrations", "--alone", part, *map(str, sizes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def _run(part: str, options: argparse.Namespace) -> dict[str, Any]:
    d, vocabulary = options.d, options.vocabulary
    if part == "neuronpedia":
        return neuronpedia(options.features, d, vocabulary)
    if part == "saedashboard":
        return saedashboard(options.rows, d, vocabulary)
    if part == "logit_readout":
        return logit_readout(options.rows, d, vocabulary)
    ours = part == "sae-lens ours"
    return sae_lens(options.sae_lens_features if ours else options.sae_lens_rows, d, vocabulary, ours)


def _compared(ours: dict[str, Any], theirs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Both runs of the statistics, once they agree; theirs, of fewer rows, extrapolated by rows."""
    error = max(
        abs(a - b) / max(1.0, abs(b))
        for name in theirs["first"]
        for a, b in zip(ours["first"].pop(name), theirs["first"][name], strict=True)
    )
    del ours["first"], theirs["first"]
    if error > 1e-4:
        raise SystemExit(f"wrong results: error {error:.3g}; no time reported")
    n, rows = options.sae_lens_features, options.sae_lens_rows
    extrapolated = theirs["seconds"] * n / rows
    return {
        "features": n,
        "ours": ours,
        "sae-lens": theirs | {"features": rows, "seconds_extrapolated": extrapolated},
        "matrix_gib": n * options.vocabulary * 4 / 2**30,
        "error": error,
        "speedup": extrapolated / ours["seconds"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench integrations", description=__doc__)
    parser.add_argument("--features", type=int, default=65_536, help="of the Neuronpedia export")
    parser.add_argument("--sae-lens-features", type=int, default=24_576)
    parser.add_argument("--sae-lens-rows", type=int, default=6144, help="features that sae-lens's way is timed on")
    parser.add_argument("--rows", type=int, default=512, help="features timed beside SAEDashboard and transformer-lens")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON to write; parts not run are kept")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone is not None:
        print(json.dumps(_run(options.alone, options)))
        return
    record = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    record |= {"shape": {"d": options.d, "vocabulary": options.vocabulary}}
    for part in options.parts:
        if part == "sae-lens":
            found = _compared(_alone("sae-lens ours", options), _alone("sae-lens theirs", options), options)
        else:
            found = _alone(part, options)
        record[part] = {**found, "machine": machine(torch.device("cpu"))}
        save(options.out, record)
        print(part, json.dumps(found))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
