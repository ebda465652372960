"""Figures of an evaluation report, as PNG and SVG. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querylens_fast.evaluation.means import THIRDS, MeanScore, by_thirds

if TYPE_CHECKING:
    from querylens_fast.evaluation.report_data import Report

TITLES = {
    "input_score": "Input score I(T)",
    "output_score": "Output score O(T)",
    "embedding_coherence": "Embedding coherence",
    "interpretability": "Interpretability by a judge",
}


def draw_figures(report: Report, folder: Path) -> dict[str, Path]:
    """Draw every figure that the report has numbers for; returns title → SVG file (a PNG lies beside each).

    Raises:
        ImportError: matplotlib is missing; it says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Path] = {}
    for score, title in TITLES.items():
        own = [m for m in report.means if m.score == score]
        at_k = [m for m in own if m.k == report.k]
        if not at_k:
            continue
        figures[f"{title} by method"] = _draw(folder / f"{score}-bars", _bars, at_k, title)
        thirds = by_thirds(at_k, report.n_layers)
        if len({m.dictionary for m in thirds}) > 1:
            figures[f"{title} by group of layers"] = _draw(folder / f"{score}-thirds", _grouped_bars, thirds, title)
        if len({m.dictionary for m in at_k if m.dictionary}) > 1:
            figures[f"{title} by dictionary"] = _draw(folder / f"{score}-lines", _lines, at_k, title)
        if len({m.k for m in own}) > 1:
            figures[f"{title} by signature size"] = _draw(folder / f"{score}-k", _sweep, own, title)
    if report.rel_var:
        figures["Relative variance by dictionary"] = _draw(
            folder / "rel-var", _by_dictionary, report.rel_var, "rel_var"
        )
    if report.stability:
        found: dict[str, dict[str, float]] = {}
        for row in report.stability:
            found.setdefault(row.preset, {})[row.dictionary] = row.jaccard
        title = "Stability: agreement of top tokens between samples"
        figures[title] = _draw(folder / "stability", _by_dictionary, found, f"Jaccard of the top {report.k}")
    if report.oracle:
        transposed = {
            name: {label: row[name] for label, row in report.oracle.items() if name in row}
            for name in next(iter(report.oracle.values()))
        }
        title = "Output score by transition, and the best per feature"
        figures[title] = _draw(folder / "transitions", _by_dictionary, transposed, TITLES["output_score"])
    return figures


def _draw(path: Path, plot: Callable[..., None], *arguments: Any) -> Path:
    """Save one plot as SVG and PNG; returns the SVG's path."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    plot(axes, *arguments)
    with plt.rc_context({"svg.hashsalt": "querylens_fast"}):  # and no date: the same numbers give the same bytes
        for ending in ("png", "svg"):
            about = {"Date": None} if ending == "svg" else None
            figure.savefig(path.with_suffix(f".{ending}"), dpi=150, metadata=about)
    plt.close(figure)
    return path.with_suffix(".svg")


def _errors(means: Sequence[MeanScore]) -> list[float]:
    return [0.0 if m.high != m.high else m.high - m.mean for m in means]


def _bars(axes: Any, means: Sequence[MeanScore], title: str) -> None:
    over = [m for m in means if m.dictionary is None]
    axes.barh([m.method for m in over], [m.mean for m in over], xerr=_errors(over), capsize=3, color="#4c78a8")
    axes.invert_yaxis()
    axes.set(xlabel=f"{title}, k = {over[0].k}: mean over dictionaries, 95 % interval")


def _grouped_bars(axes: Any, means: Sequence[MeanScore], title: str) -> None:
    methods = list(dict.fromkeys(m.method for m in means))
    thirds = [third for third in THIRDS if any(m.dictionary == third for m in means)]
    width = 0.8 / len(thirds)
    for i, third in enumerate(thirds):
        own = [m for m in means if m.dictionary == third]
        places = [methods.index(m.method) + (i - (len(thirds) - 1) / 2) * width for m in own]
        axes.barh(places, [m.mean for m in own], width, xerr=_errors(own), capsize=2, label=third)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set(xlabel=f"{title}, k = {means[0].k}: mean over dictionaries, 95 % interval")
    axes.legend(fontsize=7)


def _lines(axes: Any, means: Sequence[MeanScore], title: str) -> None:
    for method in dict.fromkeys(m.method for m in means):
        own = [m for m in means if m.method == method and m.dictionary]
        axes.errorbar(
            [m.dictionary for m in own], [m.mean for m in own], _errors(own), marker="o", capsize=3, label=method
        )
    axes.set(ylabel=title)
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _sweep(axes: Any, means: Sequence[MeanScore], title: str) -> None:
    for method in dict.fromkeys(m.method for m in means):
        own = sorted((m for m in means if m.method == method and m.dictionary is None), key=lambda m: m.k)
        axes.errorbar([m.k for m in own], [m.mean for m in own], _errors(own), marker="o", capsize=3, label=method)
    axes.set(xlabel="signature size k", ylabel=title)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _by_dictionary(axes: Any, values: dict[str, dict[str, float]], title: str) -> None:
    for name, row in values.items():
        axes.plot(list(row), list(row.values()), marker="o", label=name)
    axes.set(ylabel=title)
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
