"""Ctrl-C at random moments of every long command, then the same command again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.faults.child import Outcome, in_child
from bench.faults.hostile import named_files
from bench.faults.workload import Workload, files_of

STOPPED = 130
CALLS = {
    "signatures": "signatures {sae} {model} --k 4 --preset logit_lens_value --block-rows 5 --out out.parquet",
    "signatures, JSON lines": "signatures {sae} {model} --k 4 --preset query_lens_value --transport {transport} "
    "--block-rows 5 --out out.jsonl",
    "transport": "transport {model} {tokens} --groups 2 --n-probes 4 --energy probes --out out.safetensors",
    "run": "run -cn base model={model} dictionary={sae} tokens={tokens} baseline=token_change features=0:20 k=4 "
    "block_rows=4 device=cpu dtype=float32 output_filename=out.jsonl",
    "sample": "sample {sae} {model} {tokens} --out out.parquet --lists lists.json --features 5 --min-examples 1",
    "judge": "judge {rows} --model {model} --requests out.jsonl",
    "stability": "stability {model} {tokens} {sae} --seeds 2 --features 5 --k 4 --out out.json",
    "downstream": "downstream --dictionary {sae} --model {model} --targets unembed --k 4 --out out.parquet",
    "neuronpedia": "export {sae} --format neuronpedia --model {model} --out out --model-id m --source-set s --k 4",
    "saedashboard": "export {sae} --format saedashboard --model {model} --out out --k 4 --rows-per-file 9",
    "circuit-tracer": "export {sae0} {sae} --format circuit-tracer --model {model} --out out --transcoder-id m --k 4",
    "delphi": "export {sae} --format delphi --model {model} --out out --hookpoint layers.1 --k 4 --neighbours 5",
    "scores": "evaluate scores {model} {sae} --tokens {tokens} --min-examples 1 --n-features 4 --k 3 "
    "--prefixes {prefixes} --out out",
    "report": "evaluate report {model} {sae} --tokens {tokens} --min-examples 1 --n-features 4 --k 3 "
    "--methods logit_lens_value,query_lens_value --prefixes {prefixes} --out out",
}  # fmt: skip


def run(workload: Workload, n: int, seed: int = 0) -> dict[str, Any]:
    """Interrupt ``n`` runs (about) and start each again: counts and every problem."""
    draw, place = random.Random(seed), workload.folder / "interrupted"
    place.mkdir(exist_ok=True)
    names = named_files(workload, place)
    (place / "prefixes.txt").write_text("".join(f" w{i}\n" for i in range(1, 6)))
    names["prefixes"] = str(place / "prefixes.txt")
    share, start = max(1, n // len(CALLS)), time.monotonic()
    found: dict[str, Any] = {"interrupts": 0, "stopped": 0, "problems": []}
    for name, call in CALLS.items():
        words = [word.format(**names) for word in call.split()]
        whole, expected = _called(words, place / "whole")
        if whole.code:
            found["problems"].append(f"{name} fails by itself: {whole.output[-600:]}")
            continue
        for part in range(share):
            moment = whole.seconds * (part + draw.random()) / share
            stopped, _ = _called(words, place / "stopped", moment)
            again, files = _called(words, place / "stopped", fresh=False)
            found["interrupts"] += 1
            found["stopped"] += stopped.code == STOPPED
            said = [*_problems(stopped), *([f"again: {again.output[-600:]}"] if again.code else [])]
            other = sorted(file for file in expected.keys() | files.keys() if expected.get(file) != files.get(file))
            said += [f"again: other bytes in {other}"] if other and not again.code else []
            found["problems"] += [f"{name}, after {moment:.2f} s ({stopped.code}): {one}" for one in said]
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def _called(
    words: list[str], folder: Path, after_s: float | None = None, fresh: bool = True
) -> tuple[Outcome, dict[str, bytes]]:
    """How a command ended in a folder, and the files there."""
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    ended = in_child(_command(words, folder), after_s=after_s, after_signal=signal.SIGINT, limit_s=60)
    return ended, files_of(folder)


def _command(words: list[str], folder: Path) -> Callable[[], None]:
    def work() -> None:
        from querylens_fast.cli import app

        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        app(words)

    return work


def _problems(stopped: Outcome) -> list[str]:
    """What is wrong with how an interrupted command ended; one that was done already may have ended well."""
    lines = stopped.output.strip().splitlines() or [""]
    if stopped.hung:
        return [f"it hangs: {stopped.output[:900]}"]
    if "Traceback" in stopped.output or "Exception ignored" in stopped.output or stopped.code not in (0, STOPPED):
        return [f"it ends badly: {stopped.output[-900:]}"]
    if stopped.code == STOPPED and not ("stopped" in lines[-1] and "again" in lines[-1]):
        return [f"it does not say how to go on: {lines[-1]}"]
    return []
