"""Features × features on the CPU: time, peak memory, ratio to chunked torch. ``python -m bench relations --help``.

The product is `querylens_fast.downstream` as a user calls it: two dictionaries in files, virtual weights of every
feature with every other, both sides, streamed to Parquet, in a fresh process whose peak resident memory is read at its
end. Chunked torch (a chunk of the product and two torch.topk) is timed on some of the rows, in turns with ours on the
same rows, and extrapolated by rows: its cost is proportional to them. Results are compared with float64 before any time
is reported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.machine import machine
from bench.record import RESULTS, save
from bench.timing import measure
from bench.topk import torch_topk, true_scores, worst_error
from querylens_fast.topk.api import streamed_topk

DEFAULT_OUT = RESULTS / "cpu-relations.json"


def write_dictionaries(folder: Path, n: int, d: int) -> tuple[Path, Path]:
    """Two dictionaries of n Gaussian features: values of layer 0 to read from, keys of layer 1 that read."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    early, late = folder / "early.safetensors", folder / "late.safetensors"
    save_file({"W_dec": torch.randn(n, d, generator=generator) / d**0.5}, str(early))
    save_file({"W_enc": (torch.randn(n, d, generator=generator) / d**0.5).T.contiguous()}, str(late))
    return early, late


def whole_product(folder: Path, d: int, k: int) -> dict[str, Any]:
    """In this process: the whole table, its time, its rows and the process's peak resident memory."""
    import transformers

    import querylens_fast as ql

    config = transformers.GPT2Config(
        vocab_size=64, n_embd=d, n_layer=2, n_head=d // 64, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = ql.as_model(transformers.AutoModelForCausalLM.from_config(config).eval())
    early = ql.load_dictionary(folder / "early.safetensors", layer=0)
    late = ql.load_dictionary(folder / "late.safetensors", layer=1)
    before_mib = _status("VmHWM")
    start = time.perf_counter()
    found = ql.downstream(early, model, targets=late, k=k, out=folder / "table.parquet")
    seconds = time.perf_counter() - start
    assert isinstance(found, ql.RelationTable)
    return {
        "seconds": seconds,
        "rows": len(found),
        "file_mib": (folder / "table.parquet").stat().st_size / 2**20,
        "peak_mib": _status("VmHWM"),
        "peak_before_mib": before_mib,
    }


def _status(field: str) -> float:
    """MiB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def check_table(folder: Path, k: int, n_rows: int = 16) -> float:
    """Largest error of some features' scores in the table against float64; raises SystemExit when it is too large."""
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    V = load_file(str(folder / "early.safetensors"))["W_dec"]
    U = load_file(str(folder / "late.safetensors"))["W_enc"].T
    ids = torch.linspace(0, len(V) - 1, n_rows).long()
    exact = V[ids].double() @ U.double().T
    table = pq.read_table(folder / "table.parquet", filters=[("source_id", "in", ids.tolist())])
    scores = torch.tensor(table["score"].to_numpy(), dtype=torch.float64).view(n_rows, 2, k)
    found = torch.tensor(table["target_id"].to_numpy()).view(n_rows, 2, k)
    expected = torch.stack([exact.topk(k).values, exact.topk(k, largest=False).values], 1)
    error = float((scores - expected).abs().max())
    of_ids = float((exact.gather(1, found.flatten(1)).view_as(expected) - expected).abs().max())
    if max(error, of_ids) > 1e-5:
        raise SystemExit(f"wrong results: error {max(error, of_ids):.3g}; no time reported")
    return max(error, of_ids)


def against_torch(folder: Path, rows: int, k: int, repeat: int) -> dict[str, Any]:
    """Ours and chunked torch on the same rows, in turns, as milliseconds."""
    from safetensors.torch import load_file

    F = load_file(str(folder / "early.safetensors"))["W_dec"][:rows]
    W = load_file(str(folder / "late.safetensors"))["W_enc"].T.contiguous()
    worst = worst_error(streamed_topk(F, W, k), *true_scores(F, W), k)
    peers: dict[str, Callable[[], object]] = {
        "ours": lambda: streamed_topk(F, W, k),
        "torch chunked + 2 x topk": lambda: torch_topk(F, W, k),
    }
    return {"rows": rows, "error": worst, "times": measure(peers, F.device, repeat)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench relations", description=__doc__)
    parser.add_argument("--features", type=int, default=131_072)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2048, help="rows on which chunked torch is timed")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON to write")
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.in_folder is not None:
        print(json.dumps(whole_product(options.in_folder, options.d, options.k)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dictionaries(folder, options.features, options.d)
        sizes = ["--d", str(options.d), "--k", str(options.k)]
        command = [sys.executable, "-m", "bench", "relations", "--in-folder", name, *sizes]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        whole = json.loads(done.stdout.splitlines()[-1])
        error = check_table(folder, options.k)
        part = against_torch(folder, options.rows, options.k, options.repeat)
    torch_s = part["times"]["torch chunked + 2 x topk"]["p50_ms"] / 1e3 * options.features / options.rows
    record = {
        "machine": machine(torch.device("cpu")),
        "shape": {"features": options.features, "readers": options.features, "d": options.d, "k": options.k},
        "whole": whole | {"error": error, "tflops": 2e-12 * options.features**2 * options.d / whole["seconds"]},
        "part": part,
        "torch_extrapolated_seconds": torch_s,
        "speedup_whole_over_torch": torch_s / whole["seconds"],
    }
    save(options.out, record)
    print(f"{options.features} x {options.features} features, d={options.d}, top and bottom {options.k}")
    print(f"  downstream to Parquet   {whole['seconds']:8.1f} s, peak {whole['peak_mib'] / 1024:.2f} GiB")
    print(f"  chunked torch           {torch_s:8.1f} s, extrapolated from {options.rows} rows")
    print(f"  ratio                   {record['speedup_whole_over_torch']:8.2f}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
