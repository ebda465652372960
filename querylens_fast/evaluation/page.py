"""The report's HTML page: one self-contained file, figures inline, no script. Needs jinja2 (torch brings it)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from querylens_fast.runs.atomic_write import write_whole

if TYPE_CHECKING:
    from querylens_fast.evaluation.report_data import Report


def write_page(report: Report, figures: Mapping[str, Path]) -> Path:
    """Write ``report.html`` into the report's folder. Returns its path.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report's page needs jinja2: pip install jinja2") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        files("querylens_fast.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    tables = {}
    for score in dict.fromkeys(m.score for m in report.means):
        own = [m for m in report.means if m.score == score and m.k == report.k]
        names = list(dict.fromkeys(m.dictionary for m in own if m.dictionary))
        rows = {m: {x.dictionary: x for x in own if x.method == m} for m in dict.fromkeys(x.method for x in own)}
        if own:
            tables[score] = (names, rows)
    inline = {title: _inline(path) for title, path in figures.items()}
    page = template.render(report=report, metadata=report.scores.metadata, tables=tables, figures=inline, k=report.k)
    path = report.folder / "report.html"
    write_whole(path, page)
    return path


def _inline(path: Path) -> str:
    """The <svg> element of a file that matplotlib wrote, safe to embed: it holds no script and no text of users."""
    import jinja2.utils

    text = path.read_text(encoding="utf-8")
    return jinja2.utils.markupsafe.Markup(text[text.index("<svg") :])
