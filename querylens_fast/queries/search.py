"""Lists of features: those whose signatures hold a token, or all of them, filtered, ordered, a page at a time.

Pages are found by key, not by number: a page says where it ended (key, dictionary, preset, feature, token), and the
next begins behind that, however many rows there are and whatever was added meanwhile.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from querylens_fast.queries.budget import UNLIMITED, Budget
from querylens_fast.queries.catalog import Member
from querylens_fast.queries.opened import OpenDictionary
from querylens_fast.queries.views import ENDS, FIELDS, MAX_LIMIT, ORDERS, SIDES, End, Page, Row, Side, Token

N_TOKENS = 8
"""Tokens of each side in a row."""
MAX_TEXT = 1000
"""Characters of a text that is searched for."""


@dataclass(frozen=True)
class Filter:
    """Keep features whose field lies in [low, high]; features without the field are left out."""

    field: str
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if self.field not in FIELDS:
            raise ValueError(f"filter is on {self.field!r}; expected one of {', '.join(FIELDS)}")
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
        if self.order is not None and self.order.removeprefix("-") == "score" and not self.has_token:
            raise ValueError("order is 'score'; without a token there is none: order by another field")
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


class Found(NamedTuple):
    """Candidates of one result, in no order; arrays of one length."""

    place: int
    """Of the result among those searched: ties go by it."""
    keys: np.ndarray
    features: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray


class Source(NamedTuple):
    """What is searched: a dictionary's result, or without a token the dictionary itself."""

    dictionary: OpenDictionary
    member: Member | None


def search(dictionaries: Sequence[OpenDictionary], query: Query, budget: Budget = UNLIMITED) -> Page:
    """A page of rows.

    Raises:
        LookupError: An unknown dictionary or preset.
        ValueError: An ``after`` of another search.
        QueryStopped: The budget is spent.
    """
    sources = list(_sources(dictionaries, query))
    ids = _token_ids([s.dictionary for s in sources], query)
    cursor = None if query.after is None else _position(Cursor.decoded(query.after), sources)
    kept = []
    for place, source in enumerate(sources):
        budget.check()
        wanted = ids.get(source.dictionary.entry.model_fingerprint, [])
        found = _candidates(place, source, wanted, query, budget)
        if found is not None:
            kept.append(_first(_behind(found, cursor), query.limit + 1))
    chosen = _merged(kept, query.limit + 1)
    more, chosen = len(chosen) > query.limit, chosen[: query.limit]
    rows = []
    for place, _, feature, token, score in chosen:
        budget.check()
        rows.append(row_of(sources[place], feature, token if query.has_token else None, query.end, score))
    last = None
    if more:
        place, key, feature, token, _ = chosen[-1]
        last = Cursor(key, *_name(sources[place]), feature, token).encoded()
    return Page(tuple(rows), last, *_tokens_named(sources, ids, query))


def row_of(source: Source, feature: int, token: int | None, end: End, score: float | None) -> Row:
    """A feature in a list, with the first tokens of both sides."""
    found, member = source
    entry, words = found.entry, found.vocabulary
    tops: dict[str, tuple[Token, ...]] = {}
    for side in SIDES:
        preferred = entry.preferred(side)
        record = None if preferred is None else found.record(preferred, feature)
        tops[side] = () if record is None else tuple(words.token(int(i)) for i in record.top_ids[:N_TOKENS])
    row = int(np.searchsorted(found.features, feature))
    values = {}
    for name in found.fields(member):
        column = found.values(name, member)
        if column is not None and math.isfinite(value := float(column[row])):
            values[name] = value
    given: dict[str, Any] = {}
    if member is not None and token is not None:
        record = found.record(member, feature)
        ids = () if record is None else record.top_ids if end == "top" else record.bottom_ids
        rank = int(np.flatnonzero(np.asarray(ids) == token)[0])
        given = {"preset": member.label, "side": member.side, "end": end, "score": score, "rank": rank}
        given["token"] = words.token(token)
    return Row(entry.slug, entry.layer, feature, tops["key"], tops["value"], values=values, **given)


def _sources(dictionaries: Sequence[OpenDictionary], query: Query) -> Iterator[Source]:
    """What a query looks through, in the order of the dictionaries."""
    chosen = [
        d
        for d in dictionaries
        if query.dictionary in (None, d.entry.slug) and query.layer in (None, d.entry.layer) and d.entry.members
    ]
    if query.dictionary is not None and not any(d.entry.slug == query.dictionary for d in dictionaries):
        known = ", ".join(d.entry.slug for d in dictionaries[:20])
        raise LookupError(f"dictionary is {query.dictionary!r}; the results are of {known}")
    if query.preset is not None and not any(_is_named(m, query.preset) for d in dictionaries for m in d.entry.members):
        raise LookupError(f"preset is {query.preset!r}, of which there are no results")
    for found in chosen:
        if not query.has_token:
            if query.preset is None or any(_is_named(m, query.preset) for m in found.entry.members):
                yield Source(found, None)
            continue
        for side in SIDES if query.side is None else (query.side,):
            if query.preset is None:
                member = found.entry.preferred(side)
                members = [] if member is None else [member]
            else:
                members = [m for m in found.entry.members if m.side == side and _is_named(m, query.preset)]
            for member in members:
                yield Source(found, member)


