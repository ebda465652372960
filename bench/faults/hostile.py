"""Hostile inputs for every command: files of each kind, and every argument and option given something it should not.

Each case is one call of the command line in a process of its own, with "y" on stdin. It has to end by itself, soon, in
little memory, with a message instead of a traceback, and without running what came with the input or telling secrets.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.faults.child import RAISED, Outcome, in_child
from bench.faults.files import hostile_files
from bench.faults.workload import Workload

SECRET = "correct-horse-battery-staple"
MAX_MIB = 1024.0
LIMIT_S = 30.0
CALLS = {
    "signatures": "{sae} {model} --k 4 --preset logit_lens_value --out {out}.parquet",
    "transport": "{model} {tokens} --energy none --out {out}.safetensors",
    "run": "-cn base model={model} dictionary={sae} tokens={tokens} baseline=logit_lens_value k=4 "
    "output_filename={out}.jsonl",
    "show": "{rows} 3",
    "search": "{rows} w5",
    "verify": "{rows}",
    "downstream": "--dictionary {sae} --model {model} --targets unembed --k 4 --out {out}.parquet",
    "upstream": "--dictionary {sae} --model {model} --targets embed --k 4 --out {out}.parquet",
    "flow": "--dictionary {sae} --dictionary {sae0} --k 4 --out {out}.parquet",
    "chains": "--dictionary {sae} --dictionary {sae0} --out {out}.parquet",
    "neighbours": "--dictionary {sae} --k 4 --out {out}.parquet",
    "token-features": "--dictionary {sae} --model {model} --k 4 --out {out}.parquet",
    "weight-lens": "--dictionary {sae} --earlier {sae0} --model {model} --out {out}.parquet",
    "output-features": "--dictionary {sae} --model {model} --k 4 --out {out}.parquet",
    "attention-pairs": "--attention-layer 1 --dictionary {sae0} --model {model} --k 4 --out {out}.parquet",
    "attention-profiles": "--dictionary {sae0} --model {model} --out {out}.parquet",
    "channels": "--dictionary {sae} --model {model} --tokens {tokens} --n-permutations 50 --out {out}.parquet",
    "stability": "{model} {tokens} {sae} --seeds 2 --features 5 --k 4 --out {out}.json",
    "sample": "{sae} {model} {tokens} --out {out}.parquet",
    "steer": "{sae} {model} 3 --strength 2 --prompt w5 --n-tokens 2",
    "judge": "{rows} --requests {out}.jsonl",
    "topk": "{sae}/sae_weights.safetensors:W_dec {sae}/sae_weights.safetensors:W_dec --k 4 --out {out}.safetensors",
    "export": "{sae} --format neuronpedia --model {model} --out {out} --model-id m --source-set s --k 4",
    "annotate-graph": "{graph} --model {model}",
    "convert-transport": "{transport} {out}.pt",
    "convert-features": "{features} {out}.json",
    "evaluate input": "--model {model} --dictionary {sae} --tokens {tokens} --presets logit_lens_value "
    "--k 4 --out {out}.json",
    "evaluate report": "{model} --dictionary {sae} --tokens {tokens} --out {out}",
}  # fmt: skip
"""A call of each command that works; one word of it is replaced at a time."""


class Case(NamedTuple):
    """One call with one hostile input."""

    kind: str
    name: str
    arguments: list[str]
    mentions: str = ""
    """What the message has to name, where the input is a file of the wrong content."""


def run(workload: Workload, n: int, seed: int = 0) -> dict[str, Any]:
    """Try ``n`` cases (all files where there is room, then words at random): counts and every problem."""
    place = workload.folder / "hostile"
    place.mkdir(exist_ok=True)
    names = named_files(workload, place)
    files = [Case(*case) for case in hostile_files(place, names)]
    words = list(_words(names, place))
    draw = random.Random(seed)
    draw.shuffle(files), draw.shuffle(words)
    share = min(len(files), n * 2 // 3)
    os.environ["QUERYLENS_SECRET"] = SECRET
    found: dict[str, Any] = {"hostile inputs": 0, "of": len(files) + len(words), "by": Counter(), "problems": []}
    counts, start = Counter(), time.monotonic()
    peak = slowest = 0.0
    for case in [*files[:share], *words[: n - share]]:
        ended, problems = _tried(case, place)
        found["hostile inputs"] += 1
        found["by"][case.kind] += 1
        peak, slowest = max(peak, ended.grown_mib), max(slowest, ended.seconds)
        counts.update(kind for kind, _ in problems)
        found["problems"] += [f"{kind}: {case.kind}, {case.name}: {said}" for kind, said in problems]
    kinds = ("traceback", "unexpected", "hang", "crash", "memory", "code run", "secret told", "unnamed")
    tally = {kind: counts[kind] for kind in kinds}
    rest = {"peak_mib": round(peak), "slowest_s": round(slowest, 1), "seconds": round(time.monotonic() - start, 1)}
    return {**found, "by": dict(found["by"]), **tally, **rest}


def _tried(case: Case, place: Path) -> tuple[Outcome, list[tuple[str, str]]]:
    """How one case ended, and what is wrong with that as (kind, description)."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    canary = place / "canary"

    def work() -> None:
        from querylens_fast.cli import app

        os.chdir(out)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        app(case.arguments)

    ended = in_child(work, limit_s=LIMIT_S, answers="y\n" * 9)
    call, problems = " ".join(a[:80] for a in case.arguments), []
    last = f"{call}\n    {ended.output.strip()[-400:]}"
    if ended.hung:
        problems.append(("hang", f"{call}\n    {ended.output.strip()[-1500:]}"))
    elif ended.code == RAISED or "Traceback (most recent call last)" in ended.output:
        problems.append(("traceback", f"{call}\n    {ended.output.strip()[-900:]}"))
    elif ended.code not in (0, 1, 2):
        problems.append(("crash", f"exit {ended.code}: {last}"))
    if "(unexpected: querylens-fast" in ended.output:
        problems.append(("unexpected", last))
    if ended.grown_mib > MAX_MIB:
        problems.append(("memory", f"{ended.grown_mib:.0f} MiB: {last}"))
    if canary.exists():
        canary.unlink()
        problems.append(("code run", last))
    if SECRET in ended.output or any(SECRET.encode() in p.read_bytes() for p in out.rglob("*") if p.is_file()):
        problems.append(("secret told", last))
    if case.mentions and not problems and case.mentions not in ended.output.replace("\n", ""):
        problems.append(("unnamed", f"exit {ended.code}: {last}"))
    if case.mentions and not problems and ended.code == 0:
        problems.append(("unnamed", f"taken without a word: {last}"))
    return ended, problems


