"""Small jobs of every kind that write results: what is killed, starved and damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import save_file

import querylens_fast as ql
from bench.faults.child import Outcome, in_child
from querylens_fast.lens.jsonl import JsonlSink
from querylens_fast.runs.part_writer import PartWriter

N, D, VOCABULARY, BLOCK = 60, 16, 96, 10
OPTIONS = {"k": 8, "block_rows": BLOCK, "progress": False}
_HOOK = "blocks.1.hook_resid_post"


@dataclass(frozen=True)
class Job:
    """Writes a result to a path; the same bytes each time."""

    name: str
    file: str
    """The result's name in its folder."""
    write: Callable[[Path], object]
    share: float = 1.0
    """Of the kills that other jobs get; less for those that take seconds."""


@dataclass
class Workload:
    """A model, a dictionary, a sample and a transport in ``folder``, and the jobs on them."""

    folder: Path
    _expected: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pa.array(np.zeros(1))  # imports pandas: once, not in every child
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(self.folder / "model")
        save_dictionary(self.folder / "sae")
        self.model = ql.load_model(self.folder / "model")
        self.dictionary = ql.load_dictionary(self.folder / "sae")
        ids = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(1))
        self.tokens = ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        self.tokens.save(self.folder / "tokens.safetensors")
        done = in_child(lambda: ql.fit_transport(self.model, self.tokens, progress=False).save(self.transport_path))
        if done.code:
            raise RuntimeError(f"the transport could not be fitted:\n{done.output}")

    @property
    def transport_path(self) -> Path:
        return self.folder / "transport.safetensors"

    @cached_property
    def jobs(self) -> list[Job]:
        def signatures(preset: str, **more: object) -> Callable[[Path], object]:
            return lambda out: ql.signatures(self.dictionary, self.model, preset=preset, out=out, **{**OPTIONS, **more})

        def downstream(out: Path) -> object:
            return ql.downstream(self.dictionary, self.model, targets="unembed", k=4, out=out, progress=False)

        def sample(out: Path) -> object:
            return ql.feature_sample(self.dictionary, self.model, self.tokens, out=out)

        def run(out: Path) -> object:
            from querylens_fast.analysis.run import run

            given = {"model": self.folder / "model", "dictionary": self.folder / "sae", "output_filename": out}
            more = {"tokens": self.folder / "tokens.safetensors", "baseline": "token_change", "block_rows": 5, "k": 4}
            rest = {"features": "0:20", "device": "cpu", "dtype": "float32", "progress": "false"}
            return run("base", [f"{key}={value}" for key, value in {**given, **more, **rest}.items()])

        return [
            Job("signatures, Parquet", "out.parquet", signatures("logit_lens_value")),
            Job("signatures, JSON lines", "out.jsonl", signatures("logit_lens_value")),
            Job("ablations with their sample", "out.parquet", signatures("token_change", tokens=self.tokens)),
            Job("a relation", "out.parquet", downstream),
            Job("a run by configuration", "out.jsonl", run),
            Job("a transport", "out.safetensors", lambda out: ql.load_transport(self.transport_path).save(out)),
            Job("a token sample", "out.safetensors", self.tokens.save),
            Job("a feature sample", "out.parquet", sample),
            Job("an evaluation report", "out", self._report, share=0.2),
            Job("a Neuronpedia export", "out", self._export),
        ]

    def _report(self, out: Path) -> object:
        prefixes = torch.arange(3, 15).reshape(3, 4)
        methods = ["logit_lens_value", "query_lens_value"]
        options = {"methods": methods, "k": (3,), "n_features": 4, "min_examples": 1, "prefixes": prefixes}
        return ql.evaluation_report(self.model, [self.dictionary], self.tokens, out, progress=False, **options)

    def _export(self, out: Path) -> object:
        options = {"model_id": "m", "source_set": "s", "k": 4, "rows_per_file": 20, "neighbours": 3}
        return ql.export_neuronpedia(self.dictionary, self.model, out, **options)

    def job(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)

    def expected(self, job: Job) -> dict[str, bytes]:
        """The files of a run that nothing interrupted, by name."""
        if job.name not in self._expected:
            folder = self.folder / "expected" / job.name.replace(" ", "_")
            folder.mkdir(parents=True)
            done = in_child(lambda: job.write(folder / job.file))
            if done.code:
                raise RuntimeError(f"{job.name} fails by itself:\n{done.output}")
            self._expected[job.name] = files_of(folder)
        return self._expected[job.name]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path there; config.yaml without the path of its own result."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: b"\n".join(line for line in data.split(b"\n") if not line.startswith(b"output_filename"))
        if name.endswith(".yaml")
        else data
        for name, data in found.items()
    }


def save_model(folder: Path) -> None:
    """A random GPT-2 of two layers and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    words = {("" if i % 2 else " ") + f"w{i // 2}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def save_dictionary(folder: Path) -> None:
    """A sparse autoencoder as sae-lens saves one."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, str(folder / "sae_weights.safetensors"))
    config = {"architecture": "standard", "d_in": D, "d_sae": N, "dtype": "float32", "apply_b_dec_to_input": True}
    more = {"metadata": {"hook_name": _HOOK, "model_name": "gpt2", "sae_lens_version": "6.0.0"}}
    (folder / "cfg.json").write_text(json.dumps({**config, **more}))


def logged(write: Callable[[], object], log: Path) -> Callable[[], object]:
    """``write`` that notes in ``log`` each block of rows whose writing has returned; for a child process."""

    def work() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(result: Path, start: int) -> None:
            os.write(file, f"{result.name} {start}\n".encode())

        part, rows = PartWriter.write, JsonlSink.write

        def write_part(writer: PartWriter, start: int, table: object) -> None:
            part(writer, start, table)  # type: ignore[arg-type]
            note(writer.path, start)

        def write_rows(sink: JsonlSink, found: object, indices: list[int], names: object = None) -> None:
            rows(sink, found, indices, names)  # type: ignore[arg-type]
            for index in indices:
                note(sink.path, index)

        PartWriter.write, JsonlSink.write = write_part, write_rows  # type: ignore[method-assign]
        write()

    return work


def noted(log: Path) -> list[str]:
    """Result and first row of each block that is written."""
    return log.read_text().splitlines() if log.exists() else []


def resumed(workload: Workload, job: Job, out: Path, log: Path) -> tuple[Outcome, list[str]]:
    """Run a job that was stopped again: (how it ended, what is not as it has to be)."""
    before = noted(log)
    done = in_child(logged(lambda: job.write(out), log))
    if done.code:
        return done, [f"the resumed run failed: {done.output.strip()[:900]}"]
    problems = []
    again = sorted(set(before) & set(noted(log)[len(before) :]))
    if again:
        problems.append(f"rows {again} were written and computed again")
    found, expected = files_of(out.parent), workload.expected(job)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in expected:
            problems.append(f"{name} was left over")
        elif found[name] != expected[name]:
            problems.append(f"{name} has other bytes than that of an unbroken run")
    return done, problems
