"""Numbers and filters in the addresses of pages."""

from __future__ import annotations

import math
from collections.abc import Mapping

from querylens_fast.queries.results import Filter
from querylens_fast.queries.views import BOUNDS
from querylens_fast.serve.markup import FIELD_NAMES


def number_of(text: str, name: str) -> int:
    """A number that stands in an address; anything else is an unknown page."""
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise LookupError(f"{name} is {text[:80]!r}; expected a number")
    return int(text)


def whole(text: str, name: str) -> int | None:
    if text == "":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ValueError(f"{name} is {text[:80]!r}; expected a whole number")
    return int(text)


def bound(text: str, name: str) -> float | None:
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text[:80]!r}; expected a number") from None


def filters(asked: Mapping[str, str]) -> list[Filter]:
    found = []
    for field in BOUNDS:
        low, high = (bound(asked[f"{field}_{end}"], f"{FIELD_NAMES[field]}, {end}") for end in ("min", "max"))
        if (low, high) != (None, None):
            found.append(Filter(field, -math.inf if low is None else low, math.inf if high is None else high))
    return found
