"""The pages over real results: what they show, odd tokens, mistakes, files that change, the static report."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from served_results import N_FEATURES, VOCABULARY
from starlette.testclient import TestClient
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.queries.results import open_results
from querylens_fast.queries.views import Activity, Context, Link, Score
from querylens_fast.runs.part_writer import PartWriter
from querylens_fast.serve import static_report
from querylens_fast.serve.app import create_app
from querylens_fast.serve.markup import environment, number


@pytest.fixture(scope="module")
def folder(served: Path) -> Path:
    return served / "results"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(open_results(folder)), base_url="http://127.0.0.1") as made:
        yield made


class Page(HTMLParser):
    """Elements of a page: their attributes and texts by name, ids, and names of fields with a label."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.labelled: list[bool] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("input", "select", "textarea") and dict(attrs).get("type") != "hidden":
            own = dict(attrs).get("id")
            targets = [a.get("for") for t, a in self.elements if t == "label"]
            self.labelled.append(
                "label" in self.open or "aria-label" in dict(attrs) or (own is not None and own in targets)
            )
        if tag not in ("meta", "link", "input", "br", "img", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1] if self.open else None}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


ADDRESSES = ("/", "/search", "/search?q=self", "/feature/sae1/7", "/token/9", "/compare", "/try", "/api/docs", "/lost")


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_page_is_whole_labelled_and_without_inline_code(client: TestClient, address: str) -> None:
    """One main landmark and heading, a language, a title, labels on fields, ids once, nothing that the policy bans."""
    answer = client.get(address)
    assert answer.status_code == (404 if address == "/lost" else 200)
    assert answer.headers["content-type"].startswith("text/html")
    page = Page(answer.text)
    assert not page.open and page.all("html")[0]["lang"] == "en" and "".join(page.texts["title"]).strip()
    assert [len(page.all(tag)) for tag in ("main", "h1", "header", "footer")] == [1, 1, 1, 1]
    assert page.all("a")[0]["href"] == "#main" and all(page.labelled)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert not any(name == "style" or name.startswith("on") for _, a in page.elements for name in a)
    assert [a.get("src") for a in page.all("script")] == ["/static/app.js"]
    assert all(str(a["href"]).startswith(("/", "#")) for a in page.all("a") if "href" in a)
    for asset in ("/static/app.js", "/static/style.css", "/static/icon.svg"):
        assert client.get(asset).status_code == 200


def test_tokens_are_text_with_visible_spaces_and_their_own_direction(client: TestClient) -> None:
    pages = {i: client.get(f"/token/{i}").text for i in range(len(VOCABULARY))}
    everything = "".join(pages.values())
    assert "<script>alert" not in everything and "<img" not in everything and "\u202e" not in everything
    shown = {
        "<script>alert(1)</script>": '<bdi dir="ltr">&lt;script&gt;alert(1)&lt;/script&gt;</bdi>',
        "שלום": '<bdi dir="rtl">שלום</bdi>',
        " مرحبا": '<bdi dir="rtl"><i>·</i>مرحبا</bdi>',
        "\u202eabc": "<i>⟨U+202E⟩</i>abc",
        "\n        ": "<i>⏎········</i>",
        "\t": "<i>⇥</i>",
        "\ufffd": '<bdi dir="ltr">�</bdi>',
        "\u0301x": "◌\u0301x",
        "": "∅",
        "&amp;": "&amp;amp;",
        "·": '<bdi dir="ltr">·</bdi>',
    }
    for word, markup in shown.items():
        assert markup in pages[VOCABULARY.index(word)], word


def test_a_search_finds_both_spellings_and_pages_hold_every_feature_once(client: TestClient) -> None:
    assert "Features with" in (first := client.get("/search?q=self").text)
    assert '<bdi dir="ltr">self</bdi>' in first and "<i>·</i>self" in first
    exact = client.get("/search?q=self&exact=1&side=value").text
    assert "token 9" not in re.findall(r'title="([^"]*)"', exact.split("<h1>")[1].split("</h1>")[0])[0]
    by_id = client.get("/search?token=20&side=key").text
    assert 'name="token" value="20"' in by_id and "a/b?c#d</bdi>" in by_id.split("<h1>")[1].split("</h1>")[0]
    assert "a/b?c#d</bdi>" not in client.get("/search?token=20&q=self").text.split("<h1>")[1].split("</h1>")[0]
    found: list[str] = []
    address: str | None = "/search?order=-rel_var"
    while address:
        page = client.get(address).text
        body = page.split("<main")[1]
        found += re.findall(r'<th scope="row"><a href="(/feature/[^"]+)"', body)
        following = re.search(r'rel="next" href="([^"]+)"', body)
        address = following[1].replace("&amp;", "&") if following else None
        assert address is None or "order=-rel_var" in address
    assert len(found) == len(set(found)) == 2 * N_FEATURES
    assert all(client.get(a).status_code == 200 for a in found[:3])


