"""The command that writes chosen features of results as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from querylens_fast.cli.console import reported_errors, say


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of `signatures`, or folders of them.")],
    features: Annotated[
        str, typer.Option(help='Ids like 12,40, or of several dictionaries "sae_layer6:12,40 sae_layer7:3".')
    ],
    out: Annotated[Path, typer.Option(help="The .html file to write.")] = Path("features.html"),
    tokens: Annotated[int, typer.Option(help="Tokens of each list.")] = 10,
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Features",
) -> None:
    """Chosen features with all that the results hold of them, as one self-contained HTML page."""
    with reported_errors():
        from querylens_fast.serve.static_report import feature_report

        try:
            path = feature_report(results, features, out, tokens=tokens, title=title)
        except LookupError as error:
            raise ValueError(*error.args) from error
    say(f"page: {path.resolve()}")
