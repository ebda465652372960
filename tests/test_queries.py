"""Queries over result files: the same answers as `ql.search` and `ql.show`, with and without an index."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from served_results import N_FEATURES, VOCABULARY

import querylens_fast as ql
from querylens_fast.evaluation import feature_sample
from querylens_fast.lens.storage import open_sink, read_identity
from querylens_fast.queries import Budget, Filter, QueryStopped, ResultGone, Results, build, results
from querylens_fast.queries.display import direction, shown
from querylens_fast.queries.files import open_file
from querylens_fast.queries.index import find_index
from querylens_fast.queries.scan import Record, Scan
from querylens_fast.queries.views import Row
from querylens_fast.relations.tables import Block, rows, tabulate

VALUE = "sae0.query_lens_value.parquet"


@pytest.fixture(scope="module")
def model(served: Path) -> ql.Model:
    return ql.load_model(served / "model")


@pytest.fixture(scope="module")
def folder(served: Path) -> Path:
    return served / "results"


@pytest.fixture(scope="module", params=["without an index", "with an index"])
def opened(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    copied = tmp_path_factory.mktemp("opened") / "results"
    shutil.copytree(folder, copied)
    found = ql.open_results(copied)
    if request.param == "with an index":
        found.build_indexes()
    assert all(p.indexed == (request.param == "with an index") for d in found.dictionaries for p in d.presets)
    return found


@pytest.fixture
def copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "LOOK_SECONDS", 0.0)
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def all_rows(found: Results, limit: int = 7, **options: object) -> list[Row]:
    """The rows of every page."""
    rows, after = [], None
    while True:
        page = found.search(after=after, limit=limit, **options)  # type: ignore[arg-type]
        rows += page.rows
        if page.next is None:
            return rows
        assert len(page.rows) == limit
        after = page.next


def test_a_feature_is_what_the_file_says(opened: Results, folder: Path) -> None:
    view = opened.feature("sae0", 7)
    assert [s.preset for s in view.signatures] == [
        "logit_lens_key", "logit_lens_value", "query_lens_key", "query_lens_value"
    ]  # fmt: skip
    assert (view.previous, view.next, view.layer) == (6, 8, 0)
    for signature in view.signatures:
        [row] = ql.show(folder / f"sae0.{signature.preset}.parquet", 7)
        for end in ("top", "bottom"):
            tokens = getattr(signature, end)
            assert [t.token.id for t in tokens] == row[f"{end}_ids"]
            assert [t.token.text for t in tokens] == row[f"{end}_tokens"]
            np.testing.assert_array_equal(np.float32([t.score for t in tokens]), np.float32(row[f"{end}_scores"]))
        if "top_se" in row:
            np.testing.assert_array_equal(np.float32([t.se for t in signature.top]), np.float32(row["top_se"]))
            assert signature.statistics["rel_var"] == pytest.approx(row["rel_var"])
            assert signature.stable_k == row["stable_k"]
    logit, query = view.signatures[1], view.signatures[3]
    shape = logit.histogram
    assert shape is not None and query.histogram is None and sum(shape.counts) == len(VOCABULARY)
    assert (shape.edges[0], shape.edges[-1]) == (logit.bottom[0].score, logit.top[0].score)
    assert view.hook_point == opened.dictionaries[0].hook_point == "blocks.0.hook_resid_post"
    both = {t.token.id for t in logit.top} & {t.token.id for t in query.top}
    assert {t.token.id for t in query.top if "logit_lens_value" in t.shared} == both
    assert view.links is not None and [link.relation for link in view.links] == ["itself"] * 3
    assert eval(view.python.splitlines()[-1].split("=")[1], {"results": opened}).feature == 7


def test_layer_terms_are_those_of_the_file(opened: Results, folder: Path) -> None:
    [row] = ql.show(folder / "sae1.query_lens_value_approx.parquet", 3)
    terms = next(s for s in opened.feature("sae1", 3).signatures if s.preset == "query_lens_value_approx").layer_terms
    assert terms is not None and [t.layer for t in terms] == row["layer_indices"]
    np.testing.assert_allclose([t.energy for t in terms], row["layer_energy_scores"], rtol=1e-6)
    assert [[x.id for x in t.bottom] for t in terms] == row["layer_bottom_ids"]


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_search_is_that_of_the_library(opened: Results, folder: Path, end: str) -> None:
    for token in ("self", " self", " word30"):
        hits = ql.search(folder / VALUE, token, side=end)  # type: ignore[arg-type]
        rows = all_rows(opened, text=token, dictionary="sae0", side="value", end=end)
        assert [(r.feature, r.rank, r.token and r.token.id) for r in rows] == list(
            zip(hits.features.tolist(), hits.ranks.tolist(), hits.token_ids.tolist(), strict=True)
        )
        np.testing.assert_array_equal(np.float32([r.score for r in rows]), hits.scores.numpy())
    assert len(opened.search("self", exact=True).tokens) == 1 and len(opened.search("self").tokens) == 2
    page = opened.search("elf")
    assert not page.rows and [t.text for t in page.suggestions] == ["self", " self"]


@pytest.mark.parametrize("order", ["feature", "-feature", "rel_var", "-rel_var", "stable_k", "score", "-score"])
def test_pages_in_every_order_hold_each_row_once(opened: Results, order: str) -> None:
    text = "self" if "score" in order else None
    rows = all_rows(opened, text=text, order=order)
    assert rows == list(opened.search(text, order=order, limit=200).rows)
    found = [(r.dictionary, r.preset, r.feature, r.token) for r in rows]
    assert len(set(found)) == len(found) and (text or len(found) == 2 * N_FEATURES)
    name = order.removeprefix("-")
    keys = [r.score if name == "score" else r.feature if name == "feature" else r.values[name] for r in rows]
    assert keys == sorted(keys, reverse=(order[0] == "-") != (name == "score"))  # type: ignore[type-var]


def test_filters_leave_out_what_is_outside_or_unknown(opened: Results) -> None:
    every = opened.search(limit=200).rows
    kept = opened.search(filters=[Filter("rel_var", 0.1, 0.5), Filter("stable_k", low=2)], limit=200).rows
    expected = [r for r in every if 0.1 <= r.values["rel_var"] <= 0.5 and r.values["stable_k"] >= 2]
    assert list(kept) == expected and 0 < len(kept) < len(every)
    assert not opened.search(filters=[Filter("density", high=1.0)]).rows
    assert {r.layer for r in opened.search(layer=1, limit=200).rows} == {1}


def test_filters_look_behind_the_rows_of_a_page(opened: Results) -> None:
    tried = 0
    for token_id in range(61):
        every = opened.search(token_id=token_id, dictionary="sae0", side="value", limit=200).rows
        least = max((r.values["rel_var"] for r in every[:2]), default=1.0) + 1e-6
        kept = [r for r in every if r.values["rel_var"] >= least]
        found = opened.search(
            token_id=token_id, dictionary="sae0", side="value", filters=[Filter("rel_var", least)], limit=1
        )
        assert list(found.rows) == kept[:1]
        tried += bool(kept)
    assert tried > 10


def test_tokens_random_and_compare(opened: Results) -> None:
    token = opened.search("self", exact=True).tokens[0]
    view = opened.token(token.id, limit=2)
    for group in view.groups:
        rows = all_rows(
            opened, token_id=token.id, dictionary=group.dictionary, preset=group.preset, side=group.side, end=group.end
        )
        assert group.count == len(rows) and list(group.rows) == rows[:2]
    assert list(opened.top(token.id, limit=3).rows) == list(opened.search("self", exact=True, limit=3).rows)
    slug, feature = opened.random(seed=3)
    assert (slug, feature) == opened.random(seed=3) and opened.feature(slug, feature).feature == feature
    first = opened.compare("sae0", limit=40)
    rest = opened.compare("sae0", after=first.next, limit=40)
    assert [p.feature for p in (*first.rows, *rest.rows)] == list(range(N_FEATURES)) and rest.next is None
    assert (
        opened.compare("sae0", "sae0", preset="query_lens_value", other_preset="query_lens_value").rows[0].overlap == 1
    )
    matched = opened.compare("sae0", "sae1", limit=3)
    assert matched.matched_by == "tokens" and all(p.shared for p in matched.rows)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (lambda r: r.feature("nowhere", 1), "sae0"),
        (lambda r: r.feature("sae0", 10**12), "between 0 and 69"),
        (lambda r: r.search("x" * 2000), "1000"),
        (lambda r: r.search(limit=0), "1 to 200"),
        (lambda r: r.search(order="score"), "without a token"),
        (lambda r: r.search("self", after="bm8"), "no page"),
        (lambda r: r.search("self", side="value", after=r.search("self", side="key", limit=1).next), "another search"),
        (lambda r: r.compare("sae0", preset="logit_lens_key", other_preset="logit_lens_value"), "different sides"),
        (lambda r: r.token(10**9), "no signature"),
    ],
)
def test_mistakes_say_what_was_expected(opened: Results, problem: object, said: str) -> None:
    with pytest.raises((LookupError, ValueError), match=said):
        problem(opened)  # type: ignore[operator]


def test_a_query_stops_when_its_time_is_up_or_it_is_cancelled(opened: Results) -> None:
    cancelled = Budget()
    cancelled.cancel()
    for budget in (Budget(-1.0), cancelled):
        for query in (lambda b: opened.search("self", budget=b), lambda b: opened.feature("sae0", 1, budget=b)):
            with pytest.raises(QueryStopped):
                query(budget)


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
    model: ql.Model, tmp_path: Path, preset: str, features: object, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SORTED_AT_ONCE", 50)
    other = ql.load_model(model.name, dtype=dtype)
    values = torch.randn(70, model.d_model, generator=torch.Generator().manual_seed(0))
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
    for token in range(model.vocab_size + 2):
        for end in ("top", "bottom"):
            for a, b in zip(index.postings(token, end), scan.postings(token, end), strict=True):
                np.testing.assert_array_equal(a, b)


def interrupted(times: int) -> Iterator[None]:
    """Lets so many checks pass, then raises."""
    yield from [None] * times
    raise KeyboardInterrupt


@pytest.mark.parametrize("times", [1, 6, 8, 10, 20])
def test_a_killed_build_goes_on_to_the_same_bytes(copied: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SORTED_AT_ONCE", 100)
    file = open_file(copied / VALUE)
    whole = build.build_index(file).read_bytes()
    (copied / f"{VALUE}.index").unlink()
    monkeypatch.setattr(build, "SECONDS_A_NOTE", 0.0)
    steps = interrupted(times)
    with pytest.raises(KeyboardInterrupt):
        build.build_index(file, lambda: next(steps))
    assert find_index(file) is None
    assert build.build_index(file).read_bytes() == whole
    assert sorted(p.name for p in copied.glob(f"{VALUE}*")) == [VALUE, f"{VALUE}.index"]


def test_a_build_takes_its_room_before_it_begins(copied: Path) -> None:
    """A mapped file that finds the disk full while it is written would end the process."""
    steps = interrupted(7)  # when the row groups have been counted
    with pytest.raises(KeyboardInterrupt):
        build.build_index(open_file(copied / VALUE), lambda: next(steps))
    pieces = [p for p in (copied / f"{VALUE}.index.parts").iterdir() if p.name != "note.json"]
    assert len(pieces) == 5 and all(p.stat().st_blocks * 512 >= p.stat().st_size > 0 for p in pieces)


def test_postings_of_equal_scores_come_by_row() -> None:
    scores = np.array([0.0, -0.0, 1.0, -0.0, 0.0], np.float32)
    tokens, rows = np.zeros(5, np.int64), np.arange(5)
    assert build._posting_order(tokens, rows, scores, "top").tolist() == [2, 0, 1, 3, 4]
    assert build._posting_order(tokens, rows, scores, "bottom").tolist() == [0, 1, 3, 4, 2]


def test_an_index_of_another_result_or_cut_off_counts_as_none(copied: Path) -> None:
    path, other = copied / VALUE, copied / "sae1.query_lens_value.parquet"
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


def test_files_that_come_change_and_go_are_noticed(copied: Path) -> None:
    found = ql.open_results(copied)
    found.build_indexes()
    before = found.feature("sae0", 3)
    new = next(copied.glob("sae1.logit_lens_value.parquet"))
    moved = new.rename(copied / "moved.txt")
    assert "logit_lens_value" not in [s.preset for s in found.feature("sae1", 3).signatures]
    moved.rename(new)
    assert "logit_lens_value" in [s.preset for s in found.feature("sae1", 3).signatures]
    damaged = copied / "sae0.logit_lens_key.parquet"
    os.truncate(damaged, 1000)
    assert [s.preset for s in found.feature("sae0", 3).signatures] == [s.preset for s in before.signatures[1:]]
    assert [Path(s.file).name for s in found.skipped] == [damaged.name]
    for path in copied.glob("*.parquet"):
        path.unlink()
    with pytest.raises(LookupError, match="sae0"):
        found.feature("sae0", 3)
    assert found.dictionaries == ()


def test_results_of_an_earlier_version_are_of_the_same_dictionary(copied: Path) -> None:
    """Earlier versions recorded half of a dictionary's fingerprint."""
    import pyarrow.parquet as pq

    from querylens_fast.runs.sealed_parquet import write_sealed

    before = {d.slug: len(d.presets) for d in ql.open_results(copied).dictionaries}
    path = copied / "sae0.query_lens_key.parquet"
    table = pq.read_table(path)
    said = json.loads(table.schema.metadata[b"querylens_fast"])
    said["dictionary_fingerprint"] = said["dictionary_fingerprint"][:32]
    write_sealed(path, [table], table.schema.with_metadata({b"querylens_fast": json.dumps(said)}), {})
    assert {d.slug: len(d.presets) for d in ql.open_results(copied).dictionaries} == before


