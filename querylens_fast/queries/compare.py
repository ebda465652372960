"""Two presets or two dictionaries side by side."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from querylens_fast.queries.budget import Budget
from querylens_fast.queries.catalog import Member
from querylens_fast.queries.opened import OpenDictionary
from querylens_fast.queries.query import Cursor
from querylens_fast.queries.side_tables import LinkTable
from querylens_fast.queries.views import MAX_LIMIT, SIDES, Comparison, Pair

N_TOKENS = 10
"""Tokens of each feature in a pair; the overlap counts all k."""
MAX_POSTINGS = 20_000
"""Features of a token that are counted in matching by tokens; the strongest."""


def compare(
    first: OpenDictionary,
    second: OpenDictionary,
    preset: str | None,
    other_preset: str | None,
    after: str | None,
    limit: int,
    budget: Budget,
) -> Comparison:
    """See `Results.compare`."""
    if not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit is {limit}; expected 1 to {MAX_LIMIT}")
    own, other = _members(first, second, preset, other_preset)
    names = first.entry.slug, f"{own.label}|{second.entry.slug}|{other.label}"
    start = -1
    if after is not None:
        cursor = Cursor.decoded(after)
        if (cursor.dictionary, cursor.preset) != names:
            raise ValueError("after is of another comparison: begin again without it")
        start = cursor.feature
    matched_by, table = "feature", None
    if first is not second:
        table = _table(first, second)
        matched_by = "tokens" if table is None else "cosine"
    features = first.rows_of(own).features
    pairs: list[Pair] = []
    last = None
    for place in range(int(np.searchsorted(features, start, side="right")), len(features)):
        budget.check()
        if len(pairs) == limit:
            last = Cursor(0.0, *names, pairs[-1].feature, 0).encoded()
            break
        pairs += _matched(first, second, own, other, int(features[place]), matched_by, table, budget)
    return Comparison(
        first.entry.slug,
        own.label,
        second.entry.slug,
        other.label,
        matched_by,  # type: ignore[arg-type]
        tuple(pairs),
        last,
    )


def _members(
    first: OpenDictionary, second: OpenDictionary, preset: str | None, other_preset: str | None
) -> tuple[Member, Member]:
    """The two results. Without names: the preferred preset, and within one dictionary another of its side."""
    if preset is not None:
        own = first.entry.member(preset)
    else:
        own = next((m for side in SIDES if (m := first.entry.preferred(side)) is not None), None)
        if own is None:
            raise LookupError(f"dictionary {first.entry.slug!r} has no signatures")
    if other_preset is not None:
        other = second.entry.member(other_preset)
    else:
        same_side = [m for m in second.entry.members if m.side == own.side and m is not own]
        same_preset = [m for m in same_side if m.preset == own.preset] if first is not second else []
        other = next(iter(same_preset + same_side), None)
        if other is None:
            raise ValueError(f"other_preset: {second.entry.slug!r} has no other preset of the {own.side} side")
    if other.side != own.side:
        raise ValueError(f"presets {own.label!r} and {other.label!r} are of different sides; expected one side")
    if first.entry.model_fingerprint != second.entry.model_fingerprint:
        raise ValueError(f"{first.entry.slug!r} and {second.entry.slug!r} are of different models")
    return own, other


def _table(first: OpenDictionary, second: OpenDictionary) -> LinkTable | None:
    """A table of cosines from the first dictionary to the second."""
    for table in first.links:
        if table.scores_are == "cosine" and second.entry.name in table.target:
            return table
    return None


def _matched(
    first: OpenDictionary,
    second: OpenDictionary,
    own: Member,
    other: Member,
    feature: int,
    matched_by: str,
    table: LinkTable | None,
    budget: Budget,
) -> Iterator[Pair]:
    """The pair of one feature, or none where it has no match."""
    record = first.record(own, feature)
    if record is None:
        return
    cosine, match = None, feature
    if table is not None:
        entry = second.entry
        own_rows = [r for r in table.rows_of(feature) if (r[1], r[2]) == (entry.name, entry.layer)]
        if not own_rows:
            return
        _, _, _, match, cosine = max(own_rows, key=lambda r: r[4])
    elif matched_by == "tokens":
        found = _most_shared(second, other, record.top_ids.tolist(), budget)
        if found is None:
            return
        match = found
    matching = second.record(other, match)
    if matching is None:
        return
    ids, others = record.top_ids.tolist(), matching.top_ids.tolist()
    shared = [i for i in ids if i in set(others)]
    words = first.vocabulary
    yield Pair(
        feature,
        match,
        cosine,
        len(shared) / len(set(ids) | set(others)),
        words.tokens(ids[:N_TOKENS]),
        words.tokens(others[:N_TOKENS]),
        tuple(shared),
    )


def _most_shared(second: OpenDictionary, other: Member, ids: list[int], budget: Budget) -> int | None:
    """The feature whose top tokens share most with the ids; of equal ones the lowest."""
    rows = second.rows_of(other)
    found = [rows.postings(i, "top", budget.check)[0][:MAX_POSTINGS] for i in ids]
    together = np.concatenate(found)
    if not len(together):
        return None
    which, counts = np.unique(together, return_counts=True)
    return int(rows.features[which[int(counts.argmax())]])
