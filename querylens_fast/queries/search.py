"""Lists of features: those whose signatures hold a token, or all of them, filtered, ordered, a page at a time.

Pages are found by key, not by number: a page says where it ended (key, dictionary, preset, feature, token), and the
next begins behind that, however many rows there are and whatever was added meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from querylens_fast.queries.budget import UNLIMITED, Budget
from querylens_fast.queries.catalog import Member
from querylens_fast.queries.opened import OpenDictionary
from querylens_fast.queries.query import Cursor, Query
from querylens_fast.queries.views import SIDES, End, Page, Row, Token

N_TOKENS = 8
"""Tokens of each side in a row."""


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
        wanted = ids.get(source.dictionary.entry.model_fingerprint, []) if query.has_token else [0]
        kept += [_candidates(place, source, i, query, cursor, budget) for i in wanted]
    chosen = sorted(row for rows in kept for row in rows)[: query.limit + 1]
    more, chosen = len(chosen) > query.limit, chosen[: query.limit]
    listed: dict[int, Lister] = {}
    rows = []
    for _, place, feature, token, score in chosen:
        budget.check()
        lister = listed.get(place) or listed.setdefault(place, Lister(sources[place], query.end))
        rows.append(lister.row(feature, token if query.has_token else None, score))
    last = None
    if more:
        key, place, feature, token, _ = chosen[-1]
        last = Cursor(key, *_name(sources[place]), feature, token).encoded()
    return Page(tuple(rows), last, *_tokens_named(sources, ids, query))


class Lister:
    """Makes rows of one source."""

    def __init__(self, source: Source, end: End) -> None:
        """Look up what all rows need."""
        self.dictionary, self.member = source
        self.end: End = end
        entry = self.dictionary.entry
        self.tops = [(side, member) for side in SIDES if (member := entry.preferred(side)) is not None]
        columns = {name: self.dictionary.values(name, self.member) for name in self.dictionary.fields(self.member)}
        self.columns = {name: column for name, column in columns.items() if column is not None}

    def row(self, feature: int, token: int | None, score: float | None) -> Row:
        """A feature in a list, with the first tokens of both sides."""
        found, member, words = self.dictionary, self.member, self.dictionary.vocabulary
        ids = {preferred.label: found.ids(preferred, feature, "top") for _, preferred in self.tops}
        tops = {side: words.tokens(ids[preferred.label][:N_TOKENS]) for side, preferred in self.tops}
        place = found.place(feature)
        values = {name: float(column[place]) for name, column in self.columns.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        given: dict[str, Any] = {}
        if member is not None and token is not None:
            own = ids.get(member.label) if self.end == "top" else None
            rank = (own or found.ids(member, feature, self.end)).index(token)
            given = {"preset": member.label, "side": member.side, "end": self.end, "score": score}
            given |= {"rank": rank, "token": words.token(token)}
        entry = found.entry
        return Row(entry.slug, entry.layer, feature, tops.get("key", ()), tops.get("value", ()), values=values, **given)


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


@np.errstate(over="ignore", invalid="ignore")  # bounds are compared in the columns' own precision
def _candidates(
    place: int, source: Source, token: int, query: Query, cursor: tuple[float, int, int, int] | None, budget: Budget
) -> list[tuple[float, int, int, int, float]]:
    """The first rows of a source that the query wants: (key, source, feature, token, score).

    They are looked at in their order, a growing number at a time, until there are enough: of a token that half a
    million signatures hold, as of all features, a page costs what it shows.
    """
    found, member = source
    store = found if member is None else found.rows_of(member)
    first_page = cursor is None and not query.filters
    ordered = _in_order(source, token, query, budget, query.limit + 1 if first_page else None)
    if ordered is None:
        return []
    rows, keys, scores = ordered
    start = 0 if cursor is None else _first_at(keys, cursor[0])
    field, descending = query.ordering
    for some in query.filters:
        if some.field == field != "score":
            start = max(start, _first_at(keys, -some.high if descending else some.low))
    size, wanted = 4 * query.limit, query.limit + 1
    while True:
        budget.check()
        here = slice(start, start + size)
        features = store.features[rows[here]]
        kept = _filtered(source, features, scores[here], query)
        if cursor is not None:
            kept &= _behind(cursor, place, keys[here], features, token)
        at = np.flatnonzero(kept)[:wanted]
        if len(at) == wanted or here.stop >= len(rows):
            break
        size *= 4
    columns = keys[here][at].tolist(), features[at].tolist(), scores[here][at].tolist()
    return [(float(key), place, feature, token, score) for key, feature, score in zip(*columns, strict=True)]


def _in_order(
    source: Source, token: int, query: Query, budget: Budget, n: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(Rows of the source's features, keys ascending, scores); equal keys by feature. None: the field is unknown.

    Where that costs less, only the first n of them.
    """
    found, member = source
    field, descending = query.ordering
    if member is None or not query.has_token:
        if field == "feature":
            ordered = found.once(("listed", descending), lambda: _by_feature(found.features, descending))
        else:
            ordered = found.sorted_by(field, descending)
        return None if ordered is None else (*ordered, np.broadcast_to(0.0, len(ordered[0])))
    store = found.rows_of(member)
    by_score = field == "score" and not descending
    rows, scores = store.postings(token, query.end, budget.check, n if by_score else None)
    if field == "score":
        keys = -scores if (query.end == "top") != descending else scores
    else:
        features = store.features[rows]
        values = features if field == "feature" else found.values(field, member)
        if values is None:
            return None
        values = values if field == "feature" else values[found.places(features)]
        keys = -values if descending else values
    if not by_score:
        order = np.lexsort((rows, keys))
        order = order[: len(order) - int(np.isnan(keys).sum())]
        rows, keys, scores = rows[order], keys[order], scores[order]
    return rows, keys, scores


def _first_at(keys: np.ndarray, bound: float) -> int:
    """The first place of a key that is not below the bound."""
    return int(np.searchsorted(keys, np.asarray(bound).astype(keys.dtype)))


def _by_feature(features: np.ndarray, descending: bool) -> tuple[np.ndarray, np.ndarray]:
    """(Places, keys) of all features in their order."""
    places = np.arange(len(features), dtype=np.int32)
    return (places[::-1], -features[::-1]) if descending else (places, features)


def _filtered(source: Source, features: np.ndarray, scores: np.ndarray, query: Query) -> np.ndarray:
    """Which of the features the filters keep."""
    found, member = source
    kept = np.ones(len(features), bool)
    at = found.places(features) if query.filters else None
    for some in query.filters:
        column = None if some.field == "score" else found.values(some.field, member)
        if column is None and some.field != "score":
            return np.zeros(len(features), bool)
        values = scores if column is None else column[at]
        kept &= (values >= some.low) & (values <= some.high)
    return kept


def _behind(
    cursor: tuple[float, int, int, int], place: int, keys: np.ndarray, features: np.ndarray, token: int
) -> np.ndarray:
    """Which rows of a source come behind a place in the list."""
    key, source, feature, last_token = cursor
    behind = keys > key
    if place > source:
        return behind | (keys == key)
    if place == source:
        later = features > feature if token <= last_token else features >= feature
        return behind | ((keys == key) & later)
    return behind


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
