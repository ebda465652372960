"""The JSON API and its guard: answers, refusals, files that change, clients that go away, and fuzzing without a 500."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import querylens_fast as ql
from querylens_fast.queries import results
from querylens_fast.queries.views import FIELDS
from querylens_fast.serve.app import create_app, listen
from querylens_fast.serve.security import MAX_ADDRESS, MAX_BODY, Guard

HOME = "http://127.0.0.1"
HEAVY = ("torch", "transformers", "triton", "sae_lens", "transformer_lens", "datasets")
READING = """
import sys
import querylens_fast as ql
from querylens_fast.cli import app
assert "pyarrow" not in sys.modules
folder, result = sys.argv[1:3]
for words in (["--help"], ["serve", "--help"], ["show", result, "3"], ["search", result, " self"], ["verify", result]):
    try:
        app(words)
    except SystemExit as end:
        assert end.code == 0, words
from starlette.testclient import TestClient
from querylens_fast.serve.app import create_app
with TestClient(create_app(ql.open_results(folder)), base_url="http://127.0.0.1") as client:
    for page in ("/", "/search?q=self", "/feature/sae1/3", "/token/9", "/compare", "/try", "/api/v1/search?text=self"):
        assert client.get(page).status_code == 200, page
print("imported:", *(m for m in sys.argv[3:] if m in sys.modules))
"""


@pytest.fixture(scope="module")
def folder(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = Path(shutil.copytree(served / "results", tmp_path_factory.mktemp("api") / "results"))
    ql.open_results(copied).build_indexes()
    return copied


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(ql.open_results(folder)), base_url=HOME, raise_server_exceptions=False) as made:
        yield made


def test_answers_are_those_of_the_library(client: TestClient, folder: Path) -> None:
    found = ql.open_results(folder)
    expected: dict[str, Any] = {
        "features/sae0/7": found.feature("sae0", 7),
        "search?text=self&side=key&limit=3": found.search("self", side="key", limit=3),
        "search?order=-rel_var&rel_var_max=0.5&limit=2": found.search(
            order="-rel_var", filters=[results.Filter("rel_var", high=0.5)], limit=2
        ),
        "tokens?text=SEL": found.tokens("sel"),
        "tokens/9?limit=2": found.token(9, limit=2),
        "compare?dictionary=sae0&other=sae1&limit=2": found.compare("sae0", "sae1", limit=2),
    }
    for address, answer in expected.items():
        assert client.get(f"/api/v1/{address}").json() == json.loads(orjson.dumps(answer)), address
    overview = client.get("/api/v1/dictionaries").json()
    assert [d["slug"] for d in overview["dictionaries"]] == ["sae0", "sae1"] and overview["progress"] == []
    assert client.get("/api/v1/random?seed=1").json()["dictionary"] in ("sae0", "sae1")
    page, seen = client.get("/api/v1/search?text=self&limit=9").json(), []
    while page["next"]:
        seen += page["rows"]
        page = client.get("/api/v1/search", params={"text": "self", "limit": 9, "after": page["next"]}).json()
    assert len(seen) > 9 and len({(r["dictionary"], r["preset"], r["feature"], r["token"]["id"]) for r in seen}) == len(
        seen
    )


def test_the_api_is_documented(client: TestClient) -> None:
    schema = client.get("/api/openapi.json").json()
    assert {"/api/v1/search", "/api/v1/features/{dictionary}/{feature}"} <= set(schema["paths"])
    said = {p["name"] for p in schema["paths"]["/api/v1/search"]["get"]["parameters"]}
    assert {f"{field}_{bound}" for field in FIELDS for bound in ("min", "max")} <= said
    page = client.get("/api/docs").text
    for path, methods in schema["paths"].items():
        assert path in page
        for p in methods["get"].get("parameters", []):
            assert p["description"], (path, p["name"])
    for name, kind in schema["components"]["schemas"].items():
        for field, about in kind.get("properties", {}).items() if "Validation" not in name else ():
            assert about.get("description"), (name, field)
    assert 'href="#FeatureView"' in page and 'id="FeatureView"' in page


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("features/nowhere/1", 404, "sae0"),
        ("features/sae0/999", 404, "between 0 and 69"),
        ("features/sae0/x", 422, "integer"),
        ("features/..%2f..%2fetc%2fpasswd/1", 404, ""),
        ("search?text=self&limit=1000", 422, "200"),
        ("search?limit=-1", 422, "limit"),
        ("search?nonsense=1", 422, "nonsense"),
        ("search?order=1;drop", 422, "order"),
        ("search?text=self&after=%00", 422, "after"),
        ("search?rel_var_min=nan", 422, "rel_var"),
        ("tokens/99999999999999999999", 422, ""),
        ("compare?dictionary=sae0&preset=x", 422, "logit_lens_key"),
        ("nothing", 404, ""),
    ],
)
def test_mistakes_are_told(client: TestClient, address: str, status: int, said: str) -> None:
    answer = client.get(f"/api/v1/{address}")
    assert answer.status_code == status and said in answer.json()["error"]


def test_hosts_origins_and_sizes_are_checked(client: TestClient) -> None:
    assert client.get("/api/v1/random", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/api/v1/random", headers={"host": "127.0.0.1.evil.example"}).status_code == 421
    assert client.get("/api/v1/random", headers={"host": "localhost:8765"}).status_code == 200
    assert client.get("/api/v1/random", headers={"host": "10.0.0.1"}).status_code == 421
    assert client.post("/try", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/api/v1/search?text=" + "x" * MAX_ADDRESS).status_code == 414
    assert client.post("/api/v1/search", content=b"x" * (MAX_BODY + 1)).status_code == 413
    assert client.post("/api/v1/search", content=(b"x" * 1024 for _ in range(100))).status_code == 413
    assert client.post("/api/v1/search").status_code == 405
    answer = client.get("/<b>", headers={"host": "<i>.example", "accept": "text/html,*/*"})
    assert answer.status_code == 421 and answer.headers["content-type"].startswith("text/html")
    assert "&lt;i&gt;.example" in answer.text and "<i>" not in answer.text
    answer = client.get("/api/v1/random")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_with_a_token_nothing_is_answered_without_it(folder: Path) -> None:
    app = create_app(ql.open_results(folder), token="s3cret", hosts=["box.example"])
    with TestClient(app, base_url="http://box.example", follow_redirects=False) as client:
        for address in ("/", "/api/v1/random", "/static/style.css", "/api/openapi.json", "/?access_token=wrong"):
            assert client.get(address).status_code == 401, address
        assert client.get("/", headers={"authorization": "Bearer s3cre"}).status_code == 401
        assert "<p>this server needs its token" in client.get("/", headers={"accept": "text/html"}).text
        assert client.get("/", headers={"cookie": "querylens_token=\u00e9".encode("latin-1")}).status_code == 401
        assert client.get("/api/v1/random", headers={"authorization": "Bearer s3cret"}).status_code == 200
        entry = client.get("http://box.example//evil.example/?access_token=s3cret&q=a%20b")
        assert entry.status_code == 303 and entry.headers["location"] == "/evil.example/?q=a+b"
        assert {"HttpOnly", "SameSite=Strict"} <= set(entry.headers["set-cookie"].split("; "))
        assert client.get("/api/v1/random").status_code == 200  # by the cookie
        assert client.get("/api/v1/random", headers={"host": "10.0.0.1"}).status_code == 200


def test_other_machines_need_a_token(folder: Path) -> None:
    for token in ("", "a b;c", "ä" * 8):
        with pytest.raises(ValueError, match="letters, digits"):
            create_app(ql.open_results(folder), token=token)
    with pytest.raises(ValueError, match="give a token"):
        listen("0.0.0.0", 0, None)
    with pytest.raises(ValueError, match="65535"):
        listen("127.0.0.1", 70000, None)
    with listen("127.0.0.1", 0, None) as first, pytest.raises(OSError, match="choose another --port"):
        listen("127.0.0.1", first.getsockname()[1], None)


def test_an_answer_that_takes_too_long_is_given_up(folder: Path) -> None:
    app = create_app(ql.open_results(folder), query_seconds=-1.0)
    with TestClient(app, base_url=HOME) as client:
        answer = client.get("/api/v1/search?text=self")
        assert answer.status_code == 503 and "took longer" in answer.json()["error"]


def test_a_client_that_goes_away_stops_its_query() -> None:
    stopped = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        budget = scope["state"]["budget"]

        def wait() -> None:
            while True:
                budget.check()
                time.sleep(0.001)

        try:
            await asyncio.to_thread(wait)
        except Exception:
            stopped.set()
            raise

    async def main() -> None:
        messages = iter([{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None: ...

        scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b""}
        await Guard(app, token=None, hosts=(), seconds=60)(
            {**scope, "headers": [(b"host", b"localhost")]}, receive, send
        )

    with pytest.raises(Exception, match="cancelled"):
        asyncio.run(main())
    assert stopped.is_set()


def test_results_that_change_while_served_give_clear_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LOOK_SECONDS", 0.0)
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    path = copied / "sae0.query_lens_value.parquet"
    whole, other = path.read_bytes(), (copied / "sae0.logit_lens_value.parquet").read_bytes()
    addresses = ("features/sae0/7", "search?text=self", "dictionaries", "tokens/9", "compare?dictionary=sae0", "random")
    with TestClient(create_app(ql.open_results(copied)), base_url=HOME, raise_server_exceptions=False) as client:
        for content in (whole[: len(whole) // 2], b"", other, None, whole):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            for index in (False, True):
                if index and content is not None:
                    os.truncate(copied / "sae0.query_lens_key.parquet.index", 5000)
                for address in addresses:
                    answer = client.get(f"/api/v1/{address}")
                    known = (200, 404, 410, 422) if "compare" in address else (200, 404, 410)
                    assert answer.status_code in known, (address, answer.text)
                    assert "Traceback" not in answer.text
        shutil.rmtree(copied)
        answer = client.get("/api/v1/features/sae0/7")
        assert answer.status_code in (404, 410) and answer.json()["error"]


ODD = st.one_of(
    st.text(max_size=30),
    st.integers(-(1 << 70), 1 << 70).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["self", "' OR 1=1 --", "../../etc/passwd", "%00", "\u202e", "query_lens_value", "sae0", "-rel_var"]
    ),
)
NAMES = st.sampled_from(
    ["text", "token_id", "exact", "side", "end", "preset", "dictionary", "layer", "order", "after", "limit", "other"]
    + ["other_preset", "seed", "access_token", "q", "token", "a", "b", "rows", "ends"]
    + [f"{field}_{bound}" for field in FIELDS for bound in ("min", "max")]
)
API_ROUTES = ["search", "dictionaries", "tokens", "random", "compare", "features/sae0", "tokens/9"]
PAGES = ["", "search", "feature/sae0", "token", "random", "compare", "try", "api/docs"]
ROUTES = st.sampled_from([*(f"api/v1/{route}" for route in API_ROUTES), *PAGES])


def ask(client: TestClient, route: str, rest: list[str], parameters: dict[str, str]) -> None:
    from urllib.parse import quote

    path = "/".join([f"/{route}", *(quote(part, safe="") for part in rest)])
    answer = client.get(path, params=parameters, follow_redirects=False)
    assert answer.status_code in (200, 303, 307, 404, 405, 410, 414, 422), (path, parameters, answer.text)
    if route.startswith("api/v1/") and answer.status_code != 307 and answer.content:
        answer.json()


@given(ROUTES, st.lists(ODD, max_size=2), st.dictionaries(NAMES, ODD, max_size=5))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_ends_in_a_500(client: TestClient, route: str, rest: list[str], parameters: dict[str, str]) -> None:
    ask(client, route, rest, parameters)


@pytest.mark.slow
@given(ROUTES, st.lists(ODD, max_size=2), st.dictionaries(NAMES, ODD, max_size=5))
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_of_many_ends_in_a_500(
    client: TestClient, route: str, rest: list[str], parameters: dict[str, str]
) -> None:
    ask(client, route, rest, parameters)


@pytest.mark.slow
def test_the_command_answers_indexes_and_ends_cleanly(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied", ignore=shutil.ignore_patterns("*.index")))
    command = [sys.executable, "-m", "querylens_fast", "serve", str(copied), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().split()[0]
        indexed, until = False, time.monotonic() + 60
        while not indexed and time.monotonic() < until:
            with urllib.request.urlopen(f"{address}api/v1/dictionaries", timeout=30) as answer:
                found = json.load(answer)["dictionaries"]
            indexed = all(preset["indexed"] for one in found for preset in one["presets"])
            time.sleep(0.2)
        assert indexed
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


def test_reading_results_needs_no_torch(folder: Path) -> None:
    command = [sys.executable, "-c", READING, str(folder), str(folder / "sae1.query_lens_key.parquet"), *HEAVY]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert found.stdout.splitlines()[-1] == "imported:"
