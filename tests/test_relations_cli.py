"""The commands of querylens_fast.relations on the embedded model, as docs/relations shows them."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app

PAGES = sorted((Path(__file__).parent.parent / "docs" / "relations").glob("*.md"))


def examples() -> list[tuple[str, str]]:
    """(command, output) of every worked example: a console block that begins with "$ querylens-fast"."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"```console\n\$ querylens-fast (.*?)\n(.*?)```", text, re.S)
    return [(command.replace("\\\n", " "), output) for command, output in blocks]


def cells(text: str) -> list[list[str]]:
    """The rows of a drawn table."""
    return [[c.strip() for c in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("command, output", examples(), ids=[command.split()[0] for command, _ in examples()])
def test_documented_output(command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every documented command still runs and shows the documented rows, up to rounding."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    shown, documented = cells(result.stdout), cells(output)
    assert documented and len(shown) == len(documented)
    for mine, theirs in zip(shown, documented, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a == b or abs(float(a) - float(b)) <= 2e-4
    rows = re.search(r"^(\d+) rows: (\S+)", output, re.M)
    assert rows is not None
    found = ql.read_table(tmp_path / Path(rows[2]).name)
    assert len(found) == int(rows[1])


def test_documented_sessions() -> None:
    """The Python sessions print what they are documented to."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    sessions = re.findall(r"```python\n(>>> .*?)```", text, re.S)
    assert sessions
    for session in sessions:
        test = doctest.DocTestParser().get_doctest(session, {}, "docs/relations", None, 0)
        assert doctest.DocTestRunner().run(test).failed == 0


def test_every_command_is_documented() -> None:
    documented = {command.split()[0] for command, _ in examples()}
    assert {"downstream", "upstream", "flow", "chains", "neighbours", "token-features"} <= documented
    assert {"weight-lens", "output-features", "attention-pairs", "attention-profiles", "channels"} <= documented


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, message in (
        ("downstream --targets nothing", "targets is 'nothing'"),
        ("downstream --dictionary x", "both --model and --dictionary"),
        ("token-features --preset zero_out", "runs the model for each feature"),
        ("neighbours --side up", "expected value or key"),
        ("flow --out x.csv", "expected a .parquet file"),
    ):
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("error:") == 1
    assert list(tmp_path.iterdir()) == []
