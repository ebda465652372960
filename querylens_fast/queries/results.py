"""`open_results`: result files opened for questions, by library, API and pages alike."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from querylens_fast.queries import describe
from querylens_fast.queries.budget import UNLIMITED, Budget
from querylens_fast.queries.catalog import Member, catalog
from querylens_fast.queries.compare import compare
from querylens_fast.queries.feature_view import feature_view
from querylens_fast.queries.files import ResultFile, find_files
from querylens_fast.queries.opened import Once, OpenDictionary, Rows
from querylens_fast.queries.scan import Scan
from querylens_fast.queries.search import Filter, Query, Source, row_of, search
from querylens_fast.queries.views import (
    ENDS,
    SIDES,
    Comparison,
    DictionaryInfo,
    FeatureView,
    Page,
    PresetInfo,
    Progress,
    Skipped,
    Token,
    TokenGroup,
    TokenView,
)
from querylens_fast.queries.vocabulary import Vocabulary


def open_results(*paths: str | Path) -> Results:
    """Open results of `signatures` with what else is known of their dictionaries.

    Args:
        *paths: Parquet files and folders: results of `signatures` (finished or being written), feature samples, scores
            of an evaluation, tables of neighbours, feature flow, readers and writers.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file that was named is no such result or is damaged, or there is no result of `signatures`.
    """
    return Results([Path(path) for path in paths])


class Results:
    """Results that answer questions. Safe to use from several threads.

    Files are looked at again with every question: one that has changed is opened anew (`refresh`), and one that is
    gone raises ResultGone.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """See `open_results`."""
        self.paths = tuple(paths)
        self._lock = threading.RLock()
        self._open()
        if not any(d.entry.members for d in self._dictionaries):
            self._refuse_nothing()

    def refresh(self) -> bool:
        """Open the files again where one has changed, is gone or finished, or is new; tell whether one was."""
        with self._lock:
            files, skipped = find_files(self.paths)
            same = {f.path: f.stamp for f in files} == {f.path: f.stamp for f in self._files}
            if same and not any(f.stamp is None for f in files):
                return False
            self._open()
            return True

    @property
    def dictionaries(self) -> tuple[DictionaryInfo, ...]:
        """The dictionaries, by layer and name."""
        return tuple(describe.dictionary(d) for d in self._dictionaries)

    @property
    def progress(self) -> tuple[Progress, ...]:
        """Results that are being written, or whose run was stopped."""
        return tuple(describe.progress(f) for f in self._files if f.stamp is None)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Files in the given folders that are not served."""
        return self._skipped

    def feature(self, dictionary: str, feature: int, *, budget: Budget = UNLIMITED) -> FeatureView:
        """All that the results hold of a feature.

        Args:
            dictionary: Its slug.
            feature: The feature's id.
            budget: Time that it may take.

        Raises:
            LookupError: No such dictionary or feature.
            ResultGone: A file has changed under way.
        """
        return feature_view(self._find(dictionary), int(feature), self._dictionaries, self.paths, budget)

    def search(
        self,
        text: str | None = None,
        *,
        filters: Sequence[Filter] = (),
        budget: Budget = UNLIMITED,
        **options: Any,
    ) -> Page:
        """The features whose signatures hold a token, or without one all features, filtered and ordered.

        Args:
            text: A token, found with and without a space before it. Where it is none, the page has suggestions.
            filters: Bounds on `views.FIELDS`.
            budget: Time that it may take.
            **options: Fields of `Query`: exact, token_id, side ("value", "key"; None: both), end ("top", "bottom"),
                preset (None: the preferred one of each side), dictionary (slug), layer, order (a field of
                `views.ORDERS`, "-" before it for the largest first; by default the best score first, or by feature),
                after (a page's ``next``), limit (1 to 200).

        Raises:
            ValueError: An option with another value than these.
            LookupError: An unknown dictionary or preset.
            QueryStopped: The budget is spent.
            ResultGone: A file has changed under way.
        """
        return search(self._dictionaries, Query(text, filters=tuple(filters), **options), budget)

    def top(self, token_id: int, **options: Any) -> Page:
        """`search` by token id: the token's features, the best score first."""
        return self.search(None, token_id=int(token_id), **options)

    def token(self, token_id: int, *, limit: int = 10, budget: Budget = UNLIMITED) -> TokenView:
        """A token's first features in every dictionary, on both sides, at the top and at the bottom.

        Raises:
            LookupError: No signature holds the token.
        """
        groups = []
        for found in self._dictionaries:
            for side in SIDES:
                member = found.entry.preferred(side)
                if member is not None:
                    groups += [_group(found, member, int(token_id), end, limit, budget) for end in ENDS]
        kept = [group for group in groups if group.count]
        if not kept:
            raise LookupError(f"no signature holds token {token_id}")
        return TokenView(self._find(kept[0].dictionary).vocabulary.token(int(token_id)), tuple(kept))

    def tokens(self, text: str, *, limit: int = 10) -> tuple[Token, ...]:
        """Tokens that contain a text, in any case, the shortest first."""
        vocabularies = {d.entry.model_fingerprint: d for d in self._dictionaries if d.entry.members}
        found = dict.fromkeys(t for d in vocabularies.values() for t in d.vocabulary.like(text[:1000], limit))
        return tuple(found)[:limit]

    def random(self, dictionary: str | None = None, *, seed: int | None = None) -> tuple[str, int]:
        """(Slug, feature) of a feature drawn from the results, or from one dictionary's.

        Raises:
            LookupError: No such dictionary, or it has no features yet.
        """
        chosen = [d for d in self._dictionaries if dictionary in (None, d.entry.slug)]
        sizes = [len(d.features) for d in chosen]
        if not sum(sizes):
            raise LookupError(f"dictionary is {dictionary!r}; there are no features of it")
        place = int(np.random.default_rng(seed).integers(sum(sizes)))
        for found, size in zip(chosen, sizes, strict=True):
            if place < size:
                return found.entry.slug, int(found.features[place])
            place -= size
        raise AssertionError("unreachable")

    def compare(
        self,
        dictionary: str,
        other: str | None = None,
        *,
        preset: str | None = None,
        other_preset: str | None = None,
        after: str | None = None,
        limit: int = 50,
        budget: Budget = UNLIMITED,
    ) -> Comparison:
        """Two presets of one dictionary feature by feature, or two dictionaries with their features matched.

        Args:
            dictionary: A slug.
            other: Another; None: the same.
            preset: Label in ``dictionary``; None: the preferred value preset (or key).
            other_preset: Label in ``other``; None: the same preset, or within one dictionary the next one of the side.
            after: A page's ``next``.
            limit: Pairs, 1 to 200.
            budget: Time that it may take.

        Raises:
            LookupError: No such dictionary.
            ValueError: No such preset, presets of different sides, or an ``after`` of another comparison.
        """
        first, second = self._find(dictionary), self._find(other or dictionary)
        return compare(first, second, preset, other_preset, after, limit, budget)

    def rows_of(self, member: Member) -> Rows:
        """The rows of a result, opened once."""
        key = member.file.path, member.layer
        return self._once.get(key, lambda: self._open_rows(member))

    def _open(self) -> None:
        files, skipped = find_files(self.paths)
        with self._lock:
            self._once = Once()
            self._files: list[ResultFile] = files
            self._skipped = tuple(skipped)
            self._dictionaries = [
                OpenDictionary(entry, self.rows_of, self._vocabulary_of(entry.model_fingerprint))
                for entry in catalog(files)
            ]

    def _open_rows(self, member: Member) -> Rows:
        return Scan(member.file, member.layer if member.several_layers else None)

    def _vocabulary_of(self, model: str) -> Callable[[], Vocabulary]:
        def read() -> Vocabulary:
            strings: dict[int, str] = {}
            for found in self._dictionaries:
                for member in found.entry.members if found.entry.model_fingerprint == model else ():
                    strings |= self.rows_of(member).strings()
            return Vocabulary(strings)

        return lambda: self._once.get(("vocabulary", model), read)

    def _find(self, slug: str) -> OpenDictionary:
        for found in self._dictionaries:
            if found.entry.slug == slug:
                return found
        known = ", ".join(d.entry.slug for d in self._dictionaries[:20])
        raise LookupError(f"dictionary is {slug!r}; the results are of {known}")

    def _refuse_nothing(self) -> None:
        listed = "; ".join(f"{s.file}: {s.reason}" for s in self._skipped[:5])
        raise ValueError(
            f"{', '.join(map(repr, map(str, self.paths))) or 'no path'}: there is no result of `signatures` to serve"
            + (f" ({listed})" if listed else "")
        )


def _group(found: OpenDictionary, member: Member, token_id: int, end: Any, limit: int, budget: Budget) -> TokenGroup:
    store = found.rows_of(member)
    rows, scores = store.postings(token_id, end, budget.check)
    source = Source(found, member)
    shown = [
        row_of(source, int(store.features[row]), token_id, end, float(score))
        for row, score in zip(rows[:limit], scores[:limit], strict=True)
    ]
    entry = found.entry
    return TokenGroup(entry.slug, entry.layer, member.label, member.side, end, len(rows), tuple(shown))


__all__ = ["Filter", "PresetInfo", "Results", "open_results"]
