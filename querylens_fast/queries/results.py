"""`open_results`: result files opened for questions, by library, API and pages alike."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from querylens_fast.queries import describe
from querylens_fast.queries.budget import UNLIMITED, Budget
from querylens_fast.queries.build import build_index
from querylens_fast.queries.catalog import Member, catalog
from querylens_fast.queries.compare import compare
from querylens_fast.queries.feature_view import feature_view
from querylens_fast.queries.files import ResultFile, ResultGone, find_files, open_file
from querylens_fast.queries.index import find_index
from querylens_fast.queries.inventory import DictionaryInfo, Progress, Skipped
from querylens_fast.queries.opened import Once, OpenDictionary, Rows
from querylens_fast.queries.query import Filter, Query
from querylens_fast.queries.scan import Scan
from querylens_fast.queries.search import Lister, Source, search
from querylens_fast.queries.views import ENDS, SIDES, Comparison, FeatureView, Page, Token, TokenGroup, TokenView
from querylens_fast.queries.vocabulary import Vocabulary

LOOK_SECONDS = 1.0
"""Between looks at the files."""


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

    Files are looked at again at most once a second: one that has changed is opened anew, one that is gone or damaged is
    left out (`skipped` says so), and one that is new in a folder is taken in.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """See `open_results`."""
        self.paths = tuple(paths)
        self._lock = threading.Lock()
        self._once = Once()
        self._take(*find_files(self.paths))
        if not any(d.entry.members for d in self._dictionaries):
            self._refuse_nothing()
        self._looked = time.monotonic()

    def refresh(self) -> None:
        """Look at the files again: take in what is new, and indexes that have been made."""
        self._looked = time.monotonic()
        known = [(file.path, file.stamp) for file in self._files]
        files, skipped = find_files(self.paths, self._files)
        if known != [(file.path, file.stamp) for file in files] or self._skipped != tuple(skipped):
            self._take(files, skipped)
        for member in self.unindexed():
            found = find_index(member.file, member.layer if member.several_layers else None)
            if found is not None:
                self._once.put(self._key(member), found)
        for some in self._dictionaries:
            some.look_again()

    def unindexed(self) -> list[Member]:
        """Finished results that are read without an index."""
        members = [m for d in self._dictionaries for m in d.entry.members] if hasattr(os, "pread") else []
        return [m for m in members if m.file.finished and not self.rows_of(m).indexed]

    def build_indexes(self, *, check: Callable[[], None] = lambda: None) -> None:
        """Make the indexes that are missing, beside the results: some 20 s for a million features.

        Args:
            check: Called between steps; what it raises ends the build, which goes on from there another time.

        Raises:
            OSError: There is no place to write one, or the disk is full.
            FileExistsError: Another process is making one.
        """
        for file in dict.fromkeys(member.file.path for member in self.unindexed()):
            build_index(open_file(file), check)
        self.refresh()

    @property
    def dictionaries(self) -> tuple[DictionaryInfo, ...]:
        """The dictionaries, by layer and name."""
        return tuple(describe.dictionary(d) for d in self._fresh())

    @property
    def progress(self) -> tuple[Progress, ...]:
        """Results that are being written, or whose run was stopped."""
        self._fresh()
        return tuple(describe.progress(f) for f in self._files if not f.finished)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Files in the given folders that are not served."""
        self._fresh()
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
        return feature_view(self._find(dictionary), int(feature), self._fresh(), self.paths, budget)

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
            filters: Bounds on `views.BOUNDS`.
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
        return search(self._fresh(), Query(text, filters=tuple(filters), **options), budget)

    def top(self, token_id: int, **options: Any) -> Page:
        """`search` by token id: the token's features, the best score first."""
        return self.search(None, token_id=int(token_id), **options)

    def token(self, token_id: int, *, limit: int = 10, budget: Budget = UNLIMITED) -> TokenView:
        """A token's first features in every dictionary, on both sides, at the top and at the bottom.

        Raises:
            LookupError: No signature holds the token.
        """
        groups = []
        for found in self._fresh():
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
        vocabularies = {d.entry.model_fingerprint: d for d in self._fresh() if d.entry.members}
        found = dict.fromkeys(t for d in vocabularies.values() for t in d.vocabulary.like(text[:1000], limit))
        return tuple(found)[:limit]

    def fingerprints(self, dictionary: str) -> tuple[str | None, str]:
        """(Dictionary's, model's) fingerprint of the results; the dictionary's is None where no result names it.

        Raises:
            LookupError: No such dictionary.
        """
        entry = self._find(dictionary).entry
        return entry.fingerprint, entry.model_fingerprint

    def random(self, dictionary: str | None = None, *, seed: int | None = None) -> tuple[str, int]:
        """(Slug, feature) of a feature drawn from the results, or from one dictionary's.

        Raises:
            LookupError: No such dictionary, or it has no features yet.
        """
        chosen = [d for d in self._fresh() if dictionary in (None, d.entry.slug)]
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
        return self._once.get(self._key(member), lambda: self._open_rows(member))

    def _key(self, member: Member) -> tuple[Any, ...]:
        return ((member.file.path, member.file.stamp),), ("rows", member.layer)

    def _open_rows(self, member: Member) -> Rows:
        layer = member.layer if member.several_layers else None
        return find_index(member.file, layer) or Scan(member.file, layer)

    def _take(self, files: list[ResultFile], skipped: list[Skipped]) -> None:
        """Serve these files from now on; what was read of others is forgotten."""
        self._files, self._skipped = files, tuple(skipped)
        self._dictionaries = tuple(
            OpenDictionary(entry, self._once, self.rows_of, self._vocabulary) for entry in catalog(files)
        )
        there = {(file.path, file.stamp) for file in files}
        self._once.keep(lambda key: there.issuperset(key[0]))

    def _fresh(self) -> tuple[OpenDictionary, ...]:
        """The dictionaries, after a look at the files where the last was a while ago."""
        if time.monotonic() - self._looked > LOOK_SECONDS and self._lock.acquire(blocking=False):
            try:
                self.refresh()
            finally:
                self._lock.release()
        return self._dictionaries

    def _vocabulary(self, model: str) -> Vocabulary:
        """The token strings of a model, from its finished results, or where there is none from those under way."""
        members = [m for d in self._dictionaries for m in d.entry.members if d.entry.model_fingerprint == model]
        members = [m for m in members if m.file.finished] or members
        key = tuple(dict.fromkeys((m.file.path, m.file.stamp) for m in members))

        def read() -> Vocabulary:
            strings: dict[int, str] = {}
            for member in members:
                strings |= self.rows_of(member).strings()
            return Vocabulary(strings)

        return self._once.get((key, ("vocabulary", model)), read)

    def _find(self, slug: str) -> OpenDictionary:
        found = self._fresh()
        for some in found:
            if some.entry.slug == slug:
                return some
        if not found and self._skipped:
            raise ResultGone("; ".join(some.reason for some in self._skipped[:5]))
        known = ", ".join(d.entry.slug for d in found[:20])
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
    lister = Lister(Source(found, member), end)
    shown = [
        lister.row(int(store.features[row]), token_id, float(score))
        for row, score in zip(rows[:limit], scores[:limit], strict=True)
    ]
    entry = found.entry
    return TokenGroup(entry.slug, entry.layer, member.label, member.side, end, len(rows), tuple(shown))


__all__ = ["Filter", "Results", "open_results"]
