"""A dictionary that does not fit: time, memory and use of the result of a million features.

    python -m bench million [--features 1000000] [--d 256] [--vocabulary 50257] [--folder FOLDER] [--out FILE.json]

Makes a dictionary file of Gaussian vectors and a model of GPT-2's shape with one layer (both are kept in the folder
and used again), then computes the signatures of every feature, with the file's pages dropped from the page cache
first. Printed and recorded for each preset:

- the time, and the same product in bfloat16 without any selection, measured here on a sample of the rows;
- peak memory: the process's anonymous pages, which hold everything but mapped files, from loading the model on;
- reading: the time of the same part of the file from the disk alone, and of the whole job with and without the pages
  in memory: equal where the reads hide behind the arithmetic;
- `search` and `show` over the result: in the process, and as a command with its start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import querylens_fast as ql
from bench.machine import machine
from bench.record import save

FOLDER = Path(tempfile.gettempdir()) / "querylens-million"
CHUNK = 1 << 15
HIDING_FEATURES = 1 << 16
N_SEARCHES = 20
GEMM_ROWS = 512


def write_dictionary(path: Path, n: int, d: int) -> None:
    """A safetensors file of W_dec [n, d] float32, Gaussian, seeded, written in chunks."""
    if path.exists():
        return
    header = json.dumps({"W_dec": {"dtype": "F32", "shape": [n, d], "data_offsets": [0, 4 * n * d]}}).encode()
    header += b" " * (-len(header) % 8)
    generator, partial = torch.Generator().manual_seed(0), path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, n, CHUNK):
            file.write(torch.randn(min(CHUNK, n - start), d, generator=generator).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_model(folder: Path, d: int, vocabulary: int) -> None:
    """A random GPT-2 of one layer whose tokens are words with and without a leading space."""
    if folder.exists():
        return
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocabulary, n_embd=d, n_layer=1, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words = {("" if i % 2 else " ") + f"w{i // 2}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def drop_pages(path: Path) -> None:
    """Take a file's clean pages out of the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_mib() -> float:
    """Anonymous resident memory of this process: everything but pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """The largest anonymous memory in MiB so far, looked at every 10 ms."""
    peak, stop = anonymous_mib(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, anonymous_mib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        stop.set()
        thread.join()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gemm_seconds(W: torch.Tensor, n: int) -> float:
    """The product of n rows with W in bfloat16 and nothing else, from blocks of `GEMM_ROWS` rows."""
    narrow = W.bfloat16()
    rows = torch.randn(GEMM_ROWS, W.shape[1]).bfloat16()
    out = torch.empty(GEMM_ROWS, len(W), dtype=torch.bfloat16)
    times = [seconds(lambda: torch.mm(rows, narrow.T, out=out)) for _ in range(12)]
    return statistics.median(times[2:]) * n / GEMM_ROWS


def run_once(dictionary: ql.Dictionary, model: ql.Model, out: Path, options: dict[str, Any]) -> float:
    """Seconds of the whole job, from nothing to the finished file."""
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_name(f"{out.name}.parts"), ignore_errors=True)
    return seconds(lambda: ql.signatures(dictionary, model, out=out, **options))


def reading(path: Path, dictionary: ql.Dictionary, model: ql.Model, out: Path, options: dict[str, Any]) -> dict:
    """What reading costs: the file alone, and the job with its pages out of memory and in it, medians of three."""
    n = min(HIDING_FEATURES, dictionary.n_features)
    options = {**options, "features": f"0:{n}", "progress": False}
    alone, cold, warm = [], [], []
    for _ in range(3):
        drop_pages(path)
        alone.append(seconds(lambda: [dictionary.values(slice(i, min(i + CHUNK, n))) for i in range(0, n, CHUNK)]))
        drop_pages(path)
        cold.append(run_once(dictionary, model, out, options))
        warm.append(run_once(dictionary, model, out, options))
    times = {"read_alone_s": alone, "job_cold_s": cold, "job_warm_s": warm}
    return {"features": n, **{name: statistics.median(values) for name, values in times.items()}}


def use(result: Path, vocabulary: int) -> dict[str, float]:
    """Seconds of searches (median and worst over tokens, both sides) and of showing one feature."""
    ids = torch.randint(0, vocabulary, (N_SEARCHES,), generator=torch.Generator().manual_seed(1)).tolist()

    def both_sides(token: Any) -> None:
        for side in ("top", "bottom"):
            ql.search(result, token, side=side)

    by_id = [seconds(lambda token=token: both_sides(token)) for token in ids]
    by_string = [seconds(lambda token=token: both_sides(f"w{token // 2}")) for token in ids]
    last = int(ql.search(result, ids[0]).features[0])
    command = [sys.executable, "-m", "querylens_fast"]
    environment = {**os.environ, "PYTHONPATH": str(Path(ql.__file__).parents[1])}

    def call(*arguments: str) -> float:
        return seconds(lambda: subprocess.run([*command, *arguments], check=True, capture_output=True, env=environment))

    return {
        "search_id_s": statistics.median(by_id),
        "search_id_worst_s": max(by_id),
        "search_string_s": statistics.median(by_string),
        "search_string_worst_s": max(by_string),
        "show_s": seconds(lambda: ql.show(result, last)),
        "search_command_s": call("search", str(result), "w17"),
        "command_start_s": call("--help"),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything for one width and size; the record that goes into the JSON."""
    n, d, V = options.features, options.d, options.vocabulary
    path, model_folder = folder / f"dictionary-{n}x{d}.safetensors", folder / f"model-{d}x{V}"
    write_dictionary(path, n, d)
    write_model(model_folder, d, V)
    record: dict[str, Any] = {
        "shape": {"features": n, "d": d, "V": V, "k": options.k},
        "dictionary_mib": path.stat().st_size / 2**20,
        "presets": {},
    }
    with peak_memory() as peak:
        record["start_mib"] = anonymous_mib()
        model = ql.load_model(model_folder)
        dictionary = ql.load_dictionary(path, layer=0)
        record["model_mib"] = anonymous_mib() - record["start_mib"]
        tokens = ql.Tokens(torch.randint(0, V, (2, 8)), torch.ones(2, 8, dtype=torch.bool))
        for preset in options.preset:
            job: dict[str, Any] = {"preset": preset, "k": options.k}
            if preset.startswith("query_lens"):
                job["transport"] = ql.fit_transport(model, tokens, progress=False)
            out = folder / f"{preset}-{n}x{d}.parquet"
            drop_pages(path)
            before = gemm_seconds(model.W_U, n)
            elapsed = run_once(dictionary, model, out, job)
            record["presets"][preset] = found = {
                "elapsed_s": elapsed,
                "features_per_s": n / elapsed,
                # Before and after, because another process makes either slow.
                "gemm_bf16_alone_s": min(before, gemm_seconds(model.W_U, n)),
                "peak_anonymous_mib": peak(),
                "result_mib": out.stat().st_size / 2**20,
                "use": use(out, V),
                "reading": reading(path, dictionary, model, folder / "reading.parquet", job),
            }
            found["ratio_to_gemm"] = elapsed / found["gemm_bf16_alone_s"]
    return record


