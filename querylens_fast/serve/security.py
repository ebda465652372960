"""Who may ask, and for how much: Host header, token, sizes, time, and clients that go away.

One ASGI middleware around the pages and the API:

- the Host header has to name this server, so that no other site's name can be made to point here (DNS rebinding);
- with a token, a request needs it as ``Authorization: Bearer``, in a cookie, or once as ``?access_token=``, which sets
  the cookie and leads to the address without it;
- other sites may not send anything but GET (Origin header);
- addresses, request bodies with the time they take to come, and the number of requests at a time are bounded;
- ``request.state.budget`` is the time that the answer may take; it is cancelled when the client goes away.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from html import escape
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from querylens_fast.queries.budget import Budget

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MAX_BODY = 1 << 16
MAX_ADDRESS = 1 << 15
"""Bytes of a path and its query."""
BODY_SECONDS = 10.0
"""For a body to come whole."""
BODY_HEADERS = (b"content-length", b"transfer-encoding")
MAX_AT_A_TIME = 1024
"""Requests that wait for their answer."""
COOKIE = "querylens_token"
PARAMETER = "access_token"
REFUSAL = (
    '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>Refused · querylens-fast</title>\n<h1>The request was refused</h1>\n<p>{message}</p>\n"
    "<p><small>status {status}</small></p></html>\n"
)
HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


def is_local(host: str) -> bool:
    """Does an address to bind to reach this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """See the module. Wraps an ASGI application."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        token: str | None,
        hosts: Sequence[str],
        seconds: float,
    ) -> None:
        """Take the bounds.

        Args:
            app: The application.
            token: What requests need; None: nothing.
            hosts: Names that the Host header may have, besides those of this machine. With a token numeric addresses
                are taken, too.
            seconds: Time for one answer.

        Raises:
            ValueError: A token that is empty or has characters which a cookie cannot hold.
        """
        if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{4,200}", token):
            raise ValueError("token has to be 4 to 200 letters, digits, '.', '_', '~' or '-', as it goes into a cookie")
        self.app, self.token, self.seconds = app, token, seconds
        self.hosts = {*LOCAL_NAMES, *(name.lower() for name in hosts)}
        self.at_a_time = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # what GET would answer; the server leaves the body out
            scope = {**scope, "method": "GET"}
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        as_page = "text/html" in headers.get(b"accept", "") and not scope["path"].startswith("/api/")
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal, as_page=as_page)
            return
        entry = _entry_address(scope, self.token)
        if entry is not None:
            await _answer(send, 303, "", [(b"location", entry.encode()), (b"set-cookie", self._cookie())])
            return
        if self.token is not None and not self._is_known(headers):
            message = (
                f"this server needs its token: open the address that it printed (?{PARAMETER}=…), or send it as "
                "'Authorization: Bearer …'"
            )
            await _answer(send, 401, message, [(b"www-authenticate", b"Bearer")], as_page=as_page)
            return
        refusal, body = await _body(receive, waiting=not headers.keys().isdisjoint(BODY_HEADERS))
        if refusal is None and self.at_a_time >= MAX_AT_A_TIME:
            refusal = 503, "too many requests at a time; try again"
        if refusal is not None:
            await _answer(send, *refusal, [(b"retry-after", b"1")] if refusal[0] == 503 else [], as_page=as_page)
        elif body is not None:
            await self._pass_on(scope, receive, send, body)

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """(Status, message) where a request is refused whoever sends it."""
        name = _host_name(headers.get(b"host", ""))
        if [name for name, _ in scope["headers"]].count(b"host") > 1:
            return 400, "the request has several Host headers"
        if name is None or not self._is_ours(name):
            return 421, f"Host is {headers.get(b'host', '')[:80]!r}, which is not a name of this server"
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_ADDRESS:
            return 414, f"the address is longer than {MAX_ADDRESS} bytes"
        length = headers.get(b"content-length", "")
        if len(length) > 12 or (length.isdigit() and int(length) > MAX_BODY):
            return 413, f"the request's body is larger than {MAX_BODY} bytes"
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get(b"origin")
            if origin is not None and urlsplit(origin).netloc.lower() != headers[b"host"].lower():
                return 403, "requests of other sites are refused"
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.token is not None  # no site's name, so nothing was made to point here

    def _is_known(self, headers: dict[bytes, str]) -> bool:
        given = [headers.get(b"authorization", "").removeprefix("Bearer ")]
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        if cookie is not None:
            given.append(cookie.value)
        return any(_same(text, self.token or "") for text in given)

    def _cookie(self) -> bytes:
        return f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict".encode()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Run the application, its time bounded, and its query cancelled when the client goes away."""
        budget = Budget(self.seconds)
        scope.setdefault("state", {})["budget"] = budget
        waiting = deque([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.ensure_future(_cancel_when_gone(receive, budget))
        counted = 1
        self.at_a_time += counted

        async def replay() -> Message:
            return waiting.popleft() if waiting else await asyncio.shield(gone)

        async def sending(message: Message) -> None:
            nonlocal counted
            if (
                message["type"] == "http.response.start"
            ):  # a client that reads slowly keeps no other from being answered
                self.at_a_time, counted = self.at_a_time - counted, 0
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            await self.app(scope, replay, sending)
        finally:
            self.at_a_time -= counted
            gone.cancel()


async def _body(receive: Receive, waiting: bool) -> tuple[tuple[int, str] | None, bytes | None]:
    """(Why it is refused, None) or (None, the body; None where the client has gone)."""
    try:
        body = await (asyncio.wait_for(_whole(receive), BODY_SECONDS) if waiting else _whole(receive))
    except asyncio.TimeoutError:
        return (408, f"the request's body did not come within {BODY_SECONDS:g} s"), None
    if body is not None and len(body) > MAX_BODY:
        return (413, f"the request's body is larger than {MAX_BODY} bytes"), None
    return None, body


async def _whole(receive: Receive) -> bytes | None:
    """What there is of the body, to just above `MAX_BODY`; None where the client has gone."""
    body, more = b"", True
    while more and len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _cancel_when_gone(receive: Receive, budget: Budget) -> Message:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            budget.cancel()
            return message


def _entry_address(scope: Scope, token: str | None) -> str | None:
    """The address without the token, where a page is asked for with the right one in its query."""
    if token is None or scope["method"] != "GET":
        return None
    pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    given = [value for name, value in pairs if name == PARAMETER]
    if not given or not _same(given[0], token):
        return None
    path = "/" + scope.get("raw_path", b"/").decode("ascii", "replace").split("?")[0].lstrip(
        "/"
    )  # never //another.site
    rest = urlencode([(name, value) for name, value in pairs if name != PARAMETER])
    return path + (f"?{rest}" if rest else "")


def _host_name(header: str) -> str | None:
    """The name in a Host header, without the port; None where it is no name."""
    if re.search(r"[^\w.:\[\]-]", header, re.ASCII):
        return None
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8", "replace"))


async def _answer(
    send: Send, status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = (), as_page: bool = False
) -> None:
    """Say why a request is refused: as JSON, or to a browser as a page that needs no other file."""
    kind, body = b"application/json", json.dumps({"error": message}).encode() if message else b""
    if message and as_page:
        kind, body = b"text/html; charset=utf-8", REFUSAL.format(status=status, message=escape(message)).encode()
    about = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*about, *headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
