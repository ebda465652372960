"""The Python examples of README.md and docs/ run, and print what the page says.

The ```python blocks of a page run in order, in one namespace and in an empty folder, so a later block may use names and
files of an earlier one. These names exist without being imported, made from the embedded demo model:

    ql, torch, ASSETS (the folder of its files), model, tokens (4 sequences), transport (full order, both sides, fitted
    on `tokens`), dictionary (the SAE of layer 1, 2,048 features), dictionaries (every SAE and transcoder)

A block that is directly followed by a block without a language has to print that text (numbers may differ by 1e-3,
relative). A block that begins with ">>> " is a doctest session. To mark a block that is not to be run, write
"```python no-run": GitHub still colours it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo import ASSETS

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.M | re.S)
TOLERANCE = 1e-3


class Example(NamedTuple):
    """One ```python block: the line it begins on, its code, and the text it has to print (None: not compared)."""

    line: int
    code: str
    output: str | None


def examples(page: Path) -> list[Example]:
    """The blocks of a page that are to be run, in order."""
    text = page.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    found = []
    for block, following in zip(blocks, [*blocks[1:], None], strict=False):
        if block[1].strip() != "python":
            continue
        printed = (
            following is not None and not following[1].strip() and not text[block.end() : following.start()].strip()
        )
        line = text.count("\n", 0, block.start()) + 2
        found.append(Example(line, block[2], following[2] if printed and following is not None else None))
    return found


PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if examples(p)]


@cache
def model() -> ql.Model:
    return ql.load_model(ASSETS / "model")


@cache
def tokens() -> ql.Tokens:
    return ql.load_tokens(ASSETS / "tokens.safetensors", model=model()).head(4)


@cache
def transport() -> ql.Transport:
    return ql.fit_transport(model(), tokens(), orders=("full",), progress=False)


def dictionary() -> ql.Dictionary:
    return ql.load_dictionary(ASSETS / "sae_layer1")


def dictionaries() -> list[ql.Dictionary]:
    return [ql.load_dictionary(p) for pattern in ("sae_*", "transcoder_*") for p in sorted(ASSETS.glob(pattern))]


MADE = {f.__name__: f for f in (model, tokens, transport, dictionary, dictionaries)}


def namespace(code: str) -> dict[str, Any]:
    """The names that examples find, those that cost something only where the code holds them."""
    made = {name: make() for name, make in MADE.items() if re.search(rf"\b{name}\b", code)}
    return {"__name__": "__main__", "ql": ql, "torch": torch, "ASSETS": ASSETS, **made}


def same_words(found: str, expected: str) -> bool:
    """Whether two texts agree word by word, numbers within `TOLERANCE`."""
    mine, theirs = found.split(), expected.split()
    return len(mine) == len(theirs) and all(map(same_word, mine, theirs))


def same_word(found: str, expected: str) -> bool:
    strip = "[](){},:%"
    try:
        a, b = float(found.strip(strip)), float(expected.strip(strip))
    except ValueError:
        return found == expected
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = examples(page)
    names = namespace("\n".join(example.code for example in found))
    for line, code, output in found:
        where = f"{page.name} line {line}"
        if code.startswith(">>> "):
            session = doctest.DocTestParser().get_doctest(code, names, where, str(page), line)
            report = io.StringIO()
            failed = doctest.DocTestRunner().run(session, out=report.write, clear_globs=False).failed
            names.update(session.globs)
            assert not failed, f"{where}\n{report.getvalue()}"
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines in front, so that a traceback names the page's own line.
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        if output is not None:
            assert same_words(printed.getvalue(), output), f"{where} printed\n{printed.getvalue()}\nnot\n{output}"


def test_generated_pages_are_current() -> None:
    """docs/command-line.md and the table of options are what the code says now; else: python docs/generate.py"""
    write = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for name, now in (("command-line.md", write["command_line_page"]()), ("signatures.md", write["signatures_page"]())):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == now, f"{name}: run python docs/generate.py"


def test_what_an_example_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n```\n1.0001\n```\n```python no-run\nx\n```\n"
        "```python\ny = 1\n```\ntext\n```\nz\n```\n"
    )
    assert [(e.line, e.code, e.output) for e in examples(page)] == [
        (2, "print(1)\n", "1.0001\n"),
        (12, "y = 1\n", None),
    ]
    assert (
        same_words("[1.0, 'a']", "[1.0005, 'a']") and not same_words("1.0 b", "1.01 b") and not same_words("a", "a b")
    )