def report(record: dict[str, Any]) -> None:
    shape = record["shape"]
    print(f"\n{shape['features']:,} features, d={shape['d']}, V={shape['V']:,}, k={shape['k']}, both sides")
    print(f"  dictionary file {record['dictionary_mib']:.0f} MiB, model {record['model_mib']:.0f} MiB in memory")
    for preset, r in record["presets"].items():
        use, read = r["use"], r["reading"]
        print(f"  {preset}: {r['elapsed_s']:.1f} s, {r['features_per_s']:.0f} features/s")
        print(f"    {r['ratio_to_gemm']:.2f} x the bfloat16 GEMM alone ({r['gemm_bf16_alone_s']:.1f} s)")
        print(f"    peak memory {r['peak_anonymous_mib']:.0f} MiB above mapped files; result {r['result_mib']:.0f} MiB")
        print(
            f"    search {use['search_id_s']:.2f} s by id, {use['search_string_s']:.2f} s by string, both sides (worst "
            f"{use['search_string_worst_s']:.2f}); as a command {use['search_command_s']:.2f} s, of which start "
            f"{use['command_start_s']:.2f}; show {use['show_s']:.3f} s"
        )
        print(
            f"    reading {read['features']:,} features: {read['read_alone_s']:.2f} s alone; "
            f"job {read['job_cold_s']:.2f} s from the disk, {read['job_warm_s']:.2f} s from memory"
        )


def merged(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of an earlier file with this one's presets put in or replaced."""
    cases = json.loads(path.read_text())["cases"] if path.exists() else []
    for case in cases:
        if case["shape"] == record["shape"]:
            record = {**record, "presets": case["presets"] | record["presets"]}
    return [case for case in cases if case["shape"] != record["shape"]] + [record]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench million", description=__doc__)
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--k", type=int, default=25)
    parser.add_argument("--preset", action="append", help="default: logit_lens_value and query_lens_value")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"for files of some GB, kept; default {FOLDER}")
    parser.add_argument("--out", type=Path, help="JSON to write; what one holds of other presets and shapes stays")
    options = parser.parse_args(arguments)
    options.preset = options.preset or ["logit_lens_value", "query_lens_value"]
    options.folder.mkdir(parents=True, exist_ok=True)
    record = measure(options, options.folder)
    report(record)
    if options.out:
        save(options.out, {"machine": machine(torch.device("cpu")), "cases": merged(options.out, record)})
        print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
