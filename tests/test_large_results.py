"""Runs that are stopped and results that are used: kills at any moment, full disks, corrupt files, readers, search."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import D_MODEL, VOCAB
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.lens.compute import BLOCK_BYTES, MAX_BLOCK_ROWS, MIN_BLOCK_ROWS, rows_per_block
from querylens_fast.lens.parquet import ROW_GROUP, ParquetSink
from querylens_fast.lens.planning import plan

K = 5


def dictionary_file(path: Path, n: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    save_file({"W_dec": torch.randn(n, D_MODEL, generator=generator)}, str(path))
    return path


def run_arguments(dictionary: Path, model: Path, out: Path) -> list[str]:
    return [
        *("signatures", str(dictionary), str(model), "--layer", "1"),
        *("--preset", "logit_lens_value", "--k", "20", "--block-rows", "1000", "--out", str(out)),
    ]


@pytest.fixture(scope="module")
def long_run(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A dictionary of 60 blocks, and the bytes of the result that nobody interrupted."""
    folder = tmp_path_factory.mktemp("long")
    path = dictionary_file(folder / "dictionary.safetensors", 60_000)
    out = folder / "unbroken.parquet"
    assert CliRunner().invoke(app, run_arguments(path, gpt2_folder, out)).exit_code == 0
    return path, out.read_bytes()


def state(out: Path) -> tuple[int, bool]:
    """(parts on the disk, has the join of the parts begun) of a run."""
    parts = out.with_name(out.name + ".parts")
    return len(list(parts.glob("part-*.parquet"))), any(parts.glob(f"{out.name}.*.partial"))


def test_killed_runs_end_in_the_same_bytes(long_run: tuple[Path, bytes], gpt2_folder: Path, tmp_path: Path) -> None:
    """SIGKILL after the first block, in the middle, in the join, and at random: the file is the unbroken run's."""
    dictionary, unbroken = long_run
    out = tmp_path / "out.parquet"
    command = run_arguments(dictionary, gpt2_folder, out)

    def killed_when(condition) -> None:
        process = subprocess.Popen([sys.executable, "-m", "querylens_fast", *command], stderr=subprocess.DEVNULL)
        while process.poll() is None and not condition():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()

    seen = []
    for condition in (
        lambda: state(out)[0] >= 1,
        lambda: state(out)[0] >= seen[-1] + random.Random(0).randint(2, 20),
        lambda: state(out)[1],
    ):
        killed_when(condition)
        seen.append(state(out)[0])
        assert not out.exists()
    assert 1 <= seen[0] < seen[1] < seen[2] == 60
    assert "60000 signatures" in CliRunner().invoke(app, command).stdout
    assert out.read_bytes() == unbroken
    assert not out.with_name(out.name + ".parts").exists()


