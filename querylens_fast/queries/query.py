"""What a list of features is asked for, and where a page of it ended."""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

from querylens_fast.queries.views import BOUNDS, ENDS, MAX_LIMIT, ORDERS, SIDES, End, Side

MAX_TEXT = 1000
"""Characters of a text that is searched for."""


@dataclass(frozen=True)
class Filter:
    """Keep features whose field lies in [low, high]; features without the field are left out."""

    field: str
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if self.field not in BOUNDS:
            raise ValueError(f"filter is on {self.field!r}; expected one of {', '.join(BOUNDS)}")
        if math.isnan(self.low) or math.isnan(self.high):
            raise ValueError(f"filter on {self.field} has bounds {self.low} and {self.high}; expected numbers")


@dataclass(frozen=True)
class Query:
    """What is looked for. Without text and token_id: all features."""

    text: str | None = None
    token_id: int | None = None
    exact: bool = False
    side: Side | None = None
    end: End = "top"
    preset: str | None = None
    dictionary: str | None = None
    layer: int | None = None
    filters: tuple[Filter, ...] = ()
    order: str | None = None
    after: str | None = None
    limit: int = 50

    def __post_init__(self) -> None:
        for name, known in (("side", (*SIDES, None)), ("end", ENDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, known))}")
        if self.order is not None and self.order.removeprefix("-") not in ORDERS:
            raise ValueError(
                f"order is {self.order!r}; expected one of {', '.join(ORDERS)}, with - before it to reverse"
            )
        if not self.has_token and "score" in ((self.order or "").removeprefix("-"), *(f.field for f in self.filters)):
            raise ValueError("score: without a token there is none; order and filter by another field")
        if not 1 <= self.limit <= MAX_LIMIT:
            raise ValueError(f"limit is {self.limit}; expected 1 to {MAX_LIMIT}")
        if self.text is not None and len(self.text) > MAX_TEXT:
            raise ValueError(f"text has {len(self.text)} characters; expected at most {MAX_TEXT}")
        if self.text is not None and self.token_id is not None:
            raise ValueError("give text or token_id, not both")

    @property
    def has_token(self) -> bool:
        return bool(self.text) or self.token_id is not None

    @property
    def ordering(self) -> tuple[str, bool]:
        """(Field, largest first?). Scores: the most extreme first; otherwise the smallest, as without "-"."""
        order = self.order or ("score" if self.has_token else "feature")
        return order.removeprefix("-"), order.startswith("-")


class Cursor(NamedTuple):
    """Where a page ended."""

    key: float
    dictionary: str
    preset: str
    feature: int
    token: int

    def encoded(self) -> str:
        return base64.urlsafe_b64encode(json.dumps(list(self)).encode()).decode().rstrip("=")

    @classmethod
    def decoded(cls, text: str) -> Cursor:
        """Raises ValueError for a text that is none."""
        try:
            raw = json.loads(base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
            key, dictionary, preset, feature, token = raw
            if not (isinstance(dictionary, str) and isinstance(preset, str)):
                raise TypeError
            if not abs(int(feature)) < 1 << 62 or not abs(int(token)) < 1 << 62 or math.isnan(float(key)):
                raise TypeError
            return cls(float(key), dictionary, preset, int(feature), int(token))
        except (ValueError, TypeError, UnicodeError, OverflowError, RecursionError, binascii.Error) as error:
            raise ValueError(f"after is {text[:80]!r}, which no page gave as its next") from error
