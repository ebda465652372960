"""What every command shares: common options, one-line errors, tables as wide as the terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from querylens_fast.runs.processes import RankStopped, said_elsewhere

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
LinearisationOption = Annotated[
    str, typer.Option(help="auto, hand-written, autodiff (through the model's own layers), or none (readout alone).")
]
MemoryOption = Annotated[float, typer.Option(help="Bound on the working memory, GiB.")]
EXPECTED = (ValueError, OSError, ImportError, RankStopped)
"""What the package raises for input that it cannot take."""
INTERRUPTED = 130
_debug = False
_interrupted = _said = False


def debug(on: bool) -> None:
    """Show the traceback of every error, too."""
    global _debug
    _debug = on


@contextmanager
def interruptible() -> Iterator[None]:
    """End with one line and exit code 130 on Ctrl-C, also where a library swallows it or makes another error of it.

    Errors that no `reported_errors` has seen are one line, too.
    """
    global _interrupted, _said

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _interrupted
        _interrupted = True
        if _imports(frame):  # some libraries abort the process where their import is interrupted
            again()
        else:
            raise KeyboardInterrupt

    def again() -> None:
        if not sys.is_finalizing():
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()

    def unraisable(raised: Any) -> None:
        if issubclass(raised.exc_type, KeyboardInterrupt):
            again()  # when this hook has returned: here it would be swallowed too
        elif _debug or not _interrupted:
            told(raised)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored in a shell's background
        yield
        return
    told, _said = sys.unraisablehook, False
    try:
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = unraisable
        yield
    except BaseException as raised:
        if not (_interrupted or isinstance(raised, (Exception, KeyboardInterrupt))):
            raise
        sys.exit(INTERRUPTED if _said else _exit_code(raised))
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # What was half built when the interrupt came may fail to be torn down when the process ends.
        sys.unraisablehook = told if _debug or not _interrupted else lambda _: None
        _interrupted = False


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn errors into one line on stderr: exit code 2 for the package's own, 1 for others, 130 for Ctrl-C.

    Several processes of one run say the same line once.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as raised:
        raise typer.Exit(_exit_code(raised)) from raised


def _imports(frame: FrameType | None) -> bool:
    """Is a module being imported in this frame or one that called it?"""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _exit_code(raised: BaseException) -> int:
    """Say what ended the command, and after Ctrl-C what is kept where the interrupt itself says so; the exit code."""
    global _said
    if _interrupted or not isinstance(raised, Exception):
        _said = True
        said = str(raised) if isinstance(raised, KeyboardInterrupt) else ""
        typer.secho(said or "stopped; start the same command again to go on", fg="yellow", err=True)
        return INTERRUPTED
    error = _as_expected(raised)
    if _debug:
        traceback.print_exception(raised)
    if not said_elsewhere(error):
        typer.secho(f"error: {described(error)}", fg="red", err=True)
        for note in getattr(error, "__notes__", []):
            typer.secho(f"  {note}", err=True)
    return 2 if isinstance(error, EXPECTED) else 1


def _as_expected(error: Exception) -> Exception:
    """What Python and torch raise for numbers and sizes beyond them, as an error of the package's kinds."""
    said = str(error).lower()
    if isinstance(error, MemoryError) or "allocate memory" in said:
        return OSError(f"there is not enough memory ({str(error) or 'none is left'}); a number or a file is too large")
    if isinstance(error, OverflowError) or isinstance(error, (RuntimeError, TypeError)) and "overflow" in said:
        return ValueError(f"a number is too large: {error}")
    return error


def described(error: Exception) -> str:
    """An error as text without control characters, which a file's contents may bring along."""
    text = printable(str(error))
    if isinstance(error, EXPECTED):
        return text
    return f"{type(error).__name__}: {text} (unexpected: querylens-fast --debug COMMAND … shows where)"


def wide_console(width: int) -> Any:
    """A console as wide as the terminal, or as COLUMNS says; ``width`` where there is neither."""
    from rich.console import Console

    known = Console().is_terminal or "COLUMNS" in os.environ
    return Console(width=None if known else width)


def printable(text: str) -> str:
    """Text with control characters and what is no UTF-8 as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    typer.echo(printable(text))


def quiet_loading() -> None:
    """Switch off transformers' progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
