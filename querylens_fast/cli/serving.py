"""The command that serves results: pages and a JSON API on this machine."""

from __future__ import annotations

import secrets
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from querylens_fast.cli.console import quiet_loading, reported_errors, say

HostOption = Annotated[str, typer.Option(help="Address to bind to; one that other machines reach needs --token.")]
PortOption = Annotated[int, typer.Option(help="Port; 0: any that is free.")]
TokenOption = Annotated[
    str | None, typer.Option(help='What requests have to carry; "new" makes one up.', envvar="QUERYLENS_TOKEN")
]


def serve(
    results: Annotated[list[Path], typer.Argument(help="Parquet results and folders of them.")],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8765,
    token: TokenOption = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id: try texts on it.")] = None,
    dictionaries: Annotated[
        list[str] | None,
        typer.Option("--dictionary", help="SLUG=PATH: a dictionary to run with --model. Repeat for more."),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name that the Host header may have. Repeat for more.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Look at results in a browser: search by token, features, comparisons; the same as JSON under /api/v1."""
    with reported_errors():
        serve_results(results, host, port, token, model, dictionaries or [], names or [], open_browser)


def serve_results(
    results: list[Path],
    host: str,
    port: int,
    token: str | None,
    model: str | None = None,
    dictionaries: list[str] | None = None,
    names: list[str] | None = None,
    open_browser: bool = False,
) -> None:
    """Open the results, say the address, and answer until stopped."""
    try:
        from querylens_fast.serve import app as server
    except ImportError as error:
        raise ImportError(f"{error}; the server needs more packages: pip install 'querylens-fast[serve]'") from error
    from querylens_fast.queries.results import open_results

    token = secrets.token_urlsafe(24) if token == "new" else token
    listening = server.listen(host, port, token)
    run = dict(_pair(text) for text in dictionaries or [])
    if run and model is None:
        raise ValueError("--dictionary is for trying texts on a model: give --model too")
    if model is not None:
        quiet_loading()
    opened = open_results(*results)
    app = server.create_app(opened, model=model, run=run, token=token, hosts=[host, *(names or [])], index=True)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?access_token={token}" if token else "")
    say(f"{address}  (Ctrl-C stops)")
    if open_browser:
        webbrowser.open(address)
    server.serve(app, listening)


def _pair(text: str) -> tuple[str, str]:
    slug, found, path = text.partition("=")
    if not found:
        raise ValueError(f"--dictionary is {text!r}; expected SLUG=PATH")
    return slug, path
