"""Queries over result files: the same answers as `ql.search` and `ql.show`, with and without an index."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from served_results import N_FEATURES, VOCABULARY, all_rows

import querylens_fast as ql
from querylens_fast.queries import Budget, Filter, QueryStopped, Results
from querylens_fast.queries.display import direction, shown

VALUE = "sae0.query_lens_value.parquet"


@pytest.fixture(scope="module", params=["without an index", "with an index"])
def opened(request: pytest.FixtureRequest, served: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    copied = tmp_path_factory.mktemp("opened") / "results"
    shutil.copytree(served / "results", copied)
    found = ql.open_results(copied)
    if request.param == "with an index":
        found.build_indexes()
    assert all(p.indexed == (request.param == "with an index") for d in found.dictionaries for p in d.presets)
    return found


@pytest.fixture
def test_a_feature_is_what_the_file_says(opened: Results, served: Path) -> None:
    view = opened.feature("sae0", 7)
    assert [s.preset for s in view.signatures] == [
        "logit_lens_key", "logit_lens_value", "query_lens_key", "query_lens_value"
    ]  # fmt: skip
    assert (view.previous, view.next, view.layer) == (6, 8, 0)
    for signature in view.signatures:
        [row] = ql.show(served / "results" / f"sae0.{signature.preset}.parquet", 7)
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


def test_layer_terms_are_those_of_the_file(opened: Results, served: Path) -> None:
    [row] = ql.show(served / "results" / "sae1.query_lens_value_approx.parquet", 3)
    terms = next(s for s in opened.feature("sae1", 3).signatures if s.preset == "query_lens_value_approx").layer_terms
    assert terms is not None and [t.layer for t in terms] == row["layer_indices"]
    np.testing.assert_allclose([t.energy for t in terms], row["layer_energy_scores"], rtol=1e-6)
    assert [[x.id for x in t.bottom] for t in terms] == row["layer_bottom_ids"]


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_search_is_that_of_the_library(opened: Results, served: Path, end: str) -> None:
    for token in ("self", " self", " word30"):
        hits = ql.search(served / "results" / VALUE, token, side=end)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("order", [None, "-score", "rel_var"])
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_rows_are_filtered_by_the_score_of_their_token(opened: Results, order: str | None, end: str) -> None:
    every = all_rows(opened, text="self", order=order, end=end)
    scores = sorted(r.score for r in every if r.score is not None)
    low, high = scores[len(scores) // 4], scores[3 * len(scores) // 4]
    kept = all_rows(opened, limit=3, text="self", order=order, end=end, filters=[Filter("score", low, high)])
    assert kept == [r for r in every if r.score is not None and low <= r.score <= high] and 0 < len(kept) < len(every)
    with pytest.raises(ValueError, match="without a token there is none"):
        opened.search(filters=[Filter("score", 1.0)])


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
