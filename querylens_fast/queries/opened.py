"""A dictionary's results, opened: its signatures, sample, scores and relations, each when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

from querylens_fast.queries.catalog import Entry, Member
from querylens_fast.queries.contexts import SampleTokens
from querylens_fast.queries.scan import Record
from querylens_fast.queries.side_tables import LinkTable, SampleTable, ScoreTable
from querylens_fast.queries.views import FIELDS, SIDES, Side
from querylens_fast.queries.vocabulary import Vocabulary

T = TypeVar("T")


class Rows(Protocol):
    """One layer's rows of a result of `signatures`, sorted by feature."""

    indexed: bool
    features: np.ndarray
    """Feature ids, [n] int64, ascending."""

    def __len__(self) -> int: ...

    @property
    def statistics(self) -> tuple[str, ...]: ...

    def has(self, column: str) -> bool: ...

    def record(self, row: int) -> Record: ...

    def ids(self, row: int, end: str) -> list[int]: ...

    def value(self, name: str, row: int) -> float: ...

    def column(self, name: str) -> np.ndarray: ...

    def postings(
        self, token_id: int, end: str, check: Callable[[], None] = ..., limit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def strings(self) -> dict[int, str]: ...


class Once:
    """Values that are made when they are first asked for, one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._made: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """The value of a key; ``make`` is called once, and again after it has failed."""
        if key not in self._made:
            with self._lock:
                if key not in self._made:
                    self._made[key] = make()
        return self._made[key]

    def put(self, key: Any, value: Any) -> None:
        """Replace a value."""
        with self._lock:
            self._made[key] = value

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Forget the values whose keys are not wanted."""
        with self._lock:
            self._made = {key: value for key, value in self._made.items() if wanted(key)}


class OpenDictionary:
    """What the results hold of one dictionary."""

    def __init__(
        self, entry: Entry, once: Once, rows_of: Callable[[Member], Rows], vocabulary: Callable[[str], Vocabulary]
    ) -> None:
        """Take its entry in the catalog, where to keep what is read, and how results and vocabularies are opened."""
        self.entry, self._rows_of, self._vocabulary, self._shared = entry, rows_of, vocabulary, once
        self.key = tuple((file.path, file.stamp) for file in entry.files)
        """What is kept is kept as long as these files are the same."""
        self._local: dict[Any, Any] = {}

    def once(self, what: Any, make: Callable[[], T]) -> T:
        """Something that is read or computed when it is first asked for."""
        found = self._local.get(what)
        if found is None:
            found = self._local[what] = self._shared.get((self.key, what), make)
        return found

    def rows_of(self, member: Member) -> Rows:
        """The rows of a result, opened once."""
        found = self._local.get(member.label)
        if found is None:
            found = self._local[member.label] = self._rows_of(member)
        return found

    def look_again(self) -> None:
        """Take the results' rows anew: they may have an index now."""
        self._local = {}

    @property
    def vocabulary(self) -> Vocabulary:
        found = self._local.get("vocabulary")
        if found is None:
            found = self._local["vocabulary"] = self._vocabulary(self.entry.model_fingerprint)
        return found

    @property
    def features(self) -> np.ndarray:
        """Ids of the features that any result of `signatures` holds, ascending."""
        return self.once("features", self._features)

    def _features(self) -> np.ndarray:
        found = [self.rows_of(member).features for member in self.entry.members]
        if not found:
            return np.zeros(0, np.int64)
        first = found[0]
        same = all(len(f) == len(first) and (f is first or np.array_equal(f, first)) for f in found)
        return np.unique(first) if same else np.unique(np.concatenate(found))

    def places(self, features: np.ndarray) -> np.ndarray:
        """Where features that are there stand in `features`."""
        known = self.features
        if known[-1] - known[0] == len(known) - 1:
            return features - known[0]
        return np.searchsorted(known, features)

    def place(self, feature: int) -> int:
        """Where a feature that is there stands in `features`."""
        known = self.features
        first = int(known[0])
        whole = int(known[-1]) - first == len(known) - 1
        return feature - first if whole else int(np.searchsorted(known, feature))

    def row_of(self, member: Member, feature: int) -> int | None:
        """The row of a feature in a result."""
        features = self.rows_of(member).features
        # The place of a feature where none is left out, which is nearly always.
        place = feature - int(features[0]) if len(features) else 0
        if not (0 <= place < len(features) and features[place] == feature):
            place = int(np.searchsorted(features, feature))
        return place if place < len(features) and features[place] == feature else None

    def ids(self, member: Member, feature: int, end: str) -> list[int]:
        """The tokens of one end of a feature's signature; none where the result does not hold the feature."""
        row = self.row_of(member, feature)
        return [] if row is None else self.rows_of(member).ids(row, end)

    def record(self, member: Member, feature: int) -> Record | None:
        """A feature's signature in a result."""
        row = self.row_of(member, feature)
        return None if row is None else self.rows_of(member).record(row)

    @property
    def sample(self) -> SampleTable | None:
        file = self.entry.sample
        return None if file is None else self.once("sample", lambda: SampleTable(file))

    @property
    def sample_tokens(self) -> SampleTokens | None:
        """The tokens of the sample, where a file beside it holds them."""
        file = self.entry.sample
        return None if file is None else self.once("tokens", lambda: SampleTokens.beside(file))

    @property
    def scores(self) -> ScoreTable | None:
        if not self.entry.scores:
            return None
        file, label = self.entry.scores[-1]
        return self.once("scores", lambda: ScoreTable(file, label))

    @property
    def links(self) -> list[LinkTable]:
        name, layer = self.entry.name, self.entry.layer
        return [
            self.once(("links", file.path), lambda file=file: LinkTable(file, name, layer))
            for file in self.entry.relations
        ]

    def fields(self, member: Member | None = None) -> tuple[str, ...]:
        """Which of `FIELDS` are known of the features."""
        return tuple(name for name in FIELDS if self._source_of(name, member) is not None)

    def values(self, name: str, member: Member | None = None) -> np.ndarray | None:
        """A field of every feature of `features`, NaN where it is not known; None where it is not known of any.

        rel_var and stable_k are those of the member's own result where it has them, else of the preferred preset of the
        value side, then of the key side. input_score and output_score are of the method named as the member's preset,
        else of the preferred key (input) or value (output) preset, at the largest k.
        """
        source = self._source_of(name, member)
        return None if source is None else self.once((name, source[1]), lambda: self._column(name, source))

    def sorted_by(self, name: str, descending: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """(Places in `features` by a field, of equal ones the first first; their keys, ascending), without NaN."""
        source = self._source_of(name, None)
        if source is None:
            return None

        def ordered() -> tuple[np.ndarray, np.ndarray]:
            values = self._column(name, source)
            keys = -values if descending else values
            order = np.argsort(keys, kind="stable")[: int((~np.isnan(keys)).sum())]
            return order.astype(np.int32), keys[order]

        return self.once(("sorted", name, descending), ordered)

    def mean(self, name: str, member: Member) -> float | None:
        """The mean of a statistic over a result's features, without those that are not finite."""
        rows = self.rows_of(member)
        if name not in rows.statistics:
            return None
        return self.once(("mean", name, member.label), lambda: _finite_mean(rows.column(name)))

    def _source_of(self, name: str, member: Member | None) -> tuple[str, Any] | None:
        if name in ("density", "maximum"):
            return ("sample", None) if self.entry.sample is not None else None
        preferred = [found for side in SIDES if (found := self.entry.preferred(side)) is not None]
        if name in ("input_score", "output_score"):
            return self._method_of(name, member)
        for some in ([] if member is None else [member]) + preferred:
            if name in self.rows_of(some).statistics:
                return "member", some.label
        return None

    def _method_of(self, name: str, member: Member | None) -> tuple[str, Any] | None:
        if (scores := self.scores) is None:
            return None
        side: Side = "key" if name == "input_score" else "value"
        wanted = [m.preset for m in (member, self.entry.preferred(side)) if m is not None]
        method = next((m for m in wanted if m in scores.methods), None)
        return None if method is None else ("scores", method)

    def _column(self, name: str, source: tuple[str, Any]) -> np.ndarray:
        where, which = source
        if where == "sample":
            assert self.sample is not None  # `_source_of` looked
            ids, values = self.sample.features, self.sample.numbers[name]
        elif where == "scores":
            assert self.scores is not None
            ids, values = self.scores.column(name, which)
        else:
            rows = self.rows_of(self.entry.member(which))
            ids, values = rows.features, rows.column(name)
        return _aligned(self.features, ids, values)


def _aligned(features: np.ndarray, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values of the ids, put at their features' places; NaN elsewhere."""
    if len(ids) == len(features) and np.array_equal(ids, features):
        return values if values.dtype.kind == "f" else values.astype(np.float64)
    found = np.full(len(features), np.nan)
    places = np.searchsorted(features, ids)
    inside = places < len(features)
    inside[inside] &= features[places[inside]] == ids[inside]
    found[places[inside]] = values[inside]
    return found


def _finite_mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
