"""Results, lenses and numbers that cannot be used: an error that names them, and no signature of NaN or infinity."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import D_MODEL
from typer.testing import CliRunner

import querylens_fast as ql
from bench.faults.payloads import PICKLES, pt
from querylens_fast.cli import app
from querylens_fast.evaluation.judge import read_answers
from querylens_fast.lens.tuned_lens import load_tuned_lens
from querylens_fast.runs.input_file import read_text


@pytest.fixture(scope="module")
def result(gpt2: ql.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result") / "whole.parquet"
    dictionary = ql.directions(torch.randn(9, D_MODEL), layer=1)
    return ql.signatures(dictionary, gpt2, preset="logit_lens_value", k=3, out=out, progress=False).path


def rewritten(result: Path, path: Path, column: str, values: pa.Array | None) -> Path:
    table = pq.read_table(result)
    metadata = {b"querylens_fast": (table.schema.metadata or {})[b"querylens_fast"]}
    place = table.column_names.index(column)
    table = table.remove_column(place) if values is None else table.set_column(place, column, values)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize("column", ["feature", "layer", "top_ids", "bottom_scores"])
@pytest.mark.parametrize("values", [None, ["x"] * 9], ids=["missing", "text"])
def test_a_result_without_its_columns_is_named(
    column: str, values: list[str] | None, result: Path, tmp_path: Path
) -> None:
    path = rewritten(result, tmp_path / "other.parquet", column, None if values is None else pa.array(values))
    for ask in (lambda: ql.search(path, 5), lambda: ql.show(path, 3)):
        with pytest.raises(ValueError, match=rf"other.parquet' is no file of signatures: {column} is missing"):
            ask()
    judged = CliRunner().invoke(app, ["judge", str(path), "--requests", str(tmp_path / "r.jsonl")])
    assert judged.exit_code == 2 and "other.parquet" in judged.stderr and not (tmp_path / "r.jsonl").exists()


IDS = pa.list_(pa.int32())


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("top_ids", pa.array([None] * 9, IDS)),
        ("top_ids", pa.array([[1] * (i % 3) for i in range(9)], IDS)),
        ("top_ids", pa.array([[None] * 3] * 9, IDS)),
        ("feature", pa.array([None] * 9, pa.int64())),
        ("top_scores", pa.array([[0.5]] * 9, pa.list_(pa.float32()))),
    ],
)
def test_rows_without_a_seal_are_looked_at(column: str, values: pa.Array, result: Path, tmp_path: Path) -> None:
    path = rewritten(result, tmp_path / "other.parquet", column, values)
    for call in (["show", str(path), "3"], ["search", str(path), "--id", "5"], ["judge", str(path), "--requests", "r"]):
        done = CliRunner().invoke(app, call)
        assert done.exit_code == 2 and f"other.parquet' is no file of signatures: {column}" in done.stderr, done.output


def test_files_larger_than_the_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"huge.jsonl' line 1 is too long"):
        read_answers(path)
    with pytest.raises(OSError, match=r"1.02e\+03 GiB does not fit into the memory there is: .*huge.jsonl"):
        read_text(path)

    def without_memory(self: Path, **given: object) -> str:
        raise MemoryError

    path.write_text("{}")
    monkeypatch.setattr(Path, "read_text", without_memory)
    with pytest.raises(OSError, match=r"does not fit into the memory there is: .*huge.jsonl"):
        read_text(path)


def test_a_pipe_in_a_model_folder_is_named(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is a pipe or device; expected a regular file"):
        ql.load_model(folder)


def test_rows_of_another_program_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"feature_index": 0, "feature": 3}\n')
    path.with_name("rows.jsonl.run.json").write_text('{"preset": "x"}')
    for ask in (lambda: ql.search(path, 5), lambda: ql.show(path, 3)):
        with pytest.raises(ValueError, match=r"rows.jsonl' line 1 is no row of signatures: \w+ is missing"):
            ask()


GOOD = {"0.weight": torch.zeros(D_MODEL, D_MODEL), "0.bias": torch.zeros(D_MODEL)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": torch.full((D_MODEL, D_MODEL), torch.nan)}, "0.weight holds NaN"),
        ({"0.bias": torch.full((D_MODEL,), torch.inf)}, "0.bias holds NaN or infinite"),
        ({"0.bias": torch.zeros(1)}, r"0.bias is \[1\], but 0.weight is \[24, 24\]"),
        ({"0.bias": torch.zeros(1, D_MODEL)}, "expected a vector"),
        ({"0.weight": torch.zeros(D_MODEL, 3)}, "expected a square matrix"),
        ({"0.weight": torch.zeros(D_MODEL, D_MODEL).long()}, "expected floats"),
    ],
)
def test_tuned_lenses(change: dict[str, torch.Tensor], message: str, gpt2: ql.Model, tmp_path: Path) -> None:
    path = tmp_path / "params.pt"
    torch.save(GOOD | change, path)
    with pytest.raises(ValueError, match=rf"params.pt': .*{message}"):
        ql.signatures(ql.directions(torch.randn(2, D_MODEL), layer=0), gpt2, preset="tuned_lens", tuned_lens=path)


@pytest.mark.parametrize("case", [case for case in PICKLES if case != "expanded view"])
def test_tuned_lenses_that_are_hostile_pickles(case: str, tmp_path: Path) -> None:
    (tmp_path / "params.pt").write_bytes(pt(PICKLES[case]))
    with pytest.raises(ValueError, match="params.pt"):
        load_tuned_lens(tmp_path / "params.pt")


def test_numbers_that_overflow_are_refused(gpt2: ql.Model, tmp_path: Path) -> None:
    vectors = torch.randn(4, D_MODEL)
    vectors[2] = 3e38
    model = ql.load_model(gpt2.name, dtype="float32")
    with pytest.raises(ValueError, match=r"feature 2: its logit_lens_value scores are not finite .*float32"):
        options = {"preset": "logit_lens_value", "k": 3, "final_norm": False, "progress": False}
        ql.signatures(ql.directions(vectors, layer=1), model, out=tmp_path / "out.parquet", **options)


def test_a_tokenizer_with_code_of_its_own_is_not_run(result: Path, gpt2_folder: Path, tmp_path: Path) -> None:
    folder, canary = tmp_path / "evil", tmp_path / "canary"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}')
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    done = CliRunner().invoke(app, ["search", str(result), "w5", "--model", str(folder)], input="y\ny\n")
    assert done.exit_code == 2 and "evil" in done.stderr and not canary.exists()
