"""Results in parts: what is damaged, edited or swapped is noticed and computed again; what earlier versions wrote is
read and resumed."""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.demo import ASSETS
from querylens_fast.relations.tables import Block, tabulate
from querylens_fast.runs import processes
from querylens_fast.runs.atomic_write import whole, write_whole
from querylens_fast.runs.part_writer import PartWriter, read_identity, verify
from querylens_fast.runs.run_lock import held
from querylens_fast.runs.run_record import DamagedFile, read_record
from querylens_fast.runs.sealed_parquet import opened, read_checked

EARLIER = Path(__file__).parent / "earlier"
"""Results and half-finished runs written by the version before parts had digests."""
IDENTITY = {"what": "a test", "k": 3}
ROWS, PARTS = 50, 4


def rows(start: int) -> pa.Table:
    values = [[float(start * 7 + i), -1.5] for i in range(ROWS)]
    return pa.table({"feature": list(range(start, start + ROWS)), "scores": values, "word": ["ab", "c"] * (ROWS // 2)})


def write(out: Path, starts: list[int], identity: dict = IDENTITY) -> tuple[PartWriter, list[int]]:
    """A run that computes what is not done; (its writer, what it computed)."""
    writer, computed = PartWriter(out, identity, row_group=70), []
    for start in starts:
        if not writer.done(start):
            writer.write(start, rows(start))
            computed.append(start)
    return writer, computed


STARTS = [i * ROWS for i in range(PARTS)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out.parquet"
    return write(out, STARTS)[0].finish(ROWS * PARTS)


def test_a_finished_file(finished: Path, tmp_path: Path) -> None:
    """Rows in order, row groups of the size asked for, any reader, nothing beside it, the same bytes when resumed."""
    assert [p.name for p in finished.parent.iterdir()] == ["out.parquet"]
    table = pq.read_table(finished)
    assert table["feature"].to_pylist() == list(range(ROWS * PARTS))
    assert [pq.read_metadata(finished).row_group(i).num_rows for i in range(3)] == [70, 70, 60]
    assert read_identity(finished) == IDENTITY and verify(finished) == []
    out = tmp_path / "deep" / "out.parquet"
    write(out, STARTS[:2])
    writer, computed = write(out, STARTS)
    assert computed == STARTS[2:] and writer.finish(ROWS * PARTS) == out
    assert out.read_bytes() == finished.read_bytes()
    writer, computed = write(out, STARTS)
    assert computed == [] and writer.finish(ROWS * PARTS) == out


def test_every_flipped_bit_is_noticed(finished: Path, tmp_path: Path) -> None:
    """By `verify` wherever it is; reading gives the rows that were written or an error."""
    data, path = finished.read_bytes(), tmp_path / "out.parquet"
    truth = pq.read_table(finished)
    generator = random.Random(0)
    places = [generator.randrange(8 * len(data)) for _ in range(150)] + [8 * (len(data) - i) for i in range(1, 40)]
    for place in places:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        assert verify(path), f"bit {place} of {8 * len(data)}"
        try:
            with opened(path) as file:
                assert file.read().equals(truth), f"bit {place} changes what is read"
        except DamagedFile as error:
            assert str(path) in str(error)
    path.write_bytes(data[:-9])
    assert "is damaged" in verify(path)[0]


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def edit(part: Path) -> None:
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "feature", pa.array([7] * ROWS)), part)


DAMAGES: dict[str, tuple[Callable[[list[Path]], object], list[int]]] = {
    "cut off": (lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-9]), [1]),
    "a zeroed block": (lambda parts: parts[0].write_bytes(bytes(200) + parts[0].read_bytes()[200:]), [0]),
    "empty": (lambda parts: parts[2].write_bytes(b""), [2]),
    "swapped": (lambda parts: swap(parts[0], parts[2]), [0, 2]),
    "a copy of another": (lambda parts: shutil.copy(parts[0], parts[1]), [1]),
    "edited, metadata kept": (lambda parts: edit(parts[1]), [1]),
    "replaced by a plain file": (lambda parts: pq.write_table(rows(0), parts[0]), [0]),
    "gone": (lambda parts: parts[2].unlink(), [2]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_and_computed_again(
    damage: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.parquet"
    write(out, STARTS[:3])
    parts = sorted((tmp_path / "out.parquet.parts").glob("part-*"))
    change, hit = DAMAGES[damage]
    change(parts)
    with caplog.at_level(logging.WARNING):
        writer, computed = write(out, STARTS)
    assert computed == [STARTS[i] for i in hit] + STARTS[3:]
    if damage != "gone":
        assert all(parts[i].name in caplog.text for i in hit) and "computed again" in caplog.text
    writer.finish(ROWS * PARTS)
    assert out.read_bytes() == finished.read_bytes()


def test_random_bits_of_parts(finished: Path, tmp_path: Path) -> None:
    out, generator = tmp_path / "out.parquet", random.Random(1)
    write(out, STARTS)
    parts = sorted((tmp_path / "out.parquet.parts").glob("part-*"))
    for _ in range(60):
        part = generator.choice(parts)
        data = bytearray(part.read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        part.write_bytes(data)
        writer, computed = write(out, STARTS)
        assert computed == [STARTS[parts.index(part)]]
    writer.finish(ROWS * PARTS)
    assert out.read_bytes() == finished.read_bytes()


def test_a_part_damaged_after_it_was_checked(finished: Path, tmp_path: Path) -> None:
    """The join looks again; the damaged part is removed and the same call goes on."""
    out = tmp_path / "out.parquet"
    writer, _ = write(out, STARTS)
    edit(sorted(writer.parts.glob("part-*"))[1])
    with pytest.raises(ValueError, match=r"part-000000000050.parquet' was edited.* run the same call again"):
        writer.finish(ROWS * PARTS)
    assert not out.exists()
    writer, computed = write(out, STARTS)
    assert computed == [50]
    writer.finish(ROWS * PARTS)
    assert out.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"k": 3}', "flipped", "gone"])
def test_a_damaged_record_of_the_run(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The parts say what run they are of; with none that can be read it is an error that names the record."""
    out = tmp_path / "out.parquet"
    writer, _ = write(out, STARTS[:2])
    record = writer.parts / "run.json"
    text = record.read_text().replace('"k": 3', '"k": 2') if text == "flipped" else text
    record.unlink() if text == "gone" else record.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert write(out, STARTS)[1] == STARTS[2:]
    assert "run.json" in caplog.text and "the parts say that they are of this run" in caplog.text
    assert read_record(record) == (IDENTITY, True)
    record.unlink() if text == "gone" else record.write_text(text)
    for part in writer.parts.glob("part-*"):
        part.write_bytes(b"nothing")
    error, message = (DamagedFile, r"run.json' is .*; delete .*parts' or choose another out")
    if text == '{"k": 3}':
        error, message = FileExistsError, "another run"
    with pytest.raises(error, match=message):
        write(out, STARTS)


def test_another_run_is_refused(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    write(out, STARTS[:1])
    with pytest.raises(FileExistsError, match=r"another run \(different: k\)"):
        write(out, STARTS, {**IDENTITY, "k": 4})
    with pytest.raises(FileExistsError, match="exists already"):
        PartWriter(out, IDENTITY, resume=False)
    (tmp_path / "out.parquet.parts" / "run.json").write_text("damaged")
    with pytest.raises(DamagedFile, match="nothing says what run"):
        write(out, STARTS, {**IDENTITY, "k": 4})


def test_a_damaged_result_is_named(finished: Path, tmp_path: Path) -> None:
    """Its rows or its footer, by the same call and by every way to read it."""
    data, out = finished.read_bytes(), tmp_path / "out.parquet"
    for place in (len(data) // 3, len(data) - 30):
        out.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"out.parquet' is damaged .*delete it and run again"):
            write(out, STARTS)[0].finish(ROWS * PARTS)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder; expected the file to write"):
        PartWriter(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match="a device or pipe; expected a regular file"):
        PartWriter("/dev/full", IDENTITY)
    with pytest.raises(ValueError, match="a folder"), held(tmp_path):
        pass
    with pytest.raises(ValueError, match="a device or pipe"), whole(Path("/dev/null")):
        pass


def test_a_link_is_followed(finished: Path, tmp_path: Path) -> None:
    """A link to where there is room stays a link; everything lies beside its target."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.parquet"
    link.symlink_to(tmp_path / "disk" / "big.parquet")
    writer, _ = write(link, STARTS)
    assert (tmp_path / "disk" / "big.parquet.parts").is_dir()
    assert writer.finish(ROWS * PARTS) == link
    assert link.is_symlink() and link.read_bytes() == finished.read_bytes()
    text = tmp_path / "note.json"
    text.symlink_to(tmp_path / "disk" / "note.json")
    write_whole(text, "{}")
    assert text.is_symlink() and (tmp_path / "disk" / "note.json").read_text() == "{}"


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    """Not the file that a live process is writing."""
    path, other = tmp_path / "note.json", tmp_path / "note.json.bak.aaaaaaaa.partial"
    left = [tmp_path / f"note.json.{name}.partial" for name in ("00000000", "1234abcd")]
    for file in (*left, other):
        file.write_text("half")
    with whole(path) as partial:
        partial.write_text("first")
        write_whole(path, "second")
        assert partial.exists() and not any(file.exists() for file in left)
    assert path.read_text() == "first" and other.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note.json", other.name]


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier version's results, where their model and dictionary are found."""
    folder = tmp_path / "earlier"
    shutil.copytree(EARLIER, folder)
    monkeypatch.chdir(folder)
    for name, target in (("model", "model"), ("sae", "sae_layer1")):
        os.symlink(ASSETS / target, name)
    return folder


def test_an_earlier_versions_files_are_read(earlier: Path) -> None:
    whole_file, lines = earlier / "whole.parquet", earlier / "whole.jsonl"
    assert verify(whole_file) == [] == verify(earlier / "whole_table.parquet")
    assert ql.show(whole_file, 7)[0]["top_tokens"] == ql.show(lines, 7)[0]["top_tokens"]
    token = ql.show(whole_file, 7)[0]["top_ids"][0]
    assert ql.search(whole_file, token).features.tolist() == ql.search(lines, token).features.tolist()
    assert ql.read_table(earlier / "whole_table.parquet").table()["source_id"].to_pylist() == list(range(8))


def test_an_earlier_versions_runs_are_resumed(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the rows that are there; a damaged one of its parts is computed again, too."""
    from querylens_fast.lens.pipeline import Pipeline

    computed, original = [], Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, f, v: computed.append(f.tolist()) or original(self, f, v))
    model, sae = ql.load_model("model"), ql.load_dictionary("sae")
    options = {"preset": "logit_lens_value", "k": 3, "features": "0:40", "block_rows": 10, "progress": False}
    for name in ("whole.parquet", "whole.jsonl"):
        ql.signatures(sae, model, out=name, **options)
    assert computed == []
    for name in ("half.parquet", "half.jsonl"):
        ql.signatures(sae, model, out=name, **options)
    assert [block[0] for block in computed] == [20, 30, 20, 30]
    half, expected = pq.read_table("half.parquet"), pq.read_table("whole.parquet")
    assert half["top_ids"].equals(expected["top_ids"]) and half["feature"].equals(expected["feature"])
    assert [line["feature"] for line in map(json.loads, open("half.jsonl"))] == list(range(40))
    shutil.copytree(EARLIER / "half.parquet.parts", "again.parquet.parts")
    Path("again.parquet.parts/part-000000000010.parquet").write_bytes(b"PAR1 cut")
    computed.clear()
    ql.signatures(sae, model, out="again.parquet", **options)
    assert [block[0] for block in computed] == [10, 20, 30]


def test_an_earlier_versions_relations_are_resumed(earlier: Path) -> None:
    computed = []

    def block(i: int) -> pa.Table:
        computed.append(i)
        return pa.table({"source_id": pa.array([2 * i, 2 * i + 1]), "score": pa.array([float(i), -float(i)])})

    def blocks() -> list[Block]:
        return [Block(2, lambda i=i: block(i)) for i in range(4)]

    tabulate(blocks(), {"what": "test"}, out="whole_table.parquet", progress=False)
    assert computed == []
    found = tabulate(blocks(), {"what": "test"}, out="half_table.parquet", progress=False)
    assert computed == [2, 3] and found.table().equals(pq.read_table("whole_table.parquet"))
    assert verify("half_table.parquet") == []


def test_an_edit_that_keeps_the_metadata_is_noticed(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.parquet"
    pq.write_table(pq.read_table(finished).slice(1), path)
    assert "was edited: another program has written it again" in verify(path)[0]
    with pytest.raises(DamagedFile, match="was edited"):
        read_checked(path)


def test_nothing_of_a_damaged_file_is_parsed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are compared first: a parser sees only bytes that were written here."""
    data, path = finished.read_bytes(), tmp_path / "damaged.parquet"

    def parsed(*arguments: object, **given: object) -> None:
        raise AssertionError("parsed")

    for place, what, parser in ((100, "rows are", "ParquetFile"), (len(data) - 50, "footer is", "read_metadata")):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with monkeypatch.context() as patch, pytest.raises(DamagedFile, match=what):
            patch.setattr(pq, parser, parsed)
            read_checked(path)


def test_verify(gpt2: ql.Model, earlier: Path, tmp_path: Path) -> None:
    """By the function and the command: exit code 1 names what is damaged, 2 what is missing."""
    runner = CliRunner()
    dictionary = ql.directions(torch.randn(9, gpt2.d_model), layer=1)
    paths = [tmp_path / "s.parquet", tmp_path / "s.jsonl"]
    for path in paths:
        ql.signatures(dictionary, gpt2, preset="logit_lens_value", k=2, out=path, progress=False)
    paths.append(ql.downstream(dictionary, gpt2, targets="unembed", out=tmp_path / "r.parquet", progress=False).path)
    assert [ql.verify(path) for path in paths] == [[], [], []]
    done = runner.invoke(app, ["verify", *map(str, paths), "whole.parquet"])
    assert done.exit_code == 0 and done.stdout.count("as it was written") == 4
    assert done.stdout.count("an earlier version wrote no digests") == 1
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert str(path) in ql.verify(path)[0]
        done = runner.invoke(app, ["verify", str(path), "whole.parquet"])
        assert done.exit_code == 1 and str(path) in done.stdout
    assert runner.invoke(app, ["verify", "none.parquet"]).exit_code == 2


def test_reading_verifies_what_it_reads(gpt2: ql.Model, tmp_path: Path) -> None:
    """A flipped bit in rows or footer: an error that names the file, or rows that are right."""
    dictionary = ql.directions(torch.randn(300, gpt2.d_model), layer=1)
    path = tmp_path / "s.parquet"
    stored = ql.signatures(dictionary, gpt2, preset="logit_lens_value", k=9, out=path, progress=False)
    related = ql.downstream(dictionary, gpt2, targets="unembed", out=tmp_path / "r.parquet", progress=False)
    readers: dict[Path, list[Callable[[], object]]] = {
        path: [
            lambda: stored.table().to_pydict(),
            lambda: ql.show(path, 7),
            lambda: ql.search(path, 5).scores.tolist(),
            lambda: ql.search(path, "w5").features.tolist(),
            lambda: stored.metadata(),
        ],
        tmp_path / "r.parquet": [
            lambda: ql.read_table(tmp_path / "r.parquet").table().to_pydict(),
            lambda: related.head(3).to_pydict(),
            lambda: len(related),
        ],
    }
    generator = random.Random(2)
    for file, calls in readers.items():
        data, truths = file.read_bytes(), [call() for call in calls]
        for _ in range(60):
            changed = bytearray(data)
            changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            for call, truth in zip(calls, truths, strict=True):
                try:
                    assert call() == truth
                except ValueError as error:
                    assert str(file) in str(error)


def test_a_process_whose_shared_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first part, too: it does not make a folder of its own, where nobody would look for its rows."""

    class Second(processes.Ranks):
        rank, size = 1, 2

    monkeypatch.setattr(processes, "_current", Second())
    (tmp_path / "shared").mkdir()
    writer = PartWriter(tmp_path / "shared" / "out.parquet", IDENTITY)
    (tmp_path / "shared").rmdir()
    with pytest.raises(FileNotFoundError, match="the folder that the processes share is gone.*out.parquet"):
        writer.write(0, rows(0))
    assert not (tmp_path / "shared").exists()


def test_a_run_from_before_hook_points_were_recorded_goes_on(tmp_path: Path) -> None:
    begun, done, named = tmp_path / "begun.parquet", tmp_path / "done.parquet", {**IDENTITY, "hook_name": "a"}
    write(begun, STARTS[:2])
    write(done, STARTS)[0].finish()
    for out, left in ((begun, STARTS[2:]), (done, [])):
        writer, computed = write(out, STARTS, named)
        assert computed == left and read_identity(writer.finish()) == IDENTITY
    write(tmp_path / "named.parquet", STARTS, named)[0].finish()
    for other in (IDENTITY, {**IDENTITY, "hook_name": "b"}):
        with pytest.raises(FileExistsError, match="different: hook_name"):
            write(tmp_path / "named.parquet", STARTS, other)
