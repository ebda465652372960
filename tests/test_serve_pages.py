"""The pages over real results: what they show, odd tokens, mistakes, files that change, the static report."""

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from served_results import N_FEATURES, VOCABULARY, odd_model, write_results
from starlette.testclient import TestClient
from tiny_models import save_tiny_model
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.queries.results import open_results
from querylens_fast.serve import try_it
from querylens_fast.serve.app import create_app
from querylens_fast.serve.markup import number, preset_name
from querylens_fast.serve.plots import line_plot, nice_ticks

STYLE = Path(ql.__file__).parent / "serve" / "static" / "style.css"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    write_results(odd_model(save_tiny_model("gpt2", root / "model")), root / "results")
    return root / "results"


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


def test_results_that_are_deleted_cut_replaced_or_written_while_served(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("sae1.*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "sae1.query_lens_value.parquet"
    whole = path.read_bytes()
    with TestClient(create_app(open_results(tmp_path)), base_url="http://127.0.0.1") as client:
        assert client.get("/feature/sae1/3").status_code == 200
        path.write_bytes(whole[: len(whole) // 2])
        for address in ("/feature/sae1/3", "/", "/search?q=self", "/compare"):
            answer = client.get(address)
            assert answer.status_code in (200, 410) and "Traceback" not in answer.text, address
            assert "Overview" in answer.text
        path.unlink()
        assert client.get("/").status_code in (200, 410)
        assert client.get("/feature/sae1/3").status_code in (200, 410)
        parts = tmp_path / "sae1.query_lens_value.parquet.parts"
        assert not parts.exists()
        path.write_bytes(whole)
        client.get("/")
        assert "Query Lens" in client.get("/feature/sae1/3").text


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


def test_colours_can_be_read() -> None:
    """Text has a contrast of at least 4.5 with what it stands on, in both schemes, on every shade."""
    colours = dict(re.findall(r"--([\w-]+): light-dark\((#\w+, #\w+)\)", STYLE.read_text()))
    shades = [f"{sign}{i}" for sign in "pn" for i in range(1, 7)]
    grounds = ("paper", "card", "sunk")
    pairs = [("ink", g) for g in (*grounds, "warn-back", *shades)] + [("soft", g) for g in grounds]
    pairs += [("link", "paper"), ("link", "card"), ("warn", "warn-back")]
    pairs += [(f"series-{i}", "card") for i in range(1, 7)] + [("soft", s) for s in shades if s[1] in "123"]
    for scheme in (0, 1):
        hexes = {name: both.split(", ")[scheme] for name, both in colours.items()}
        for text, ground in pairs:
            assert contrast(hexes[text], hexes[ground]) >= 4.5, (scheme, text, ground)
        marks = "#3f4a58" if scheme == 0 else "#d3dbe5"  # of marks in strong chips
        assert all(contrast(marks, hexes[s]) >= 4.5 for s in shades if s[1] in "456")
        assert contrast("#ffffff" if scheme == 0 else "#10161e", hexes["link"]) >= 4.5  # of the main buttons


def contrast(first: str, second: str) -> float:
    """WCAG 2's contrast ratio."""
    light = []
    for colour in (first, second):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        light.append(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05)
    return max(light) / min(light)


def test_numbers_names_and_plots() -> None:
    assert [number(x) for x in (None, float("nan"), 0.0, 0.25, 12.345, 1234567, 2.5e-7, -3)] == [
        "–", "–", "0", "0.250", "12.3", "1\u202f234\u202f567", "2.50e−07", "−3",
    ]  # fmt: skip
    assert preset_name("query_lens_value_approx~2") == "Query Lens, first order (2)"
    assert preset_name("value_identity_embed") == "value identity embed"
    for low, high in ((0.0, 0.74), (-3.0, 8.0), (5.0, 5.0), (1e-9, 2e-9)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    assert line_plot({}, "x", "y") is None and line_plot({"a": [(0, float("nan"), None)]}, "x", "y") is None
    plot = line_plot({"a": [(0, 0.2, 0.1), (3, 0.9, None)], "b": [(1, 0.5, None)]}, "x", "y")
    assert plot is not None and all(0 <= m.y <= plot.bottom for line in plot.series for m in line.marks)


@pytest.fixture(scope="module")
def trying(folder: Path) -> Iterator[TestClient]:
    """The embedded model beside other results: what is tried does not depend on them."""
    from querylens_fast.demo import ASSETS

    app = create_app(open_results(folder), model=ASSETS / "model", run={"sae1": ASSETS / "sae_layer1"})
    with TestClient(app, base_url="http://127.0.0.1") as made:
        yield made


def test_a_text_is_tried(trying: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    page = trying.get("/try", params={"dictionary": "sae1", "text": "def parse(self):\n    return <b>"})
    assert page.status_code == 200 and "Features at each token" in page.text and "<b>\n" not in page.text
    tried: try_it.TryIt = trying.app.state.try_it  # type: ignore[attr-defined]
    firing = tried.firing("sae1", "def parse(self")
    acts = activations_of(tried, "def parse(self")
    assert len(firing.tokens) == len(acts)
    for token, own in zip(firing.tokens, acts, strict=True):
        best = sorted(own.tolist(), reverse=True)[: len(token.features)]
        assert [v for _, v in token.features] == pytest.approx(best)
    assert max(f.maximum for f in firing.features) == pytest.approx(float(acts.max()))
    steered = {"dictionary": "sae1", "prompt": "def f(", "feature": "656", "strength": "12", "n": "3"}
    page = trying.get("/try", params=steered)
    direct = ql.steer(tried.model, tried.dictionaries["sae1"], 656, 12.0, "def f(", n_tokens=3)
    assert page.status_code == 200 and "With feature" in page.text
    assert tried.steer("sae1", 656, 12.0, "def f(", 3) == direct
    for change, words in (
        ({"feature": "999999"}, "999999"),
        ({"n": "61"}, "expected 1 to 60"),
        ({"strength": "inf"}, "finite"),
        ({"strength": "strong"}, "expected a number"),
        ({"prompt": "x" * 2001}, "at most 2000"),
        ({"prompt": "x y " * 400}, "expected 1 to 256"),
    ):
        answer = trying.get("/try", params=steered | change)
        assert answer.status_code == 422 and words in answer.text and "Not computed" in answer.text
    assert trying.get("/try?dictionary=sae0&text=x").status_code == 404
    monkeypatch.setattr(try_it, "MAX_SECONDS", -1.0)
    assert "took longer" in trying.get("/try", params=steered).text
    monkeypatch.setattr(try_it, "MAX_SECONDS", 0.0)
    with tried._lock:
        assert "computing for another page" in trying.get("/try", params=steered).text


def activations_of(tried: try_it.TryIt, text: str):
    import torch

    from querylens_fast.lens.ablations import activations

    ids = torch.tensor([tried.model.tokenizer(text)["input_ids"]])
    return activations(tried.model, tried.dictionaries["sae1"], ids)[0]


def test_without_a_model_the_page_says_how(client: TestClient) -> None:
    assert "--model MODEL --dictionary" in client.get("/try?text=x").text
