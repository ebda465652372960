"""Flags made from functions: names, types, defaults and help come from the function that a command calls."""

from pathlib import Path
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from querylens_fast.cli.flags import Flags, flags_of, with_flags
from querylens_fast.lens.options import described, plain_type


def fit(*, seed: int = 0, kind: Literal["a", "b"] = "a", until: float | None = None, norms: bool = True) -> None:
    """Fit.

    Args:
        seed: Of the draw. Any number.
        kind: Which
            one; `a` or ``b``.
        until: A bound.
        norms: Through norms.

    Raises:
        ValueError: Never.
    """


def draw(*, seed: int = 3) -> None:
    """Draw."""


def test_arguments_become_flags() -> None:
    seen: dict[str, Flags] = {}
    app = typer.Typer()

    @app.command()
    @with_flags
    def command(
        name: str,
        drawing: Flags = flags_of(draw),  # noqa: B008
        fitting: Flags = flags_of(fit, defaults={"seed": 7}, helps={"until": "Another text."}),  # noqa: B008
    ) -> None:
        seen["drawing"], seen["fitting"] = drawing, fitting

    assert CliRunner().invoke(app, ["x"]).exit_code == 0
    assert seen["fitting"] == {"seed": 7, "kind": "a", "until": None, "norms": True}
    assert seen["drawing"] == {"seed": 7}, "a name in two groups is one flag, with the later default"
    arguments = ["x", "--seed", "5", "--kind", "b", "--until", "0.5", "--no-norms"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == {"drawing": {"seed": 5}, "fitting": {"seed": 5, "kind": "b", "until": 0.5, "norms": False}}
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "Of the draw." in shown and "Any number" not in shown
    assert "Which one; a or b." in shown and "Another text." in shown


def test_descriptions_are_read_from_docstrings() -> None:
    assert described(fit) == {
        "seed": "Of the draw. Any number.",
        "kind": "Which\none; `a` or ``b``.",
        "until": "A bound.",
        "norms": "Through norms.",
    }
    assert described(draw) == {} and described(None) == {}


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int | None, int | None),
        (str | Path | None, str | None),
        (Literal["x", "y"], str),
        (bool, bool),
        (list[int] | float, float),
    ],
)
def test_plain_types(annotation: object, expected: object) -> None:
    assert plain_type(annotation) == expected