def named_files(workload: Workload, place: Path) -> dict[str, str]:
    """What the words of `CALLS` stand for."""
    folder = workload.folder
    results = {"rows": "signatures, Parquet", "lines": "signatures, JSON lines", "table": "a relation"}
    found = {"sae": folder / "sae", "model": folder / "model", "tokens": folder / "tokens.safetensors"}
    found |= {"transport": workload.transport_path, "out": place / "out" / "result", "canary": place / "canary"}
    for name, job in results.items():
        kept = place / f"good_{name}"
        kept.mkdir(exist_ok=True)
        for file, data in workload.expected(workload.job(job)).items():
            (kept / file).write_bytes(data)
        found[name] = kept / workload.job(job).file
    found["sample"] = place / "sample.parquet"
    found["sample"].write_bytes(workload.expected(workload.job("a feature sample"))["out.parquet"])
    shutil.copytree(folder / "sae", place / "sae0", dirs_exist_ok=True)
    config = place / "sae0" / "cfg.json"
    config.write_text(config.read_text().replace("blocks.1.hook_resid_post", "blocks.0.hook_resid_post"))
    found["sae0"] = place / "sae0"
    found["graph"], found["features"] = place / "graph.json", place / "features.json"
    found["graph"].write_text('{"metadata": {"scan": "m"}, "nodes": [], "links": [], "qParams": {}}')
    found["features"].write_text('[{"model_id": "m", "feature": 1, "layer": 1, "type": "res"}]')
    return {name: str(path) for name, path in found.items()}


def _words(names: dict[str, str], place: Path) -> Iterator[Case]:
    """Every word of every call, and every option, replaced by something that does not belong there."""
    hostile = _hostile_words(place)
    for command, call in CALLS.items():
        words = [word.format(**names) for word in call.split()]
        path = command.split()
        for i, word in enumerate(words):
            if not word.startswith("-"):
                for name, text in hostile.items():
                    changed = f"{word.split('=')[0]}={text}" if "=" in word else text
                    yield Case(
                        f"words of {command}", f"{word[-30:]} -> {name}", [*path, *words[:i], changed, *words[i + 1 :]]
                    )
        for option in _options(path):
            for name, text in hostile.items():
                yield Case(f"options of {command}", f"{option} {name}", [*path, *words, option, text])


def _options(path: list[str]) -> list[str]:
    """The long names of a command's options that take a value."""
    import typer

    from querylens_fast.cli import app

    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return [
        option.opts[-1]
        for option in command.params
        if option.opts[-1].startswith("--") and not getattr(option, "is_flag", False)
    ]


def _hostile_words(place: Path) -> dict[str, str]:
    """Things that are no path, no number and no name that a command knows."""
    (place / "empty").mkdir(exist_ok=True)
    (place / "garbage.bin").write_bytes(bytes(range(256)) * 50)
    if not (place / "pipe").exists():
        os.mkfifo(place / "pipe")
    return {
        "a missing file": str(place / "missing.parquet"),
        "an empty folder": str(place / "empty"),
        "a pipe": str(place / "pipe"),
        "an endless device": "/dev/zero",
        "a full device": "/dev/full",
        "garbage": str(place / "garbage.bin"),
        "a folder that cannot be": "/proc/nothing/out.parquet",
        "an environment variable": "${oc.env:QUERYLENS_SECRET}",
        "a shell command": f"$(touch {place / 'canary'})",
        "nothing": "",
        "a long text": "x" * 5000,
        "not text": "\udcff\udcfe",
        "a control character": "a\x1b[31m\nb",
        "a huge number": "1" + "0" * 30,
        "a negative number": "-5",
        "zero": "0",
        "a fraction": "1.5",
        "not a number": "nan",
        "infinity": "inf",
        "a list": "[1,2]",
        "a range backwards": "9:3",
    }