@pytest.mark.slow
def test_two_runs_of_one_result(long_run: tuple[Path, bytes], gpt2_folder: Path, tmp_path: Path) -> None:
    """The second is refused while the first writes, and finds the result once it is there."""
    dictionary, unbroken = long_run
    out = tmp_path / "out.parquet"
    command = run_arguments(dictionary, gpt2_folder, out)
    first = subprocess.Popen([sys.executable, "-m", "querylens_fast", *command], stderr=subprocess.DEVNULL)
    while state(out)[0] < 1:
        assert first.poll() is None
        time.sleep(0.0005)
    refused = CliRunner().invoke(app, command)
    assert first.wait() == 0
    assert refused.exit_code == 2 and "another run is writing" in refused.stderr
    assert CliRunner().invoke(app, command).exit_code == 0
    assert out.read_bytes() == unbroken and [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


def test_a_result_that_misses_rows_is_refused(gpt2: ql.Model, tmp_path: Path) -> None:
    """A part that vanished, and a file that an earlier version finished without all its parts."""
    dictionary, out = ql.directions(torch.randn(90, D_MODEL), layer=1), tmp_path / "out.parquet"
    options = {"preset": "logit_lens_value", "k": K, "out": out, "block_rows": 30, "progress": False}
    finish = ParquetSink.finish

    def finish_without_one(sink: ParquetSink, n: int) -> object:
        sorted(sink.writer.parts.glob("part-*"))[1].unlink()
        return finish(sink, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParquetSink, "finish", finish_without_one)
        with pytest.raises(ValueError, match=r"out.parquet.parts' holds 60 rows of 90"):
            ql.signatures(dictionary, gpt2, **options)
    assert not out.exists()
    ql.signatures(dictionary, gpt2, **options)
    table = pq.read_table(out)
    pq.write_table(table.slice(0, 60), out)
    with pytest.raises(ValueError, match=r"out.parquet' holds 60 rows of 90; delete it"):
        ql.signatures(dictionary, gpt2, **options)


def test_no_features_chosen(gpt2: ql.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features='5:5' chooses none of 90"):
        ql.signatures(
            ql.directions(torch.randn(90, D_MODEL), layer=1), gpt2, preset="logit_lens_value", features="5:5",
            out=tmp_path / "out.parquet",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_after_its_last_step_leaves_nothing(
    long_run: tuple[Path, bytes], gpt2_folder: Path, tmp_path: Path
) -> None:
    """Between the whole file's arrival and the parts' removal."""
    dictionary, unbroken = long_run
    out = tmp_path / "out.parquet"
    out.write_bytes(unbroken)
    parts = out.with_name(out.name + ".parts")
    parts.mkdir()
    (parts / "part-000000000000.parquet").write_bytes(b"left over")
    assert CliRunner().invoke(app, run_arguments(dictionary, gpt2_folder, out)).exit_code == 0
    assert out.read_bytes() == unbroken and not parts.exists()


def test_a_resumed_run_does_not_take_another_dictionary(
    gpt2: ql.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was replaced by another of the same name and shape while the run was stopped."""
    path = dictionary_file(tmp_path / "d.safetensors", 50)
    out = tmp_path / "out.parquet"
    options = {"preset": "logit_lens_value", "k": K, "out": out, "progress": False}
    ql.signatures(ql.load_dictionary(path, layer=1), gpt2, **options)
    dictionary_file(path, 50, seed=1)
    with pytest.raises(FileExistsError, match="different: dictionary_fingerprint"):
        ql.signatures(ql.load_dictionary(path, layer=1), gpt2, **options)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root; the file-size limit in test_signatures stands for it")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(long_run: tuple[Path, bytes], gpt2_folder: Path, small_disk: Path) -> None:
    """The disk fills among the parts; with room the run goes on and ends in the unbroken run's bytes."""
    dictionary, unbroken = long_run
    out = small_disk / "out.parquet"
    command = run_arguments(dictionary, gpt2_folder, out)
    failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 2
    assert "No space left on device" in failed.stderr and "is kept; run the same call again" in failed.stderr
    n_parts, _ = state(out)
    assert 0 < n_parts < 60
    for part in out.with_name(out.name + ".parts").glob("part-*.parquet"):
        assert pq.read_table(part).num_rows == 1000
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert out.read_bytes() == unbroken


def test_a_damaged_part_is_named_and_computed_again(
    gpt2: ql.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.parquet"
    options = {"preset": "logit_lens_value", "k": K, "out": out, "block_rows": 10, "progress": False}
    dictionary = ql.load_dictionary(dictionary_file(tmp_path / "d.safetensors", 50), layer=1)
    with monkeypatch.context() as stopped:
        stopped.setattr(ParquetSink, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match="out.parquet' is kept; run the same call again"):
            ql.signatures(dictionary, gpt2, **options)
    part = tmp_path / "out.parquet.parts" / "part-000000000020.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    ql.signatures(dictionary, gpt2, **options)
    assert "part-000000000020.parquet' is damaged" in caplog.text
    assert pq.read_table(out)["feature"].to_pylist() == list(range(50))


def test_a_corrupt_slice_stops_the_run_before_it_begins(gpt2: ql.Model, tmp_path: Path) -> None:
    """NaN in the middle of the file: file, tensor, feature and rows are named, and nothing is left behind."""
    weights = torch.randn(100, D_MODEL)
    healthy = weights.clone()
    weights[57, 3] = torch.nan
    path, out = tmp_path / "d.safetensors", tmp_path / "out.parquet"
    save_file({"W_dec": weights}, str(path))
    options = {"preset": "logit_lens_value", "k": K, "out": out, "block_rows": 10, "progress": False}
    said = r"feature 57 holds NaN .*1 such in rows {} of tensor 'W_dec' of .*d\.saf"
    with pytest.raises(ValueError, match=said.format("0 to 99")):
        ql.signatures(ql.load_dictionary(path, layer=1), gpt2, **options)
    assert not (tmp_path / "out.parquet.parts").exists()
    with pytest.raises(ValueError, match=said.format("50 to 59")):  # read in the background, not to a file
        ql.signatures(ql.load_dictionary(path, layer=1), gpt2, **{**options, "out": None})
    part = ql.signatures(ql.load_dictionary(path, layer=1), gpt2, **{**options, "out": None}, features="0:57")
    assert len(part) == 57
    weights[57] = healthy[57]
    save_file({"W_dec": weights}, str(path))
    ql.signatures(ql.load_dictionary(path, layer=1), gpt2, **options)
    assert pq.read_table(out)["feature"].to_pylist() == list(range(100))


def cut_short(path: Path, copy: Path) -> Path:
    copy.write_bytes(path.read_bytes()[:-9])
    return copy


def test_a_file_cut_short_while_it_is_read(gpt2: ql.Model, tmp_path: Path) -> None:
    path = dictionary_file(tmp_path / "d.safetensors", 5000)
    dictionary = ql.load_dictionary(path, layer=1)
    with pytest.raises(ValueError, match="is damaged or truncated"):
        ql.load_dictionary(cut_short(path, tmp_path / "cut.safetensors"), layer=1)
    assert dictionary.fingerprint  # reads the last row, as a run does before its first block
    os.truncate(path, path.stat().st_size - 4 * D_MODEL * 1500)
    options = {"preset": "logit_lens_value", "k": K, "block_rows": 1000, "progress": False}
    with pytest.raises(ValueError, match=r"tensor 'W_dec' of .* ends early, at row 3000 or after it: the file is tr"):
        ql.signatures(dictionary, gpt2, out=tmp_path / "out.parquet", **options)
    assert len(list((tmp_path / "out.parquet.parts").glob("part-*.parquet"))) == 3


def test_the_bar_starts_where_the_run_goes_on(gpt2: ql.Model, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Features, rate and time left; what an earlier run did is not counted into the rate."""
    weights = torch.randn(4000, D_MODEL)
    path = tmp_path / "d.safetensors"
    save_file({"W_dec": weights}, str(path))
    dictionary = ql.load_dictionary(path, layer=1)
    assert dictionary.fingerprint
    os.truncate(path, path.stat().st_size - 4 * D_MODEL * 1500)
    options = {"preset": "logit_lens_value", "k": K, "out": tmp_path / "out.parquet", "block_rows": 1000}
    with pytest.raises(ValueError, match="ends early"):
        ql.signatures(dictionary, gpt2, **options)
    save_file({"W_dec": weights}, str(path))
    capsys.readouterr()
    ql.signatures(ql.load_dictionary(path, layer=1), gpt2, **options)
    shown = capsys.readouterr().err
    assert "logit_lens_value layer 1:  50%" in shown.split("\r")[1] and "2000/4000" in shown.split("\r")[1]
    assert "feature/s]" in shown and "4000/4000" in shown


def test_blocks_are_sized_by_what_they_cost(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    """Many features where they are rows of a product, few where each is a pass through the model."""
    dictionary = ql.load_dictionary(dictionary_file(tmp_path / "d.safetensors", 40), layer=1)
    cheap = plan(dictionary, gpt2, preset="logit_lens_value", k=K)
    long_lists = plan(dictionary, gpt2, preset="logit_lens_value", k=VOCAB, out="x.parquet")
    in_memory = plan(dictionary, gpt2, preset="logit_lens_value", k=VOCAB)
    walked = plan(dictionary, gpt2, preset="query_lens_value", tokens=sample, n_features=3)
    ablated = plan(ql.neuron_dictionary(gpt2, 1), gpt2, preset="zero_out", tokens=sample)
    assert rows_per_block(cheap) == MAX_BLOCK_ROWS > rows_per_block(long_lists) > MIN_BLOCK_ROWS
    assert rows_per_block(long_lists) * 24 * VOCAB <= BLOCK_BYTES
    assert rows_per_block(in_memory) == min(4 * rows_per_block(long_lists), MAX_BLOCK_ROWS)
    assert rows_per_block(walked) == rows_per_block(ablated) == MIN_BLOCK_ROWS


@pytest.fixture(scope="module")
def result(gpt2: ql.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signatures of more features than a row group holds, with token strings."""
    folder = tmp_path_factory.mktemp("result")
    dictionary = ql.load_dictionary(dictionary_file(folder / "d.safetensors", ROW_GROUP + 5000), layer=1)
    options = {"preset": "logit_lens_value", "k": K, "block_rows": 7000, "progress": False}
    ql.signatures(dictionary, gpt2, out=folder / "whole.parquet", **options)
    ql.signatures(dictionary, gpt2, out=folder / "few.jsonl", features="0:300", **options)
    ql.signatures(dictionary, gpt2, out=folder / "bare.parquet", features="0:300", token_strings=False, **options)
    return folder / "whole.parquet"


def test_the_file_is_read_lazily(result: Path) -> None:
    """Row groups of one size with the range of their features, and the same rows in every reader."""
    metadata = pq.read_metadata(result)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROW_GROUP, 5000]
    place = metadata.schema.to_arrow_schema().get_field_index("feature")
    statistics = metadata.row_group(1).column(place).statistics
    assert (statistics.min, statistics.max) == (ROW_GROUP, ROW_GROUP + 4999)
    wanted = pq.read_table(result, filters=[("feature", "==", 33_000)]).to_pylist()[0]
    assert wanted["feature_index"] == wanted["feature"] == 33_000 and len(wanted["top_tokens"]) == K
    row = pl.scan_parquet(result).filter(pl.col("feature") == 33_000).collect().to_dicts()[0]
    assert row == wanted
    relation = duckdb.sql(f"select * from read_parquet('{result}') where feature = 33000")
    assert dict(zip(relation.columns, relation.fetchall()[0], strict=True)) == wanted
    frame = pd.read_parquet(result, columns=["feature", "top_ids", "top_tokens"])
    assert frame.loc[33_000, "feature"] == 33_000 and list(frame.loc[33_000, "top_ids"]) == wanted["top_ids"]
    assert list(frame.loc[33_000, "top_tokens"]) == wanted["top_tokens"]
    assert pq.read_schema(result).field("top_ids").type == pa.list_(pa.field("element", pa.int32(), nullable=False))


@pytest.mark.parametrize("side", ["top", "bottom"])
def test_search_is_the_definition(result: Path, side: str) -> None:
    """Every feature whose signature holds the token, by its score: compared with a loop over all rows."""
    table = pq.read_table(result)
    ids, scores = (np.array(table[f"{side}_{what}"].to_pylist()) for what in ("ids", "scores"))
    rows, ranks = np.nonzero(ids == 17)
    found = [(float(scores[r, c]), r, c) for r, c in zip(rows, ranks, strict=True)]
    found.sort(key=lambda hit: (-hit[0] if side == "top" else hit[0], hit[1]))
    for token in (17, "w17"):
        hits = ql.search(result, token, side=side)
        assert len(hits) == len(found) > 100
        assert hits.features.tolist() == [r for _, r, _ in found]
        assert hits.scores.tolist() == [s for s, _, _ in found]
        assert hits.ranks.tolist() == [c for _, _, c in found]
        assert set(hits.token_ids.tolist()) == {17} and set(hits.layers.tolist()) == {1}
    assert ql.search(result, [17, 18], side=side, limit=3).features.shape == (3,)
    assert len(ql.search(result, [17, 18], side=side)) == len(found) + len(ql.search(result, 18, side=side))


def test_search_finds_leading_spaces(tmp_path: Path) -> None:
    """A token is found with and without its space, unless exact; from strings in the file, or through a tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {"cat": 0, " cat": 1, "cats": 2, "dog": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "dog")))
    config = transformers.GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = ql.as_model(transformers.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    dictionary = ql.directions(torch.randn(30, 8), layer=0)
    out = {strings: tmp_path / f"{strings}.parquet" for strings in (True, False)}
    for strings, path in out.items():
        options = {"token_strings": strings, "preset": "logit_lens_value", "k": 1, "out": path, "progress": False}
        ql.signatures(dictionary, model, **options)
    counts = [len(ql.search(out[True], token)) for token in (0, 1)]
    assert all(counts)
    for path, given in ((out[True], None), (out[False], model), (out[False], tokenizer)):
        assert len(ql.search(path, "cat", model=given)) == sum(counts)
        assert len(ql.search(path, "cat", exact=True, model=given)) == counts[0]
        assert len(ql.search(path, " cat", model=given)) == counts[1]
    with pytest.raises(ValueError, match="holds no token strings; pass model="):
        ql.search(out[False], "cat")


def test_show_and_search_of_every_kind_of_file(result: Path, gpt2: ql.Model, gpt2_folder: Path) -> None:
    whole, few, bare = (result.with_name(name) for name in ("whole.parquet", "few.jsonl", "bare.parquet"))
    rows = [ql.show(path, 7)[0] for path in (whole, few, bare)]
    assert rows[0]["top_tokens"] == rows[1]["top_tokens"] == gpt2.str_tokens(rows[0]["top_ids"])
    assert "top_tokens" not in rows[2]
    for model in (gpt2, gpt2_folder):
        assert ql.show(bare, 7, model=model)[0]["bottom_tokens"] == rows[0]["bottom_tokens"]
    assert ql.search(few, "w9").features.tolist() == ql.search(bare, 9).features.tolist()
    assert ql.search(bare, "w9", model=gpt2_folder).scores.tolist() == ql.search(bare, 9).scores.tolist()
    with pytest.raises(ValueError, match=r"feature 99999 is not in .*whole\.parquet"):
        ql.show(whole, 99_999)
    with pytest.raises(ValueError, match="side is 'left'"):
        ql.search(whole, 3, side="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'w9 w8' is not one token of the model"):
        ql.search(bare, "w9 w8", model=gpt2)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.search(whole.with_name("nothing.parquet"), 3)


def test_the_commands(result: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["show", str(result), "33000"], env={"COLUMNS": "100"})
    row = ql.show(result, 33_000)[0]
    assert shown.exit_code == 0
    for token, score in zip(row["top_tokens"], row["top_scores"], strict=True):
        assert token in shown.stdout and f"{score:.4f}" in shown.stdout
    found = runner.invoke(app, ["search", str(result), "w17", "--limit", "2"], env={"COLUMNS": "100"})
    best = ql.search(result, "w17")
    assert found.exit_code == 0 and f"{len(best)} features have it among their top tokens" in found.stdout
    assert str(int(best.features[0])) in found.stdout and str(int(best.features[2])) not in found.stdout.split()
    none = runner.invoke(app, ["search", str(result), "W5"])
    assert none.exit_code == 2 and "no signature holds 'W5'; tokens like it: 'w5'" in none.output
    assert runner.invoke(app, ["search", str(result)]).exit_code == 2
    assert json.loads(pq.read_schema(result).metadata[b"querylens_fast"])["token_strings"] is True


def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`bench million` on a dictionary of no size: it prints and records what it measured, preset by preset."""
    from bench.million import main, merged

    out = tmp_path / "record.json"
    arguments = ["--features", "3000", "--d", "16", "--vocabulary", "700", "--k", "5", "--preset", "logit_lens_value"]
    main([*arguments, "--folder", str(tmp_path / "files"), "--out", str(out)])
    assert "MiB above mapped files" in capsys.readouterr().out
    (case,) = json.loads(out.read_text())["cases"]
    found = case["presets"]["logit_lens_value"]
    assert found["peak_anonymous_mib"] > 0 and found["use"]["search_string_worst_s"] > 0
    assert merged(out, {**case, "presets": {"other": 1}})[0]["presets"] == {"logit_lens_value": found, "other": 1}
    assert len(merged(out, {**case, "shape": {}})) == 2


def test_a_table_of_relations_is_not_searched(gpt2: ql.Model, tmp_path: Path) -> None:
    path = tmp_path / "relations.parquet"
    ql.downstream(ql.directions(torch.randn(9, D_MODEL), layer=1), gpt2, targets="unembed", out=path, progress=False)
    for asked in (lambda: ql.search(path, "w5"), lambda: ql.search(path, 5), lambda: ql.show(path, 3)):
        with pytest.raises(ValueError, match="is a table of 'downstream', not of signatures"):
            asked()