def test_a_number_leads_to_features_and_filters_narrow(client: TestClient) -> None:
    assert 'href="/feature/sae0/12"' in client.get("/search?q=12").text
    assert "/feature/sae1/12" not in client.get("/search?q=12&dictionary=sae0").text.split("<h1>")[1]
    middle = sorted(row["rel_var"] for i in range(N_FEATURES) for row in ql.show(result(client), i))[N_FEATURES // 2]
    rows = client.get(f"/search?dictionary=sae1&rel_var_max={middle}").text.split("<tbody>")[1]
    values = [float(v) for v in re.findall(r'data-name="relative variance">([\d.]+)', rows)]
    assert values and all(v <= middle + 1e-3 for v in values) and "sae0" not in rows
    assert "No feature fits" in client.get("/search?rel_var_min=7").text
    assert "as one token" in client.get("/search?q=nowhere").text


def test_the_feature_page_shows_all_that_is_known(client: TestClient) -> None:
    page = client.get("/feature/sae1/7").text
    row = ql.show(result(client), 7)[0]
    for score, error in list(zip(row["top_scores"], row["top_se"], strict=True))[:10]:
        assert f"{score:.2f} <small>±{error:.2f}</small>".replace("-", "−") in page
    assert page.count('<tr><td class="rank">10</td>') == 8 and '<td class="rank">12</td>' not in page
    assert page.count('<td class="rank">12</td>') < client.get("/feature/sae1/7?rows=all").text.count('rank">12<')
    for text in ("Logit Lens", "Query Lens, first order", "∩", "relative variance", "Layers of the first order",
                 "closest in the same dictionary", "ql.open_results"):  # fmt: skip
        assert text in page, text
    assert 'rel="prev" href="/feature/sae1/6"' in page and 'rel="next" href="/feature/sae1/8"' in page
    assert 'aria-disabled="true">Previous' in client.get("/feature/sae1/0").text
    assert 'rel="next" href="/feature/sae1/8?rows=all"' in client.get("/feature/sae1/7?rows=all").text
    python = re.search(r'<code id="python">(.*?)</code>', page, re.S)
    assert python
    names: dict = {}
    exec(python[1].replace("&#39;", "'").replace("&#34;", '"'), names)
    assert any(getattr(value, "feature", None) == 7 for value in names.values())


def result(client: TestClient) -> Path:
    return client.app.state.results.paths[0] / "sae1.query_lens_value.parquet"  # type: ignore[attr-defined]


def test_overview_and_compare(client: TestClient) -> None:
    overview = client.get("/").text
    assert f"{2 * N_FEATURES} features in 2 dictionaries" in overview
    assert 'role="img" aria-label="Mean relative variance by layer"' in overview and "as a table" in overview
    presets = client.get("/compare").text
    assert "The same features under two presets" in presets
    chosen = re.findall(r'<option value="([^"]+)" selected', presets)
    assert chosen == ["sae0/logit_lens_value", "sae0/query_lens_value"]
    top, both = (client.get(f"/token/9{ends}").text for ends in ("", "?ends=both"))
    assert "features that read it least" in both and "least" not in top and 'href="/token/9?ends=both"' in top
    others = client.get("/compare?a=sae0/query_lens_value&b=sae1/query_lens_value").text
    assert "matched by the tokens they share" in others
    following = re.search(r'rel="next" href="([^"]+)"', others)
    assert following and client.get(following[1].replace("&amp;", "&")).status_code == 200
    random = client.get("/random?dictionary=sae1", follow_redirects=False)
    assert random.status_code == 303 and random.headers["location"].startswith("/feature/sae1/")


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        ("/feature/sae1/70000", 404, "70000"),
        ("/feature/sae1/x", 404, "expected a number"),
        ("/feature/other/3", 404, "Features of sae0"),
        ("/token/99999", 404, "token 99999"),
        ("/random?dictionary=other", 404, "other"),
        ("/compare?a=other/x&b=sae0/y", 404, "other"),
        ("/compare?a=sae0/nothing&b=sae0/nothing", 422, "nothing"),
        ("/search?side=up", 422, "side is"),
        ("/search?layer=-1", 422, "expected a whole number"),
        ("/search?rel_var_min=much", 422, "expected a number"),
        ("/search?rel_var_min=nan", 422, "expected numbers"),
        ("/search?after=zzz", 422, "after is"),
        ("/search?order=score", 200, "Features"),
        ("/search?q=%3Cb%3E%22", 200, "“<bdi>&lt;b&gt;&#34;</bdi>”"),
        ("/search?q=%FF%FE%00", 200, "No signature"),
        ("/lost/for/ever", 404, "Overview"),
    ],
)
def test_a_mistake_ends_in_a_page_that_says_what_to_do(
    client: TestClient, address: str, status: int, words: str
) -> None:
    answer = client.get(address)
    assert answer.status_code == status
    assert words in answer.text and "Traceback" not in answer.text
    assert not Page(answer.text).open
    assert "This address cannot be answered" in client.post("/search").text


