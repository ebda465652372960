"""All that the results hold of one feature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from querylens_fast.queries.budget import Budget
from querylens_fast.queries.catalog import Member
from querylens_fast.queries.opened import OpenDictionary
from querylens_fast.queries.scan import Record
from querylens_fast.queries.views import (
    Activity,
    Context,
    FeatureView,
    Histogram,
    LayerTerm,
    Link,
    Score,
    ScoredToken,
    SignatureView,
)


def feature_view(
    found: OpenDictionary, feature: int, others: Sequence[OpenDictionary], paths: Sequence[Path], budget: Budget
) -> FeatureView:
    """See `Results.feature`."""
    entry = found.entry
    records: list[tuple[Member, int, Record]] = []
    for member in entry.members:
        budget.check()
        row = found.row_of(member, feature)
        if row is not None:
            records.append((member, row, found.rows_of(member).record(row)))
    activity = _activity(found, feature)
    if not records and activity is None:
        raise LookupError(f"feature is {feature}; dictionary {entry.slug!r} has {_range(found.features)}")
    before, after = _beside(found.features, feature)
    return FeatureView(
        dictionary=entry.slug,
        name=entry.name,
        layer=entry.layer,
        kind=entry.kind,
        hook_point=entry.hook_point,
        feature=feature,
        signatures=tuple(_signature(found, *some, records) for some in records),
        activity=activity,
        scores=_scores(found, feature),
        links=_links(found, feature, others),
        previous=before,
        next=after,
        python=_python(entry.slug, feature, paths),
    )


def _signature(
    found: OpenDictionary, member: Member, row: int, record: Record, records: Sequence[tuple[Member, int, Record]]
) -> SignatureView:
    said, rows = member.file.identity, found.rows_of(member)
    same_side = [(m.label, r) for m, _, r in records if m.side == member.side and m is not member]
    statistics = {}
    for name in rows.statistics:
        value = rows.value(name, row)
        if math.isfinite(value):
            statistics[name] = value
    stable = statistics.get("stable_k")
    others = {end: {label: set(_ids(r, end)) for label, r in same_side} for end in ("top", "bottom")}
    se = [None] * len(record.top_ids) if record.top_se is None else _finite(record.top_se)
    return SignatureView(
        preset=member.label,
        side=member.side,
        transition=said["stream_transition"],
        readout=said["readout"],
        k=len(record.top_ids),
        top=_scored(found, record.top_ids, record.top_scores, se, others["top"]),
        bottom=_scored(found, record.bottom_ids, record.bottom_scores, None, others["bottom"]),
        statistics=statistics,
        choice=record.choice,
        stable_k=None if stable is None else int(stable),
        layer_terms=_terms(found, record),
        histogram=_histogram(record),
    )


def _scored(
    found: OpenDictionary,
    ids: np.ndarray,
    scores: np.ndarray,
    errors: Sequence[float | None] | None,
    others: dict[str, set[int]],
) -> tuple[ScoredToken, ...]:
    words = found.vocabulary
    tokens = []
    for i, (token, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True)):
        shared = tuple(label for label, own in others.items() if token in own)
        tokens.append(ScoredToken(words.token(token), score, None if errors is None else errors[i], shared))
    return tuple(tokens)


def _terms(found: OpenDictionary, record: Record) -> tuple[LayerTerm, ...] | None:
    if record.terms is None:
        return None
    words = found.vocabulary
    return tuple(
        LayerTerm(int(layer), float(energy), *(words.tokens(ids.tolist()) for ids in (top, bottom)))
        for layer, energy, top, bottom in zip(*record.terms, strict=True)
    )


def _histogram(record: Record) -> Histogram | None:
    if record.histogram is None or not len(record.histogram):
        return None
    edges = np.linspace(float(record.bottom_scores[0]), float(record.top_scores[0]), len(record.histogram) + 1)
    return Histogram(tuple(edges.tolist()), tuple(record.histogram.tolist()))


def _activity(found: OpenDictionary, feature: int) -> Activity | None:
    sample = found.sample
    if sample is None or not 0 <= feature < len(sample.features):
        return None
    words = found.vocabulary
    examples, tokens = sample.lists_of(feature)
    numbers = {name: column[feature].item() for name, column in sample.numbers.items()}
    return Activity(
        **numbers,
        tokens=tuple((words.token(token), count) for token, count in tokens),
        contexts=tuple(_contexts(found, examples)),
        sample=str(sample.metadata.get("tokens")),
    )


def _contexts(found: OpenDictionary, examples: Sequence[tuple[float, int, int, int]]) -> Iterator[Context]:
    words, tokens = found.vocabulary, found.sample_tokens
    for value, sequence, position, token in examples:
        around = None
        if tokens is not None:
            around = [words.tokens(ids) for ids in tokens.around(sequence, position)]
        before, after = (None, None) if around is None else around
        yield Context(value, sequence, position, words.token(token), before, after)


def _scores(found: OpenDictionary, feature: int) -> tuple[Score, ...] | None:
    table = found.scores
    if table is None:
        return None
    return tuple(
        Score(
            table.names[table.codes[i]],
            int(table.k[i]),
            int(table.n_examples[i]),
            *(_finite(table.numbers[name][i : i + 1])[0] for name in table.NUMBERS),
        )
        for i in table.rows_of(feature)
    )


def _links(found: OpenDictionary, feature: int, others: Sequence[OpenDictionary]) -> tuple[Link, ...] | None:
    tables = found.links
    if not tables:
        return None
    slugs = {(d.entry.name, d.entry.layer): d.entry.slug for d in others}
    return tuple(
        Link(relation, slugs.get((target, -1 if layer is None else layer)), target, layer, other, score)
        for table in tables
        for relation, target, layer, other, score in table.rows_of(feature)
    )


def _ids(record: Record, end: str) -> list[int]:
    return (record.top_ids if end == "top" else record.bottom_ids).tolist()


def _finite(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _beside(features: np.ndarray, feature: int) -> tuple[int | None, int | None]:
    before = int(np.searchsorted(features, feature)) - 1
    after = int(np.searchsorted(features, feature, side="right"))
    return (
        int(features[before]) if before >= 0 else None,
        int(features[after]) if after < len(features) else None,
    )


def _range(features: np.ndarray) -> str:
    if not len(features):
        return "none yet"
    return f"{len(features):,} between {features[0]} and {features[-1]}"


def _python(slug: str, feature: int, paths: Sequence[Path]) -> str:
    given = ", ".join(repr(str(path)) for path in paths)
    opening = f"import querylens_fast as ql\n\nresults = ql.open_results({given})"
    return f"{opening}\nview = results.feature({slug!r}, {feature})\n"
