"""What a table of scores says: means by method, groups of layers, and what one method finds that another misses.

Means are over the features of a dictionary, mean ± 1.96 s/√n, and over dictionaries with equal weights (paper, §5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from querylens_fast.evaluation.scores import SCORES
from querylens_fast.relations.tables import RelationTable

Z_95 = 1.959964
THIRDS = ("early layers", "middle layers", "late layers")
COMPARED = (
    ("logit_lens_key", "query_lens_key", "input_score"),
    ("logit_lens_value", "query_lens_value", "output_score"),
)
"""The lens without transport, that with it, and the score of their side."""


@dataclass(frozen=True)
class MeanScore:
    """The mean of one score over the features of a dictionary; dictionary None: over dictionaries, equal weights."""

    score: str
    method: str
    k: int
    dictionary: str | None
    layer: int | None
    mean: float
    low: float
    """mean − 1.96 standard errors."""
    high: float
    n_features: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_scores(found: RelationTable, score: str = "input_score") -> list[MeanScore]:
    """Means of a score by method, k and dictionary, and over dictionaries; features without the score do not count.

    Args:
        found: From `score_methods`; or from `judge_table`, for the score "interpretability".
        score: Its column.

    Raises:
        ValueError: Another table, or a score that it has not.
    """
    _check(found, "scores", "judgements")
    known = SCORES if found.metadata["what"] == "scores" else ("interpretability",)
    if score not in known:
        raise ValueError(f"score is {score!r}; expected one of {', '.join(known)}")
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = ["method", "k", "source", "source_layer"]
    table = found.table([*keys, score])
    for name in ("method", "source"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    grouped = table.group_by(keys, use_threads=False)
    measures = [(score, "mean"), (score, "stddev", pc.VarianceOptions(ddof=1)), (score, "count")]
    own = []
    for row in grouped.aggregate(measures).to_pylist():
        method, k, label, layer = (row[key] for key in keys)
        mean, spread, n = (row[f"{score}_{measure}"] for measure in ("mean", "stddev", "count"))
        error = spread / n**0.5 if n > 1 else math.nan
        if n:
            low, high = mean - Z_95 * error, mean + Z_95 * error
            own.append(MeanScore(score, method, k, label, layer, mean, low, high, n))
    together: dict[tuple[str, int], list[MeanScore]] = {}
    for mean in own:
        together.setdefault((mean.method, mean.k), []).append(mean)
    return [mean for several in together.values() for mean in (*several, _over_dictionaries(several))]


def _over_dictionaries(own: Sequence[MeanScore]) -> MeanScore:
    mean = sum(m.mean for m in own) / len(own)
    error = sum(((m.high - m.mean) / Z_95) ** 2 for m in own) ** 0.5 / len(own)
    low, high, n = mean - Z_95 * error, mean + Z_95 * error, sum(m.n_features for m in own)
    return MeanScore(own[0].score, own[0].method, own[0].k, None, None, mean, low, high, n)


def by_thirds(means: Sequence[MeanScore], n_layers: int) -> list[MeanScore]:
    """Means over the dictionaries of each third of a model's depth, by method and k; ``dictionary`` names the third."""
    groups: dict[tuple[str, int, str], list[MeanScore]] = {}
    for mean in means:
        if mean.dictionary is not None and mean.layer is not None:
            third = THIRDS[min(2, 3 * mean.layer // n_layers)]
            groups.setdefault((mean.method, mean.k, third), []).append(mean)
    return [replace(_over_dictionaries(own), dictionary=third) for (_, _, third), own in groups.items()]


class Gain(NamedTuple):
    """Features of one dictionary that pass a criterion under one method and not under another.

    The criteria are "input_score" and "output_score" (above 0), and "coherent" (see `scores`).
    """

    source: str
    criterion: str
    before: str
    after: str
    gained: list[int]
    """Ids of the features that pass under ``after`` alone, those of the largest score there first."""
    lost: list[int]
    """Those that pass under ``before`` alone, likewise."""
    n: int
    """Features that have both."""


def gains(found: RelationTable, k: int = 25) -> list[Gain]:
    """Which features score, or become coherent, under Query Lens and not under Logit Lens; both ways.

    Raises:
        ValueError: The table is none of `score_methods`.
    """
    import pyarrow.compute as pc

    _check(found)
    names = [name for before, after, _ in COMPARED for name in (before, after)]
    columns = ["source", "source_id", "method", "k", "input_score", "output_score", "coherent", "embedding_coherence"]
    table = found.table(columns).filter((pc.field("k") == k) & pc.field("method").isin(names))
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault((row["source"], row["method"]), {})[row["source_id"]] = row
    compared = []
    for source in dict.fromkeys(source for source, _ in rows):
        for before, after, score in COMPARED:
            pair = rows.get((source, before), {}), rows.get((source, after), {})
            for criterion, by in ((score, score), ("coherent", "embedding_coherence")):
                shared = [f for f in pair[0] if f in pair[1] and None not in (p[f][criterion] for p in pair)]
                if shared:
                    compared.append(Gain(source, criterion, before, after, *_differ(*pair, shared, criterion, by)))
    return compared


def _differ(
    before: dict[int, Any], after: dict[int, Any], shared: list[int], criterion: str, by: str
) -> tuple[list[int], list[int], int]:
    """(features that pass after alone, before alone, features compared)."""

    def alone(here: dict[int, Any], there: dict[int, Any]) -> list[int]:
        passing = [f for f in shared if here[f][criterion] > 0 and not there[f][criterion] > 0]
        return sorted(passing, key=lambda f: (-here[f][by], f))

    return alone(after, before), alone(before, after), len(shared)


def _check(found: RelationTable, *products: str) -> None:
    if found.metadata.get("what") not in (products or ("scores",)):
        raise ValueError(f"found is a table of {found.metadata.get('what')!r}; expected one of score_methods")