def test_results_that_are_cut_deleted_and_put_back_while_served(folder: Path, tmp_path: Path) -> None:
    """Before the files are looked at again a page says that the result has changed; then the rest is shown."""
    for file in folder.glob("sae1.*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "sae1.query_lens_value.parquet"
    whole = path.read_bytes()
    results = open_results(tmp_path)
    pages = ("/feature/sae1/3", "/", "/search?q=self", "/compare", "/token/9")
    with TestClient(create_app(results), base_url="http://127.0.0.1") as client:
        assert client.get("/feature/sae1/3").text.count("Query Lens</caption>") == 2
        for change in (lambda: path.write_bytes(whole[: len(whole) // 2]), path.unlink):
            change()
            for answer in map(client.get, pages):
                assert answer.status_code in (200, 410) and not Page(answer.text).open
                assert answer.status_code == 200 or "The result has changed" in answer.text
            results.refresh()
            assert [client.get(address).status_code for address in pages] == [200] * len(pages)
            assert client.get("/feature/sae1/3").text.count("Query Lens</caption>") == 1
            assert ("1 file is not shown" in client.get("/").text) == path.exists()
        path.write_bytes(whole)
        results.refresh()
        assert client.get("/feature/sae1/3").text.count("Query Lens</caption>") == 2


def test_a_run_that_is_not_finished_is_on_the_overview(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "later.parquet"
    shutil.copy(folder / "sae0.logit_lens_value.parquet", tmp_path)
    model = ql.load_model(folder.parent / "model")
    source = ql.directions(torch.randn(9, model.d_model), layer=2, name="later")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        written = []

        def stop(self: PartWriter, start: int, table: pa.Table) -> None:
            written.append(start)
            if len(written) == 3:
                raise KeyboardInterrupt
            write(self, start, table)

        write = PartWriter.write
        patch.setattr(PartWriter, "write", stop)
        ql.signatures(source, model, preset="logit_lens_value", k=3, out=path, block_rows=2, progress=False)
    with TestClient(create_app(open_results(tmp_path)), base_url="http://127.0.0.1") as client:
        text = re.sub(r"<[^>]*>|\s+", " ", client.get("/").text)
        assert re.search(r"Not finished: +logit_lens_value of later, [1-8] of 9 features", text)
        ql.signatures(source, model, preset="logit_lens_value", k=3, out=path, block_rows=2, progress=False)
        client.app.state.results.refresh()  # type: ignore[attr-defined]
        assert "Not finished" not in client.get("/").text and client.get("/feature/later/8").status_code == 200


def test_what_is_compared_without_being_asked(folder: Path, tmp_path: Path) -> None:
    """Logit Lens and Query Lens; one preset of two dictionaries; a result with itself where there is no other."""
    name, shown = "logit_lens_key.parquet", []
    for n, names in enumerate(
        ((f"sae0.{name}",), (f"sae0.{name}", f"sae1.{name}"), (f"sae1.{name}", "sae1.query_lens_key.parquet"))
    ):
        (tmp_path / str(n)).mkdir()
        for one in names:
            shutil.copy(folder / one, tmp_path / str(n))
        with TestClient(create_app(open_results(tmp_path / str(n))), base_url="http://127.0.0.1") as client:
            shown.append(re.findall(r'value="([^"]*)" selected', client.get("/compare").text))
    assert shown == [
        ["sae0/logit_lens_key"] * 2,
        ["sae0/logit_lens_key", "sae1/logit_lens_key"],
        ["sae1/logit_lens_key", "sae1/query_lens_key"],
    ]


def test_reliability_is_on_the_overview_and_scores_can_be_bounded(client: TestClient) -> None:
    results = client.app.state.results  # type: ignore[attr-defined]
    stable = results.dictionaries[1].stable_k
    assert set(stable) == {"query_lens_key", "query_lens_value", "query_lens_value_approx"}
    text = re.sub(r"<[^>]*>|\s+", " ", client.get("/").text)
    assert "Reliability" in text and re.search(
        rf"sae1 +1 +key: Query Lens +{re.escape(number(stable['query_lens_key']))}", text
    )
    least = max(row.score for row in results.search("self").rows)
    page = client.get("/search", params={"q": "self", "score_min": least}).text
    assert 'name="score_min"' in page and page.count('<th scope="row">') == 1
    assert 'name="score_min"' not in client.get("/search?score_min=3").text


def test_what_cannot_be_compared_is_told_beside_the_form(client: TestClient) -> None:
    answer = client.get("/compare?a=sae0/query_lens_key&b=sae1/query_lens_value")
    assert answer.status_code == 422 and "are of different sides" in answer.text
    assert '<option value="sae1/query_lens_value" selected' in answer.text


def test_a_histogram_and_the_hook_point_are_shown(client: TestClient) -> None:
    text = client.get("/feature/sae1/7").text
    assert text.count("Histogram of the scores") == 1 and "value, Logit Lens" in text
    assert " at blocks.1.hook_resid_post" in text and "blocks.1.hook_resid_post" in client.get("/").text


def test_a_page_shows_activity_scores_and_features_elsewhere(folder: Path) -> None:
    """What these results do not hold, put into a view of them."""
    results = open_results(folder)
    view = results.feature("sae1", 7)
    tokens = [t.token for s in view.signatures for t in s.top]
    contexts = tuple(
        Context(2.0 - i / 10, i, 3, tokens[i], *((tuple(tokens[:4]), tuple(tokens[4:8])) if i % 2 else (None, None)))
        for i in range(20)
    )
    full = replace(
        view,
        activity=Activity(
            0.00012, 0.5, 2.0, 17, 9, tuple((t, 3) for t in tokens[:3]), contexts, "some/where/text.safetensors"
        ),
        scores=(
            Score("query_lens_key", 25, 20, 0.41, None, 0.1, None),
            Score("query_lens_key", 5, 20, 0.1, None, 0.1, None),
        ),
        links=(Link("downstream", None, "blocks.2.mlp.W_in", 2, 44, -0.25), Link("mlp", "sae0", "sae0", 0, 3, 0.5)),
    )
    text = static_report._page([full], 5, "All")
    assert not Page(text).open
    for words in (
        "0.000120", "17 positions in 9 sequences of", "text.safetensors", "5 more", "Histogram of the scores", "0.410",
        "input score, Query Lens", "features that read it", "blocks.2.mlp.W_in 44", "−0.250", "before: MLP",
    ):  # fmt: skip
        assert words in text, words
    known = [
        replace(d, mean_scores={"input_score query_lens_key": 0.3, "string_coherence x": 0.2})
        for d in results.dictionaries
    ]
    overview = environment().get_template("overview.html.j2").render(
        pages=(), here="/", dictionaries=known, total=1, models=["a/b"], progress=(), skipped=(), rel_var=None,
        scored=known, score_names=["input_score query_lens_key", "string_coherence x"],
    )  # fmt: skip
    assert "input score, Query Lens key" in overview and "string coherence, x" in overview and "0.300" in overview


def test_the_static_report_needs_nothing_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", str(folder), "--features", "sae1:7,3 sae0:1", "--out", str(out), "--title", "A <title>"]
    from querylens_fast.cli import app

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and str(out) in result.output
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and not page.all("script") and not page.all("link") and not page.all("img")
    assert all(str(a["href"]).startswith("#") for a in page.all("a"))
    assert {"#sae1-7", "#sae1-3", "#sae0-1"} <= {a["href"] for a in page.all("a")}
    assert "url(" not in text and "@import" not in text and "A &lt;title&gt;" in text
    assert "<script" not in text and "default-src 'none'" in text and text.count("<article") == 3
    for features, words in (("7", "say which: sae0, sae1"), ("sae1:x", "expected ids"), ("sae1:999", "999")):
        failed = CliRunner().invoke(app, ["report", str(folder), "--features", features, "--out", str(out)])
        assert failed.exit_code == 2 and words in failed.stderr


def test_without_a_model_the_page_says_how(client: TestClient) -> None:
    assert "--model MODEL --dictionary" in client.get("/try?text=x").text