def test_a_named_file_that_goes_is_named(copied: Path) -> None:
    found = ql.open_results(copied / VALUE)
    assert found.feature("sae0", 1).signatures
    (copied / VALUE).unlink()
    with pytest.raises(ResultGone, match="query_lens_value"):
        found.feature("sae0", 1)


def test_a_run_under_way_is_answered_from_its_parts(model: ql.Model, folder: Path, tmp_path: Path) -> None:
    identity, out = read_identity(folder / VALUE), tmp_path / VALUE
    values, keys = torch.randn(2, N_FEATURES, model.d_model, generator=torch.Generator().manual_seed(0))
    dictionary = ql.directions(values, keys=keys, layer=0, name="sae0")
    sink = open_sink(out, None, identity, resume=True, token_strings=True, model=model)
    signatures = ql.signatures(dictionary, model, preset="logit_lens_value", features="0:30", k=12)
    sink.write(signatures, range(30))
    found = ql.open_results(tmp_path)
    [progress] = found.progress
    assert (progress.done, progress.total, progress.running) == (30, N_FEATURES, False)
    assert found.feature("sae0", 29).next is None
    assert not found.unindexed()


def test_samples_contexts_and_scores_are_found_by_their_dictionary(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_sample, "ROW_GROUP", 16)
    identity = read_identity(copied / VALUE)
    tokens = ql.Tokens(torch.arange(3, 23).view(2, 10), torch.ones(2, 10, dtype=torch.bool))
    tokens.save(copied / "held-out.safetensors")
    n = N_FEATURES
    where = torch.stack([torch.zeros(n, dtype=torch.int64), torch.full((n,), -1)], 1)
    said = {
        key: identity[key] for key in ("model", "fingerprint", "dictionary", "dictionary_fingerprint", "kind", "layer")
    }
    sample = ql.FeatureSample(
        {**said, "what": "feature sample", "tokens": "corpus", "tokens_digest": tokens.digest, "n_valid": 20},
        torch.arange(n), torch.ones(n), torch.linspace(1, 2, n), torch.ones(n, dtype=torch.int64),
        torch.tensor([[2.0, 0.0]] * n), where, torch.where(where < 0, -1, 4), torch.where(where < 0, -1, 7),
        (torch.arange(n), torch.full((n,), 7), torch.arange(3, n + 3)),
    )  # fmt: skip
    sample.save(copied / "sample.parquet")
    methods = ["query_lens_key"] * n + ["query_lens_value"] * n
    table = rows(
        2 * n, source="a label", source_layer=0, source_id=torch.arange(n).repeat(2), method=methods,
        k=torch.full((2 * n,), 12), n_examples=torch.ones(2 * n, dtype=torch.int64),
        **{name: torch.linspace(0, 1, 2 * n, dtype=torch.float64) for name in ("input_score", "output_score")},
        string_coherence=None, embedding_coherence=None,
    )  # fmt: skip
    scored = {"what": "scores", "dictionaries": ["a label"], "fingerprints": [identity["dictionary_fingerprint"]]}
    column = table.column_names.index("output_score")
    unknown = [None if i >= n and i % 2 else x for i, x in enumerate(table["output_score"].to_pylist())]
    table = table.set_column(column, "output_score", pa.array(unknown, pa.float64()))
    tabulate([Block(n, lambda: table)], scored, out=copied / "scores.parquet", progress=False)
    found = ql.open_results(copied)
    info = found.dictionaries[0]
    assert info.sample == "corpus" and info.score_methods == ("query_lens_key", "query_lens_value")
    assert set(info.fields) == {"rel_var", "stable_k", "input_score", "output_score", "density", "maximum"}
    assert info.mean_scores["input_score query_lens_key"] == pytest.approx((n - 1) / (2 * n - 1) / 2)
    view = found.feature("sae0", 5)
    assert view.activity is not None and view.scores is not None
    assert view.activity.density == 0.25 and [(t.id, c) for t, c in view.activity.tokens] == [(7, 8)]
    later = found.feature("sae0", 40).activity
    assert later is not None and [(t.id, c) for t, c in later.tokens] == [(7, 43)]
    [context] = view.activity.contexts
    assert (context.token.id, context.before and [t.id for t in context.before]) == (7, [3, 4, 5, 6])
    assert context.after and [t.id for t in context.after] == [8, 9, 10, 11, 12]
    assert [(s.method, s.input_score, s.string_coherence) for s in view.scores] == [
        ("query_lens_key", pytest.approx(5 / (2 * n - 1)), None),
        ("query_lens_value", pytest.approx((n + 5) / (2 * n - 1)), None),
    ]
    [best] = found.search(order="-output_score", limit=1).rows
    assert (best.feature, best.values["output_score"]) == (n - 2, pytest.approx((2 * n - 2) / (2 * n - 1)))
    assert best.values["density"] == pytest.approx((n - 2) / 20)
    listed = all_rows(found, text="self", dictionary="sae0", side="value", order="-output_score")
    scores = [row.values["output_score"] for row in listed]
    assert scores == sorted(scores, reverse=True) and all(row.feature % 2 == 0 for row in listed) and listed


