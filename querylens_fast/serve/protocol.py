"""HTTP for clients that cannot be trusted: the head of a request has to come whole, soon, and be of bounded size."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""From the connection, or a request's first byte, to the end of its head."""
MAX_HEAD = 1 << 17
"""Bytes that come before a head has to be whole."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol; connections whose request does not begin within these bounds are closed."""

    _head: asyncio.TimerHandle | None = None
    _received = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received += len(data)
        if self._head is not None and self._received > MAX_HEAD:
            self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()
        self._head, self._received = self.loop.call_later(HEAD_SECONDS, self.transport.close), 0

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None
