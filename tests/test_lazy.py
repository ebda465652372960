"""Public names and commands are imported when they are used: the lists of them agree with what there is."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app


def test_the_stub_names_what_the_package_has() -> None:
    tree = ast.parse(Path(ql.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    [listed] = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
    assert sorted(imported) == sorted(listed) == sorted(ql.__all__) == dir(ql)
    for name in listed:
        assert getattr(ql, name).__name__.rpartition(".")[2] == name if name != "PRESETS" else ql.PRESETS
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ql.no_such_name


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "triton", "sae_lens", "transformer_lens", "datasets", "pyarrow")
    code = f"import sys, querylens_fast\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_command_line_tells_its_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"querylens_fast {ql.__version__}\n"


def test_listed_commands_have_their_own_help() -> None:
    group = typer.main.get_command(app)
    for commands in (group.commands, group.commands["evaluate"].commands):  # type: ignore[attr-defined]
        listed = commands.listed()
        assert list(listed) == list(commands)
        for name, command in commands.items():
            assert inspect.cleandoc(command.help) == listed[name].help, name