def test_what_is_no_result_is_refused_by_name(model: ql.Model, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt.*no \.parquet"):
        ql.open_results(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="there is no result"):
        ql.open_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ql.open_results(tmp_path / "nowhere.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="broken"):
        ql.open_results(tmp_path / "broken.parquet")
    dictionary = ql.directions(model.W_E[:5], layer=1)
    ql.token_features(dictionary, model, out=tmp_path / "other.parquet", k=2, progress=False)
    with pytest.raises(ValueError, match="is a table of"):
        ql.open_results(tmp_path / "other.parquet")
    found = ql.open_results(folder, tmp_path)
    assert sorted(Path(s.file).name for s in found.skipped) == ["broken.parquet", "other.parquet"]


def test_tokens_are_shown_whole() -> None:
    cases = {
        " a\n": "·a⏎", "": "∅", "\ufffd": "\ufffd", "\u202ex": "⟨U+202E⟩x", "\u0301a": "◌\u0301a",
        "👩\u200d💻": "👩\u200d💻", "\u200d": "⟨U+200D⟩", "<b>": "<b>", "\u2028": "⟨U+2028⟩", "\t\r\u00a0": "⇥␍⍽",
    }  # fmt: skip
    assert {text: shown(text) for text in cases} == cases
    assert shown("\ud800") == "⟨U+D800⟩"
    assert [direction(t) for t in (" مرحبا", "שלום", "12 a", "…")] == ["rtl", "rtl", "ltr", "ltr"]


def test_views_are_json(opened: Results) -> None:
    import orjson

    view = json.loads(orjson.dumps(opened.feature("sae0", 7)))
    assert view["signatures"][0]["top"][0]["token"]["text"] == opened.feature("sae0", 7).signatures[0].top[0].token.text
