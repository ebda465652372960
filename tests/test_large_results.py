"""Runs that are stopped: kills at any moment, full disks, corrupt files, and the sizes of blocks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import D_MODEL, VOCAB
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.lens.compute import BLOCK_BYTES, MAX_BLOCK_ROWS, MIN_BLOCK_ROWS, rows_per_block
from querylens_fast.lens.parquet import ParquetSink
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


@pytest.mark.slow
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


@pytest.mark.slow
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