def _is_named(member: Member, preset: str) -> bool:
    return preset in (member.label, member.preset)


def _token_ids(dictionaries: Sequence[OpenDictionary], query: Query) -> dict[str, list[int]]:
    """The token ids that are looked for, by the model's fingerprint."""
    found: dict[str, list[int]] = {}
    for some in dictionaries if query.has_token else ():
        model = some.entry.model_fingerprint
        if model not in found:
            found[model] = (
                [query.token_id] if query.token_id is not None else some.vocabulary.ids(query.text or "", query.exact)
            )
    return found


def _candidates(place: int, source: Source, token_ids: Sequence[int], query: Query, budget: Budget) -> Found | None:
    """All rows of a source that the query wants, with their keys; None where it has none."""
    found, member = source
    field, descending = query.ordering
    if query.has_token:
        assert member is not None
        store = found.rows_of(member)
        parts = [store.postings(i, query.end, budget.check) for i in token_ids]
        if not any(len(rows) for rows, _ in parts):
            return None
        features = store.features[np.concatenate([rows for rows, _ in parts])]
        scores = np.concatenate([scores for _, scores in parts])
        tokens = np.repeat(np.asarray(token_ids, np.int64), [len(rows) for rows, _ in parts])
        at: Any = np.searchsorted(found.features, features)
    else:
        features, at = found.features, slice(None)
        scores, tokens = np.zeros(1), np.zeros(1, np.int64)
    kept = np.ones(len(features), bool)
    for some in query.filters:
        column = found.values(some.field, member)
        if column is None:
            return None
        kept &= (column[at] >= some.low) & (column[at] <= some.high)
    if field == "score":
        keys = -scores if (query.end == "top") != descending else scores
    elif field == "feature":
        keys = -features if descending else features
    else:
        column = found.values(field, member)
        if column is None:
            return None
        keys = -column[at] if descending else column[at]
        kept &= ~np.isnan(keys)
    scores, tokens = np.broadcast_to(scores, kept.shape), np.broadcast_to(tokens, kept.shape)
    if kept.all():
        return Found(place, keys, features, tokens, scores)
    return Found(place, keys[kept], features[kept], tokens[kept], scores[kept])


def _behind(found: Found, cursor: tuple[float, int, int, int] | None) -> Found:
    """The candidates behind a place in the list."""
    if cursor is None:
        return found
    key, place, feature, token = cursor
    kept = found.keys > key
    ties = np.flatnonzero(found.keys == key)
    if found.place > place:
        kept[ties] = True
    elif found.place == place:
        own, tokens = found.features[ties], found.tokens[ties]
        kept[ties] = (own > feature) | ((own == feature) & (tokens > token))
    return Found(found.place, *(column[kept] for column in found[1:]))


def _first(found: Found, n: int) -> Found:
    """The first n candidates, and those that tie with the last of them."""
    if len(found.keys) <= n:
        return found
    last = np.partition(found.keys, n - 1)[n - 1]
    kept = np.flatnonzero(found.keys <= last)
    order = np.lexsort((found.tokens[kept], found.features[kept], found.keys[kept]))[:n]
    return Found(found.place, *(column[kept[order]] for column in found[1:]))


def _merged(parts: Sequence[Found], n: int) -> list[tuple[int, float, int, int, float]]:
    """The first n of all sources: (source, key, feature, token, score)."""
    rows = [
        (key, part.place, feature, token, score)
        for part in parts
        for key, feature, token, score in zip(*(column.tolist() for column in part[1:]), strict=True)
    ]
    rows.sort()
    return [(place, float(key), feature, token, score) for key, place, feature, token, score in rows[:n]]


def _position(cursor: Cursor, sources: Sequence[Source]) -> tuple[float, int, int, int]:
    named = cursor.dictionary, cursor.preset
    place = next((i for i, source in enumerate(sources) if _name(source) == named), None)
    if place is None:
        raise ValueError("after is of another search: begin again without it")
    return cursor.key, place, cursor.feature, cursor.token


def _name(source: Source) -> tuple[str, str]:
    return source.dictionary.entry.slug, "" if source.member is None else source.member.label


def _tokens_named(
    sources: Sequence[Source], ids: dict[str, list[int]], query: Query
) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    """(The tokens that were looked for, suggestions where the text is none)."""
    if not query.has_token:
        return (), ()
    words = {s.dictionary.entry.model_fingerprint: s.dictionary.vocabulary for s in sources}
    named = dict.fromkeys(words[model].token(i) for model, own in ids.items() for i in own)
    if named or query.text is None:
        return tuple(named), ()
    return (), tuple(dict.fromkeys(t for some in words.values() for t in some.like(query.text)))
