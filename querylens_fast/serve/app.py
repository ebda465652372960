"""The server: pages and API over results, behind a guard. `create_app` makes it, `serve` runs it until stopped."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from querylens_fast.queries.background import Indexer
from querylens_fast.queries.budget import QueryStopped
from querylens_fast.queries.files import ResultGone
from querylens_fast.queries.results import Results
from querylens_fast.serve import api, pages
from querylens_fast.serve.security import Guard, is_local

if TYPE_CHECKING:
    import uvicorn

STATIC = Path(__file__).parent / "static"
THREADS = 4
"""Requests that compute at a time."""
MAX_CONNECTIONS = 4096
QUERY_SECONDS = 10.0
STATUS = {QueryStopped: 503, ResultGone: 410, LookupError: 404, ValueError: 422}
"""Of what queries raise; the first that fits counts."""


def create_app(
    results: Results,
    *,
    model: Any = None,
    run: Mapping[str, Any] | None = None,
    token: str | None = None,
    hosts: Sequence[str] = (),
    query_seconds: float = QUERY_SECONDS,
    index: bool = False,
) -> FastAPI:
    """The application.

    Args:
        results: From `open_results`.
        model: For the page where texts are tried: a model, or where to load one from.
        run: The dictionaries to run there, by slug.
        token: What requests have to carry; None: nothing.
        hosts: Names that the Host header may have, besides those of this machine.
        query_seconds: Time for one answer.
        index: Make missing indexes beside the results, in a process of their own, while the application runs.

    Raises:
        ValueError: A token that a cookie cannot hold, or dictionaries to run that are not the model's.
    """
    app = FastAPI(
        title="querylens-fast",
        version="1",
        description="Token signatures of features, from result files.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=_running,
        middleware=[Middleware(Guard, token=token, hosts=hosts, seconds=query_seconds)],
    )
    Guard(app, token=token, hosts=hosts, seconds=query_seconds)  # says now what is wrong with the token
    app.state.results, app.state.indexer = results, Indexer(results) if index else None
    for kind in (*STATUS, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _problem)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=STATIC))
    app.state.try_it = None
    if model is not None:
        from querylens_fast.serve.try_it import TryIt

        app.state.try_it = TryIt(model, run or {}, results)
    return app


def configuration(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs the application."""
    import uvicorn

    from querylens_fast.serve.protocol import BoundedProtocol

    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
        limit_concurrency=MAX_CONNECTIONS,
    )


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then those that are under way are finished, for some seconds at most."""
    import uvicorn

    _allow_connections()
    sys.setswitchinterval(0.001)  # the thread that takes requests waits less for those that compute
    # What is cached lives long: a full collection stops every answer for a tenth of a second and finds nothing there.
    gc.freeze()
    gc.set_threshold(gc.get_threshold()[0], 10, 1000)
    # uvicorn shuts down and then raises the signal again, which would end the process as if it had been killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        uvicorn.Server(configuration(app)).run(sockets=[listening])


def _allow_connections() -> None:
    """Raise the limit of open files, often 1,024, as far as this user may; Windows has none."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 2 * MAX_CONNECTIONS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket that is bound; port 0: any that is free.

    Raises:
        ValueError: An address of other machines without a token.
        OSError: The port is taken, or the address is none of this machine.
    """
    if not is_local(host) and not token:
        raise ValueError(f"host is {host!r}, which other machines reach: give a token too (--token), or use 127.0.0.1")
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port is {port}; expected 0 to 65535")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(256)
    except OSError as error:
        found.close()
        raise OSError(
            error.errno, f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from error
    return found


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    indexer: Indexer | None = app.state.indexer
    if indexer is not None:
        indexer.start()
    yield
    if indexer is not None:
        indexer.stop()


async def _problem(request: Request, error: Exception) -> Response:
    """What went wrong, as a page or as JSON; an error of the server's own is logged, and not told."""
    status, message, headers = _told(error)
    if request.url.path.startswith("/api/"):
        return api.Json({"error": message}, status, headers=headers)
    answer = pages.error_page(request, status, message)
    answer.headers.update(headers or {})
    return answer


def _told(error: Exception) -> tuple[int, str, Mapping[str, str] | None]:
    """(Status, message, headers) of an error."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), error.headers
    if isinstance(error, RequestValidationError):
        return 422, "; ".join(map(_sentence, error.errors())), None
    for kind, status in STATUS.items():
        if isinstance(error, kind) and not isinstance(error, (KeyError, IndexError, UnicodeError)):
            return status, str(error), None
    return 500, "the server made a mistake; its log says which", None


def _sentence(problem: Mapping[str, Any]) -> str:
    return f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}"
