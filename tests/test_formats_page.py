"""docs/formats.md holds the table of formats and hook points as the code has it."""

from __future__ import annotations

from pathlib import Path

from querylens_fast.dictionaries.formats_page import page

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"


def test_the_page_is_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m querylens_fast.dictionaries.formats_page`"
