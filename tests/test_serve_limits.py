"""The running server against clients that are slow, many, or send too much; and methods besides GET."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

import querylens_fast as ql
from querylens_fast.serve import protocol, security
from querylens_fast.serve.app import configuration, create_app, listen

HOME = "http://127.0.0.1"


@pytest.fixture(scope="module")
def port(served: Path) -> Iterator[int]:
    """Of a server that waits a quarter of a second for the head and the body of a request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "HEAD_SECONDS", 0.25)
        patch.setattr(security, "BODY_SECONDS", 0.25)
        listening = listen("127.0.0.1", 0, None)
        server = uvicorn.Server(configuration(create_app(ql.open_results(served / "results"))))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def opened(port: int, data: bytes) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", port), timeout=10)
    found.sendall(data)
    return found


def until_closed(connection: socket.socket) -> bytes:
    """What the server sends before it closes the connection."""
    data = b""
    try:
        while more := connection.recv(1 << 16):
            data += more
    except ConnectionResetError:
        pass
    connection.close()
    return data


def test_requests_that_do_not_come_whole_are_given_up(port: int) -> None:
    head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    begun = time.monotonic()
    silent, slow = opened(port, b""), opened(port, head + b"X-Slow: ")
    body = opened(port, b"POST /try HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\nhalf")
    assert until_closed(silent) == until_closed(slow) == b""
    assert body.recv(1 << 16).startswith(b"HTTP/1.1 408")
    body.close()
    assert time.monotonic() - begun < 5
    large = opened(port, head)
    with pytest.raises(OSError):
        for _ in range(200):
            large.sendall(b"X-Large: " + b"x" * 4096 + b"\r\n")
            time.sleep(0.001)
    assert until_closed(large) == b""


def test_a_thousand_connections_are_answered(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others hold theirs open without reading what they have asked for; all together fewer than MAX_AT_A_TIME."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 30.0)
    asked = b"GET /api/v1/dictionaries HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    idle = [opened(port, asked + b"\r\n") for _ in range(20)]

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked + b"Connection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer[:12]

    async def many() -> list[bytes]:
        return await asyncio.gather(*(one() for _ in range(1000)))

    assert set(asyncio.run(many())) == {b"HTTP/1.1 200"}
    for connection in idle:
        connection.close()


def test_hosts_that_are_no_name_or_given_twice_are_refused(port: int) -> None:
    for names, status in (
        ((b"127.0.0.1", b"evil.example"), 400),
        ((b"evil@127.0.0.1",), 421),
        ((b"127.0.0.1/x",), 421),
    ):
        hosts = b"".join(b"Host: %b\r\n" % name for name in names)
        with opened(port, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n") as connection:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 %d" % status), names


def test_methods(served: Path) -> None:
    with TestClient(create_app(ql.open_results(served / "results")), base_url=HOME) as client:
        for address in ("/", "/feature/sae0/3", "/api/v1/random?seed=1", "/static/style.css", "/api/openapi.json"):
            got, head = client.get(address), client.head(address)
            assert head.status_code == got.status_code == 200
            assert head.headers["content-length"] == got.headers["content-length"]
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            for address in ("/search", "/api/v1/search"):
                answer = client.request(method, address)
                assert answer.status_code == 405 and answer.headers["allow"] == "GET", (method, address)
