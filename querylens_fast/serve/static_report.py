"""Chosen features of results as one self-contained HTML file: for an appendix, or for readers without the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from querylens_fast.queries.results import Results, open_results
from querylens_fast.runs.atomic_write import write_whole
from querylens_fast.serve.markup import Links, environment, feature_context

if TYPE_CHECKING:
    from querylens_fast.queries.views import FeatureView

MAX_FEATURES = 1000


def feature_report(
    results: Results | str | Path | Sequence[str | Path],
    features: str | Sequence[tuple[str, int]],
    out: str | Path,
    *,
    tokens: int = 10,
    title: str = "Features",
) -> Path:
    """Write a page with the given features; no script and nothing loaded from elsewhere.

    Args:
        results: From `open_results`, or what that takes.
        features: (dictionary, id) pairs, or as text: "sae_layer6:12,40 sae_layer7:3"; without a dictionary those of the
            only one.
        out: The ``.html`` file.
        tokens: Shown of each list.
        title: The page's heading.

    Returns:
        The path.

    Raises:
        LookupError: No such dictionary or feature.
        ValueError: A text that names no features, or too many of them.
        FileNotFoundError: No such result.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; expected at least 1")
    if not isinstance(results, Results):
        results = open_results(*([results] if isinstance(results, (str, Path)) else results))
    chosen = parse_features(features, results) if isinstance(features, str) else list(features)
    if not 1 <= len(chosen) <= MAX_FEATURES:
        raise ValueError(f"features names {len(chosen)} features; expected 1 to {MAX_FEATURES}")
    views = [results.feature(dictionary, feature) for dictionary, feature in chosen]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _page(views, tokens, title))
    return path


def parse_features(text: str, results: Results) -> list[tuple[str, int]]:
    """(dictionary, id) pairs of a text like "sae_layer6:12,40 sae_layer7:3", or "12,40" where there is one dictionary.

    Raises:
        ValueError: What is not of this form, or ids without a dictionary where there are several.
    """
    slugs = [d.slug for d in results.dictionaries]
    found = []
    for part in text.split():
        slug, _, ids = part.rpartition(":")
        if not re.fullmatch(r"\d{1,12}(,\d{1,12})*", ids):
            raise ValueError(f"features has {part!r}; expected ids like 12,40, or dictionary:12,40")
        if not slug and len(slugs) != 1:
            raise ValueError(f"features has {part!r} without a dictionary; say which: {', '.join(slugs)}, as name:id")
        found += [(slug or slugs[0], int(i)) for i in ids.split(",")]
    return found


def _page(views: Sequence[FeatureView], tokens: int, title: str) -> str:
    from markupsafe import Markup

    style = files("querylens_fast.serve").joinpath("static/style.css").read_text(encoding="utf-8")
    contexts = [feature_context(view) for view in views]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            style=Markup(style),
            contexts=contexts,
            limit=tokens,
            links=Links(frozenset((v.dictionary, v.feature) for v in views)),
            errors=any(c["errors"] for c in contexts),
            shared=any(c["shared"] for c in contexts),
        )
    )
