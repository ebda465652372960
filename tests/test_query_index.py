"""The index beside a result says what the result says; a build goes on; an index of something else counts as none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

import querylens_fast as ql
from querylens_fast.queries import ResultGone, build, build_passes
from querylens_fast.queries.build_passes import posting_order
from querylens_fast.queries.files import open_file
from querylens_fast.queries.index import find_index
from querylens_fast.queries.scan import Record, Scan
from querylens_fast.runs.run_lock import held

VALUE = "sae0.query_lens_value.parquet"


def assert_same(some: Record, other: Record) -> None:
    for a, b in zip(some, other, strict=True):
        assert (a is None) == (b is None)
        for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y, np.asarray(x).dtype))


@pytest.mark.parametrize(
    ("preset", "features", "dtype"),
    [("logit_lens_value", "0:70", "float32"), ("logit_lens_value", [5, 3, 60, 4], "float64")],
)
def test_an_index_says_what_the_file_says(
    served_model: ql.Model, tmp_path: Path, preset: str, features: object, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_passes, "SORTED_AT_ONCE", 50)
    other = ql.load_model(served_model.name, dtype=dtype)
    values = torch.randn(70, served_model.d_model, generator=torch.Generator().manual_seed(0))
    values[10:20] = values[0]  # equal scores
    dictionary = ql.directions(values, layer=1)
    out = tmp_path / "x.parquet"
    bins = 7 if dtype == "float32" else 0
    ql.signatures(dictionary, other, preset=preset, features=features, k=9, out=out, progress=False, histogram=bins)
    file = open_file(out)
    build.build_index(file)
    index, scan = find_index(file), Scan(file)
    assert (scan.record(0).histogram is None) == (bins == 0) and "histogram" not in scan.statistics
    assert index is not None and list(index.features) == sorted(scan.features) and index.strings() == scan.strings()
    for row in range(len(scan)):
        assert_same(index.record(row), scan.record(row))
        for end in ("top", "bottom"):
            assert index.ids(row, end) == scan.ids(row, end)
    for token in range(served_model.vocab_size + 2):
        for end in ("top", "bottom"):
            for a, b in zip(index.postings(token, end), scan.postings(token, end), strict=True):
                np.testing.assert_array_equal(a, b)


def interrupted(times: int) -> Iterator[None]:
    """Lets so many checks pass, then raises."""
    yield from [None] * times
    raise KeyboardInterrupt


@pytest.mark.parametrize("times", [1, 6, 8, 10, 20])
def test_a_killed_build_goes_on_to_the_same_bytes(
    copied_results: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_passes, "SORTED_AT_ONCE", 100)
    file = open_file(copied_results / VALUE)
    whole = build.build_index(file).read_bytes()
    (copied_results / f"{VALUE}.index").unlink()
    monkeypatch.setattr(build_passes, "SECONDS_A_NOTE", 0.0)
    steps = interrupted(times)
    with pytest.raises(KeyboardInterrupt):
        build.build_index(file, lambda: next(steps))
    assert find_index(file) is None
    assert build.build_index(file).read_bytes() == whole
    assert sorted(p.name for p in copied_results.glob(f"{VALUE}*")) == [VALUE, f"{VALUE}.index"]


def test_an_index_that_another_server_makes_is_waited_for(
    copied_results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And made here where that one ends before it is done."""
    path, other = copied_results / VALUE, ExitStack()
    other.enter_context(held(path.with_name(f"{VALUE}.index")))
    monkeypatch.setattr(build.os, "nice", lambda by: None)
    monkeypatch.setattr(build.signal, "signal", lambda *_: None)
    monkeypatch.setattr(build.time, "sleep", lambda seconds: other.close())
    build.main([str(path)])
    assert find_index(open_file(path)) is not None


def test_a_build_takes_its_room_before_it_begins(copied_results: Path) -> None:
    """A mapped file that finds the disk full while it is written would end the process."""
    steps = interrupted(7)  # when the row groups have been counted
    with pytest.raises(KeyboardInterrupt):
        build.build_index(open_file(copied_results / VALUE), lambda: next(steps))
    pieces = [p for p in (copied_results / f"{VALUE}.index.parts").iterdir() if p.name != "note.json"]
    assert len(pieces) == 7 and all(p.stat().st_blocks * 512 >= p.stat().st_size > 0 for p in pieces)


def test_postings_of_equal_scores_come_by_row() -> None:
    scores = np.array([0.0, -0.0, 1.0, -0.0, 0.0], np.float32)
    tokens, rows = np.zeros(5, np.int64), np.arange(5)
    for by_row in (True, False):
        assert posting_order(tokens, rows, scores, "top", by_row=by_row).tolist() == [2, 0, 1, 3, 4]
        assert posting_order(tokens, rows, scores, "bottom", by_row=by_row).tolist() == [0, 1, 3, 4, 2]


def test_an_index_of_another_result_or_cut_off_counts_as_none(copied_results: Path) -> None:
    path, other = copied_results / VALUE, copied_results / "sae1.query_lens_value.parquet"
    built = build.build_index(open_file(path))
    index = find_index(open_file(path))
    assert index is not None
    data = built.read_bytes()
    os.truncate(built, len(data) // 2)
    assert find_index(open_file(path)) is None
    with pytest.raises(ResultGone, match="cut off"):
        [index.postings(token, "bottom") for token in range(61)]
    built.write_bytes(data)
    os.utime(path)  # the same rows
    assert find_index(open_file(path)) is not None
    shutil.copy(other, path)
    assert find_index(open_file(path)) is None
