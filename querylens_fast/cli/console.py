"""What every command shares: common options, one-line errors, tables as wide as the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from querylens_fast.runs.processes import RankStopped

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
LinearisationOption = Annotated[
    str, typer.Option(help="auto, hand-written, autodiff (through the model's own layers), or none (readout alone).")
]
MemoryOption = Annotated[float, typer.Option(help="Bound on the working memory, GiB.")]


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn the package's own errors into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, RankStopped) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        for note in getattr(error, "__notes__", []):
            typer.secho(f"  {note}", err=True)
        raise typer.Exit(2) from error


def wide_console(width: int) -> Any:
    """A console as wide as the terminal, or as COLUMNS says; ``width`` where there is neither."""
    from rich.console import Console

    known = Console().is_terminal or "COLUMNS" in os.environ
    return Console(width=None if known else width)


def say(text: str) -> None:
    typer.echo(text)


def quiet_loading() -> None:
    """Switch off transformers' progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
