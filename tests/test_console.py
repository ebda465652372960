"""What the command line says when a command does not end well: one line, and how to go on."""

import gc
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from tiny_models import D_MODEL
from typer.testing import CliRunner

from querylens_fast.cli import app, console
from querylens_fast.lens.pipeline import Pipeline

runner = CliRunner()


def test_ctrl_c_says_how_to_go_on(gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"W_dec": torch.randn(30, D_MODEL)}, str(tmp_path / "d.safetensors"))
    call = ["signatures", str(tmp_path / "d.safetensors"), str(gpt2_folder), "--layer", "1", "--block-rows", "10"]
    call += ["--preset", "logit_lens_value", "--k", "3", "--out", str(tmp_path / "out.parquet")]
    original, blocks = Pipeline.__call__, []

    def interrupted(self: Pipeline, features: object, vectors: object) -> object:
        blocks.append(features)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return original(self, features, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "__call__", interrupted)
        stopped = runner.invoke(app, call)
    assert stopped.exit_code == 130 and "Traceback" not in stopped.stderr
    assert "out.parquet' is kept; run the same call again to go on from there" in stopped.stderr
    assert len(list((tmp_path / "out.parquet.parts").glob("part-*"))) == 2
    assert runner.invoke(app, call).exit_code == 0


def import_interrupted(name: str) -> None:
    signal.raise_signal(signal.SIGINT)


def error_made_of_it(name: str) -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("cannot import torch") from None


def swallowed(name: str) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    Dying()
    time.sleep(1)
    raise ValueError("the interrupt was lost")


def half_built(name: str) -> None:
    class Bar:
        def __init__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            self.place = 1

        def __del__(self) -> None:
            self.place += 1

    Bar()


def test_an_import_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native modules abort the process where they are: the interrupt comes when the import is over."""
    (tmp_path / "being_imported.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped, console.interruptible():
            being_imported = __import__("being_imported")
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130 and being_imported.whole


@pytest.mark.parametrize("library", [import_interrupted, error_made_of_it, swallowed, half_built])
def test_ctrl_c_counts_whatever_libraries_make_of_it(
    library: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first import on: one line, exit code 130."""
    monkeypatch.setattr("querylens_fast.cli.lazy.importlib.import_module", library)
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: sys.stderr.write(str(raised.exc_value)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            app(["verify", "missing.parquet"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    del stopped
    gc.collect()
    assert capsys.readouterr().err == "stopped; start the same command again to go on\n"


def failing(error: BaseException) -> typer.Typer:
    small = typer.Typer()

    @small.command()
    def fail() -> None:
        with console.reported_errors():
            raise error

    return small


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("k is 0"), 2, "error: k is 0\n"),
        (OverflowError("int too big to convert"), 2, "error: a number is too large: int too big to convert\n"),
        (RuntimeError("Overflow when unpacking long"), 2, "error: a number is too large"),
        (MemoryError(), 2, "error: there is not enough memory (none is left)"),
        (KeyError("W_dec"), 1, "error: KeyError: 'W_dec' (unexpected: "),
        (ValueError("named \x1b[31mred\x07"), 2, "error: named \\x1b[31mred\\x07\n"),
        (KeyboardInterrupt(), 130, "stopped; start the same command again"),
    ],
)
def test_errors_are_one_line(error: BaseException, code: int, said: str) -> None:
    done = runner.invoke(failing(error), [])
    assert done.exit_code == code and done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    done = runner.invoke(app, ["--debug", "show", "missing.parquet", "3"])
    try:
        assert done.exit_code == 2 and "Traceback (most recent call last)" in done.stderr
    finally:
        console.debug(False)
    assert "Traceback" not in runner.invoke(app, ["show", "missing.parquet", "3"]).stderr


def test_a_device_that_is_none_is_named(tmp_path: Path) -> None:
    done = runner.invoke(app, ["neighbours", "--device", "a\x1b[31m", "--out", str(tmp_path / "out.parquet")])
    assert done.exit_code == 2 and "device is 'a\\x1b[31m'; expected cpu" in done.stderr
