"""The pages in headless Chromium, as a person uses them. Screenshots go to out/screenshots (not in git).

Needs the Python package playwright (no browser of its own) and a Chromium: Debian's package `chromium`, or the one that
the environment variable CHROMIUM names.
"""

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served_results import N_FEATURES, VOCABULARY

from querylens_fast.queries.results import open_results
from querylens_fast.serve.app import create_app, listen

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: apt-get install chromium, or set CHROMIUM"),
]
SCREENSHOTS = Path(__file__).parent.parent / "out" / "screenshots"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = {
    "overview": "/",
    "search": "/search?q=self",
    "list": "/search?order=-rel_var",
    "feature": "/feature/sae1/7?rows=all",
    "token": "/token/3",
    "compare": "/compare",
    "try": "/try",
    "api": "/api/docs",
    "missing": "/feature/sae1/70000",
}


@pytest.fixture(scope="module")
def address(served: Path) -> Iterator[str]:
    """Where the pages are served."""
    import uvicorn

    listening = listen("127.0.0.1", 0, None)
    server = uvicorn.Server(uvicorn.Config(create_app(open_results(served / "results")), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


Open = Callable[..., "playwright.Page"]


@pytest.fixture
def tab(browser: "playwright.Browser", address: str) -> Iterator[Open]:
    """Opens pages of given width and scheme; fails on a script's error or anything that the content policy stopped."""
    contexts, complaints = [], []

    def opened(path: str, width: int = 1280, scheme: str = "light", **options: object) -> "playwright.Page":
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, base_url=address, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Content Security Policy" in m.text else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda r: None if r.url.startswith(address) else complaints.append(f"asked {r.url}"))
        page.goto(path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints


def overflow(page: "playwright.Page") -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_search_feature_neighbour_and_back(tab: Open) -> None:
    page = tab("/")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.type("self")
    page.locator("#known option").nth(1).wait_for(state="attached")
    offered = page.evaluate("[...document.getElementById('known').options].map(o => o.value)")
    assert offered == ["self", " self"]
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?q=self")
    assert page.locator("h1").inner_text().startswith("Features with")
    page.locator("table.list tbody th a").first.click()
    page.wait_for_url("**/feature/**")
    feature = page.url
    assert page.locator("h1").inner_text() == f"Feature {feature.rsplit('/', 1)[1]}"
    page.get_by_text("closest in the same dictionary").locator("xpath=..").locator("a").first.click()
    page.wait_for_url(lambda url: url != feature)
    assert "/feature/" in page.url
    page.go_back()
    assert page.url == feature
    page.go_back()
    assert page.url.endswith("/search?q=self") and page.locator("table.list tbody tr").count() > 0
    page.goto("/feature/sae1/7")
    page.keyboard.press("j")
    page.wait_for_url("**/feature/sae1/8")
    page.keyboard.press("k")
    page.wait_for_url("**/feature/sae1/7")


def test_paging_and_a_shared_address(tab: Open) -> None:
    page = tab("/search")
    page.select_option("main select[name=dictionary]", "sae1")
    page.select_option("main select[name=order]", "-rel_var")
    page.get_by_role("main").get_by_role("button", name="Search").click()
    links = page.locator("table.list tbody th a")
    seen = []
    while True:
        seen += links.evaluate_all("found => found.map(a => a.pathname)")
        following = page.get_by_role("link", name="Next page")
        if not following.count():
            break
        following.click()
        page.wait_for_load_state()
    assert len(seen) == len(set(seen)) == N_FEATURES
    shared = tab(page.url)  # another person's browser
    assert shared.locator("main select[name=order]").input_value() == "-rel_var"
    assert shared.locator("table.list tbody th a").evaluate_all("found => found.map(a => a.pathname)") == (
        links.evaluate_all("found => found.map(a => a.pathname)")
    )
    page.get_by_role("link", name="First page").click()
    page.wait_for_load_state()
    assert links.first.evaluate("a => a.pathname") == seen[0]


def test_dark_and_light(tab: Open) -> None:
    def ground(page: "playwright.Page") -> int:
        return int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])

    page = tab("/", scheme="dark")
    assert ground(page) < 60
    switch = page.get_by_role("button", name="Light")
    switch.click()
    assert ground(page) > 200 and page.get_by_role("button", name="Dark").is_visible()
    page.goto("/search")
    assert ground(page) > 200, "the choice is kept"
    assert ground(tab("/", scheme="light")) > 200


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_their_texts_have_contrast(tab: Open, width: int, scheme: str) -> None:
    """No page scrolls sideways, and every text that is drawn has a contrast of 4.5. Screenshots are kept."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = tab("/", width, scheme)
    for name, path in PAGES.items():
        page.goto(path)
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
        assert overflow(page) <= 0, name
        assert page.evaluate(LOW_CONTRAST) == [], name


def test_axe_finds_nothing(tab: Open) -> None:
    """axe-core's rules of accessibility hold on every page."""
    axe = pytest.importorskip("axe_playwright_python", reason="needs the package axe-playwright-python")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    page = tab("/")
    for name, path in PAGES.items():
        page.goto(path)
        page.evaluate(script)
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 10
        assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == [], name


def test_markup_in_tokens_stays_text(tab: Open) -> None:
    page = tab(f"/token/{VOCABULARY.index('<script>alert(1)</script>')}")
    assert page.locator("h1 bdi").inner_text() == "<script>alert(1)</script>"
    page.goto("/search?q=%3Cscript%3Ealert(1)%3C/script%3E")
    assert page.locator("h1 bdi").first.inner_text() == "<script>alert(1)</script>"
    assert page.locator("main script").count() == 0
    page.goto(f"/token/{VOCABULARY.index('שלום')}")
    assert page.locator("h1 bdi").evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert page.locator("h1 bdi").evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"


def test_without_script_everything_is_there(tab: Open) -> None:
    page = tab("/feature/sae1/7", java_script_enabled=False)
    assert page.locator("main").inner_text().count("Query Lens") >= 2
    assert not page.get_by_role("button", name="Copy as Python").is_visible()
    page.locator("details summary").first.click()
    assert page.locator("details table").first.is_visible()


def test_copy_as_python(tab: Open) -> None:
    page = tab("/feature/sae1/7", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as Python").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert "open_results" in page.evaluate("navigator.clipboard.readText()")


LOW_CONTRAST = """() => {
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
    const s = c[i] / 255; return sum + w * (s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4); }, 0) + 0.05;
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; }
    return [255, 255, 255]; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.data.trim() || !e.checkVisibility() || style.clipPath !== "none") continue;
    const a = light(parts(e instanceof SVGElement ? style.fill : style.color)), b = light(ground(e));
    if (Math.max(a, b) / Math.min(a, b) < 4.5) found.push(`${node.data.trim().slice(0, 40)}: ${a} on ${b}`);
  }
  return [...new Set(found)];
}"""
