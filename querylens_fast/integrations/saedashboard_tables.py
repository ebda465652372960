"""The Parquet tables of SAEDashboard's columnar form, for one batch of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from querylens_fast.integrations.columns import alignments, ids_and_scores, rounded
from querylens_fast.integrations.dashboard import Rows

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNAR = {"dashboard_output_format": "columnar", "columnar_artifact_format": "parquet"}
"""What every manifest says."""


def tables_of(rows: Rows) -> dict[str, pa.Table]:
    """The tables by name, each with a row for every feature.

    Importers of the columnar form refuse a batch that lacks any of the five. The first two hold the logits; the others
    say what is known without texts: the alignment, zeros and empty lists.
    """
    return {
        "logits_tables": _logits_table(rows),
        "logits_histograms": _histograms_table(rows),
        "feature_statistics": _statistics_table(rows),
        "feature_tables": _features_table(rows),
        "activation_histograms": _no_histograms(rows),
    }


def _logits_table(rows: Rows) -> pa.Table:
    bottom_ids, bottom_scores = ids_and_scores(rows.bottom_ids, rows.bottom_scores, decimals=None)
    top_ids, top_scores = ids_and_scores(rows.top_ids, rows.top_scores, decimals=None)
    return _table(
        rows,
        bottom_token_ids=_lists(bottom_ids, "int64"),
        bottom_logits=_lists(bottom_scores),
        top_token_ids=_lists(top_ids, "int64"),
        top_logits=_lists(top_scores),
    )


def _histograms_table(rows: Rows) -> pa.Table:
    if rows.histogram is None:
        return _no_histograms(rows)
    heights, middles = rows.histogram
    half = (middles[:, 1] - middles[:, 0]) / 2
    ends = torch.stack([middles[:, 0] - half, middles[:, -1] + half], 1)
    return _bars(rows, heights.tolist(), rounded(middles), [tick_values(*pair) for pair in ends.tolist()])


def _no_histograms(rows: Rows) -> pa.Table:
    none: list[list[Any]] = [[] for _ in range(len(rows.features))]
    return _bars(rows, none, none, none)


def _bars(rows: Rows, heights: list[list[int]], values: list[list[float]], ticks: list[list[float]]) -> pa.Table:
    import pyarrow as pa

    return _table(
        rows,
        bar_heights=_lists(heights, "int64"),
        bar_values=_lists(values),
        tick_vals=_lists(ticks),
        title=pa.nulls(len(rows.features), pa.string()),
    )


def _statistics_table(rows: Rows) -> pa.Table:
    import pyarrow as pa

    none = pa.array([0.0] * len(rows.features))
    return _table(rows, max=none, frac_nonzero=none, positive_density=none)


def _features_table(rows: Rows) -> pa.Table:
    none: list[list[Any]] = [[] for _ in range(len(rows.features))]
    indices, values, l1 = (none, none, none) if rows.vectors is None else alignments(rows.vectors)
    columns = {
        "neuron_alignment_indices": _lists(indices, "int64"),
        "neuron_alignment_values": _lists(values),
        "neuron_alignment_l1": _lists(l1),
    }
    for kind in ("neurons", "features"):
        columns[f"correlated_{kind}_indices"] = _lists(none, "int64")
        columns |= {f"correlated_{kind}_{name}": _lists(none) for name in ("pearson", "cossim")}
    return _table(rows, **columns)


def _lists(values: Sequence[Sequence[float]], kind: str = "float64") -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.list_(pa.type_for_alias(kind)))


def _table(rows: Rows, **columns: pa.Array) -> pa.Table:
    import pyarrow as pa

    return pa.table({"feature_index": pa.array(rows.features.numpy(), pa.int64()), **columns})


def tick_values(low: float, high: float) -> list[float]:
    """Ticks of a histogram from low to high: multiples of a number of tenths, 0 and three on its longer side."""
    tenths = max(1, int(1e-4 + max(high, -low) / 0.3))
    above, below = (max(0, int(end / (tenths / 10 + 1e-6))) for end in (high, -low))
    if high > -low:
        above = 3
    else:
        below = 3
    return [i * tenths / 10 for i in range(-below, above + 1)]
