"""The server over results of a million features: how long pages and answers take, under load, and its memory.

    python -m bench serve [--features 1000000] [--k 25] [--clients 16] [--seconds 20] [--folder FOLDER] [--duckdb]
                          [--out FILE]

Writes two results (a key and a value preset) in the real format with random signatures whose tokens are as unevenly
frequent as words are (kept in the folder and used again), removes their indexes, and starts `querylens-fast serve` on
the loopback. Printed and recorded:

- from the command to the first answer of the overview, without an index and with one; the overview after that;
- searches while there is no index yet; the time until the indexes are there, and their size;
- the load: so many clients, each sending its next request when the last one is answered, of one kind of request at a
  time; median, p99, requests a second, and the server's largest resident memory. Clients run on the same cores;
- with --duckdb: building, and looking up in, a DuckDB file of one of the results, beside the index.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import querylens_fast as ql
from bench import serve_duckdb
from bench.machine import machine
from bench.record import save
from querylens_fast.lens.parquet import ParquetSink
from querylens_fast.lens.presets import PRESETS
from querylens_fast.lens.results import Signatures, Source

FOLDER = Path(tempfile.gettempdir()) / "querylens-serve"
VOCABULARY, BLOCK = 50257, 1 << 15
SKEW = 2.5
"""Token ids are V u^SKEW for uniform u: the most frequent token is in a third of all signatures."""
WARM_UP_SECONDS = 2.0


def write_result(path: Path, preset: str, n: int, k: int) -> None:
    """A result of n features with random signatures, in the format of `signatures`."""
    if path.exists():
        return
    words = [("" if i % 2 else " ") + f"w{i // 2}" for i in range(VOCABULARY)]
    model: Any = SimpleNamespace(vocab_size=VOCABULARY, str_tokens=lambda ids: [words[i] for i in ids])
    lens = PRESETS[preset]
    identity = {
        "preset": preset, **lens.as_dict(), "k": k, "dictionary": "random", "kind": "sae", "layer": 6, "n_features": n,
        "model": "random", "fingerprint": "random", "dictionary_fingerprint": "random", "features": "all",
        "transport": None,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(len(preset))
    sink = ParquetSink(path, identity, True, True, model)
    for start in range(0, n, BLOCK):
        rows = min(BLOCK, n - start)
        ids = [(VOCABULARY * torch.rand(rows, k, generator=generator) ** SKEW).long() for _ in range(2)]
        scores = [torch.randn(rows, k, generator=generator).abs().sort(1, descending=True).values for _ in range(2)]
        features = torch.arange(start, start + rows)
        statistics = {name: torch.rand(rows, generator=generator) for name in ("rel_var", "rel_var_se")}
        source = Source(lens, "random", "sae", 6, n)
        found = Signatures(source, features, scores[0], ids[0], -scores[1], ids[1], stats=statistics)
        sink.write(found, features.tolist())
    sink.finish(n)


class Server:
    """`querylens-fast serve` on a free port of the loopback."""

    def __init__(self, folder: Path) -> None:
        root = str(Path(ql.__file__).parents[1])
        command = [sys.executable, "-m", "querylens_fast", "serve", str(folder), "--port", "0"]
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[0].rstrip("/")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def memory_mib(self, name: str = "VmRSS") -> float:
        """Resident memory, or with VmHWM its largest so far, with RssAnon that which is no page of a file."""
        return memory_mib(self.process.pid, name)

    def build_memory_mib(self) -> float:
        """RssAnon of the process that makes an index; 0 where there is none."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        with suppress(OSError):
            return sum(memory_mib(int(child), "RssAnon") for path in threads for child in path.read_text().split())
        return 0.0

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def memory_mib(process: int, name: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    # A process that has just ended has no such line.
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0) / 1024


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def percentile(times: Sequence[float], share: float) -> float:
    ordered = sorted(times)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def load(address: str, paths: Sequence[str], clients: int, duration: float) -> dict[str, float]:
    """Latencies in ms of clients that each ask again as soon as they are answered."""
    host, _, port = address.removeprefix("http://").partition(":")
    times: list[float] = []
    failed, begin = 0, time.perf_counter()
    end = begin + WARM_UP_SECONDS + duration

    async def client(seed: int) -> None:
        nonlocal failed
        draw = random.Random(seed)
        reader, writer = await asyncio.open_connection(host, int(port))
        while (start := time.perf_counter()) < end:
            writer.write(f"GET {draw.choice(paths)} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            if not head.startswith(b"http/1.1 200"):
                failed += 1
            if start > begin + WARM_UP_SECONDS:
                times.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return {
        "requests": len(times),
        "failed": failed,
        "requests_per_s": len(times) / duration,
        "p50_ms": percentile(times, 0.5),
        "p90_ms": percentile(times, 0.9),
        "p99_ms": percentile(times, 0.99),
    }


def kinds(n: int, pages: bool) -> dict[str, list[str]]:
    """Requests by kind, drawn with a seed; tokens as frequent as they are in the signatures."""
    draw = random.Random(0)
    words = [f"w{int(VOCABULARY * draw.random() ** SKEW) // 2}" for _ in range(2000)]
    features = [draw.randrange(n) for _ in range(5000)]
    found = {
        "API: feature": [f"/api/v1/features/random/{i}" for i in features],
        "API: search by token": [f"/api/v1/search?text={word}&limit=25" for word in words],
        "API: search with a filter": [f"/api/v1/search?text={word}&limit=25&rel_var_max=0.2" for word in words],
        "API: list by rel_var": [
            f"/api/v1/search?order=rel_var&rel_var_min={draw.random():.4f}&limit=25" for _ in words
        ],
    }
    if pages:
        found["page: feature"] = [f"/feature/random/{i}" for i in features]
        found["page: search by token"] = [f"/search?q={word}" for word in words]
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything; the record that goes into the JSON."""
    presets = ("query_lens_key", "query_lens_value")
    files = [folder / f"{preset}-{options.features}.parquet" for preset in presets]
    for preset, path in zip(presets, files, strict=True):
        write_result(path, preset, options.features, options.k)
        path.with_name(path.name + ".index").unlink(missing_ok=True)
    record: dict[str, Any] = {"features": options.features, "k": options.k, "clients": options.clients}
    record["result_mib"] = sum(path.stat().st_size for path in files) / 2**20
    server = Server(folder)
    try:
        server.get("/api/v1/dictionaries")
        record["first_answer_s"] = time.perf_counter() - server.began
        record["search_without_index_s"] = seconds(lambda: server.get("/api/v1/search?text=w1000&limit=25"))
        anonymous = [(0.0, 0.0)]
        while not all(
            p["indexed"] for p in json.loads(server.get("/api/v1/dictionaries"))["dictionaries"][0]["presets"]
        ):
            anonymous.append((server.build_memory_mib(), server.memory_mib("RssAnon")))
            time.sleep(0.1)
        record["indexed_after_s"] = time.perf_counter() - server.began
        record["build_memory_anonymous_mib"] = max(built for built, _ in anonymous)
        record["memory_until_indexed_anonymous_mib"] = max(map(sum, anonymous))  # both processes
        record["memory_until_indexed_mib"] = server.memory_mib("VmHWM")
    finally:
        server.stop()
    record["index_mib"] = sum(path.with_name(path.name + ".index").stat().st_size for path in files) / 2**20
    server = Server(folder)
    try:
        server.get("/api/v1/dictionaries")
        record["first_answer_indexed_s"] = time.perf_counter() - server.began
        pages = False
        with suppress(urllib.error.HTTPError):
            server.get("/")
            pages = True
        overview = "/" if pages else "/api/v1/dictionaries"
        record["overview_ms"] = 1000 * sorted(seconds(lambda: server.get(overview)) for _ in range(9))[4]
        server.get("/api/v1/search?text=w1&limit=1")
        record["load"] = {
            kind: asyncio.run(load(server.address, paths, options.clients, options.seconds))
            for kind, paths in kinds(options.features, pages).items()
        }
        record["memory_mib"] = server.memory_mib("VmHWM")
    finally:
        record["exit_code"] = server.stop()
    return record


def report(record: dict[str, Any]) -> None:
    print(f"\n{record['features']:,} features, k={record['k']}, both sides, results {record['result_mib']:.0f} MiB")
    print(
        f"  first answer {record['first_answer_s']:.2f} s after the command, {record['first_answer_indexed_s']:.2f} s "
        f"with an index; overview {record['overview_ms']:.0f} ms"
    )
    print(
        f"  search without an index {record['search_without_index_s']:.2f} s; indexes ({record['index_mib']:.0f} MiB) "
        f"after {record['indexed_after_s']:.0f} s"
    )
    for kind, r in record["load"].items():
        print(
            f"  {kind:28s} p50 {r['p50_ms']:6.1f} ms  p99 {r['p99_ms']:6.1f} ms  {r['requests_per_s']:6.0f}/s"
            + (f"  FAILED {r['failed']}" if r["failed"] else "")
        )
    print(
        f"  largest memory {record['memory_mib']:.0f} MiB, {record['memory_until_indexed_mib']:.0f} until indexed; "
        f"with the process that indexes {record['memory_until_indexed_anonymous_mib']:.0f} MiB without pages of files"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=__doc__)
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=25)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, for each kind of request")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"for results, kept; default {FOLDER}")
    parser.add_argument("--duckdb", action="store_true", help="also the same look-ups in a DuckDB file")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    folder = options.folder / f"{options.features}x{options.k}"
    folder.mkdir(parents=True, exist_ok=True)
    record = measure(options, folder)
    report(record)
    if options.duckdb:
        tokens = [int(VOCABULARY * (i / 1000) ** SKEW) for i in range(1000)]
        key = folder / f"query_lens_key-{options.features}.parquet"
        record["lookups"] = serve_duckdb.compare(key, options.features, random.Random(0).sample(tokens, 1000))
        print(json.dumps(record["lookups"], indent=1))
    if options.out:
        save(options.out, {"machine": machine(torch.device("cpu")), **record})
        print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
