"""JSON lines: a row that is damaged, edited, repeated, moved or missing is noticed, named and computed again."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import D_MODEL

import querylens_fast as ql
from querylens_fast.lens.jsonl import jsonl_problems, read_jsonl
from querylens_fast.lens.pipeline import Pipeline

N = 24
OPTIONS = {"preset": "logit_lens_value", "k": 3, "block_rows": 5, "progress": False}


@pytest.fixture(scope="module")
def dictionary() -> ql.Dictionary:
    return ql.directions(torch.randn(N, D_MODEL, generator=torch.Generator().manual_seed(3)), layer=1)


@pytest.fixture(scope="module")
def finished(gpt2: ql.Model, dictionary: ql.Dictionary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("jsonl") / "out.jsonl"
    return ql.signatures(dictionary, gpt2, out=out, **OPTIONS).path


def copied(finished: Path, out: Path, data: bytes | None = None) -> Path:
    out.write_bytes(finished.read_bytes() if data is None else data)
    out.with_name(out.name + ".run.json").write_bytes(finished.with_name("out.jsonl.run.json").read_bytes())
    return out


def test_rows_are_the_references_with_a_checksum(finished: Path) -> None:
    lines = [json.loads(line) for line in finished.read_text().splitlines()]
    assert [row["feature_index"] for row in lines] == list(range(N))
    assert all(list(row)[-1] == "crc32" and len(row["crc32"]) == 8 for row in lines)
    rows = read_jsonl(finished)
    assert rows == [{key: value for key, value in row.items() if key != "crc32"} for row in lines]
    assert jsonl_problems(finished) == []


def edit(lines: list[bytes]) -> list[bytes]:
    row = json.loads(lines[4])
    row["top_scores"][0] += 1e-3
    return [*lines[:4], json.dumps(row, ensure_ascii=False).encode() + b"\n", *lines[5:]]


DAMAGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], list[int]]] = {
    "edited": (edit, [4]),
    "no longer JSON": (lambda lines: [*lines[:9], b"{broken\n", *lines[10:]], [9]),
    "twice": (lambda lines: [*lines[:3], lines[2], *lines[3:]], []),
    "missing": (lambda lines: lines[:7] + lines[8:], [7]),
    "reordered": (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], []),
    "without its checksum": (lambda lines: [*lines[:5], lines[5][:-23] + b"}\n", *lines[6:]], [5]),
    "two in one": (lambda lines: [lines[0][:-1] + lines[1], *lines[2:]], [0, 1]),
    "its end missing": (lambda lines: [*lines[:-1], lines[-1][:-1]], [N - 1]),
    "zeroes": (lambda lines: [bytes(len(lines[0])), *lines[1:]], [0, 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_computed_again(
    damage: str,
    finished: Path,
    gpt2: ql.Model,
    dictionary: ql.Dictionary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change, lost = DAMAGES[damage]
    lines = finished.read_bytes().splitlines(keepends=True)
    out = copied(finished, tmp_path / "out.jsonl", b"".join(change(lines)))
    (problem,) = jsonl_problems(out)
    assert str(out) in problem and "line" in problem
    for read in (lambda: ql.show(out, 3), lambda: ql.search(out, 5), lambda: read_jsonl(out)):
        with pytest.raises(ValueError, match=r"out.jsonl' line \d+: .*run the same call again"):
            read()
    computed: list[int] = []
    original = Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, f, v: computed.extend(f.tolist()) or original(self, f, v))
    with caplog.at_level(logging.WARNING):
        ql.signatures(dictionary, gpt2, out=out, **OPTIONS)
    blocks = sorted({index - index % 5 for index in lost})
    assert computed == [index for start in blocks for index in range(start, min(start + 5, N))]
    if damage not in ("missing", "reordered", "its end missing"):
        assert "out.jsonl' line" in caplog.text
    assert [row["feature_index"] for row in read_jsonl(out)] == list(range(N))
    assert out.read_bytes() == finished.read_bytes()


def test_every_flipped_bit_is_noticed(finished: Path, tmp_path: Path) -> None:
    data, generator = finished.read_bytes(), random.Random(0)
    out = copied(finished, tmp_path / "out.jsonl")
    for _ in range(200):
        place = generator.randrange(8 * len(data))
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        out.write_bytes(changed)
        assert jsonl_problems(out), place
        with pytest.raises(ValueError, match=r"out.jsonl' line"):
            read_jsonl(out)
    out.write_bytes(b"".join(data.splitlines(keepends=True)[:9]))
    assert jsonl_problems(out) == [f"{str(out)!r} holds 9 rows of {N}; run the same call again to compute the others"]


def test_rows_of_another_run_are_noticed(
    finished: Path, gpt2: ql.Model, dictionary: ql.Dictionary, tmp_path: Path
) -> None:
    other = ql.signatures(dictionary, gpt2, out=tmp_path / "other.jsonl", **{**OPTIONS, "k": 4}).path
    lines = finished.read_bytes().splitlines(keepends=True)
    lines[3] = other.read_bytes().splitlines(keepends=True)[3]
    assert "of another run" in jsonl_problems(copied(finished, tmp_path / "out.jsonl", b"".join(lines)))[0]


def test_a_damaged_record(
    finished: Path, gpt2: ql.Model, dictionary: ql.Dictionary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows say what run they are of; when they are another run's, the record is named."""
    out = copied(finished, tmp_path / "out.jsonl")
    record = tmp_path / "out.jsonl.run.json"
    record.write_text(record.read_text().replace('"k": 3', '"k": 9'))
    assert "run.json' is damaged" in jsonl_problems(out)[0]
    ql.signatures(dictionary, gpt2, out=out, **OPTIONS)
    assert "the rows say that they are of this run" in caplog.text and jsonl_problems(out) == []
    record.write_text("garbage")
    for read in (lambda: ql.show(out, 3), lambda: ql.signatures(dictionary, gpt2, out=out, **{**OPTIONS, "k": 4})):
        with pytest.raises(ValueError, match=r"out.jsonl.run.json' is missing or damaged"):
            read()
    assert out.read_bytes() == finished.read_bytes()


def test_outputs_are_regular_files(gpt2: ql.Model, dictionary: ql.Dictionary, tmp_path: Path) -> None:
    for out, message in (("/dev/full", "a device or pipe"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=message):
            ql.signatures(dictionary, gpt2, out=out, format="jsonl", **OPTIONS)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "disk" / "big.jsonl")
    found = ql.signatures(dictionary, gpt2, out=tmp_path / "out.jsonl", **OPTIONS)
    assert (tmp_path / "out.jsonl").is_symlink() and len(read_jsonl(tmp_path / "disk" / "big.jsonl")) == N
    assert found.metadata()["k"] == 3 and len(read_jsonl(tmp_path / "out.jsonl")) == N
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["big.jsonl", "big.jsonl.run.json"]
