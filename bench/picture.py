"""Draw the README's picture from the demo's results: ``python -m bench picture``.

For one dictionary of the demo, the features at the quartiles of activation strength (the demo's own rule): the tokens
that activate each on held-out text, and its five top key tokens under Logit Lens and under Query Lens. A token that is
among the activating ones is drawn in a darker box.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from querylens_fast.demo.showcase import Shown, run_demo, visible

COLUMNS = (("Activated by (held-out text)", 0.02), ("Logit Lens, key", 0.33), ("Query Lens, key", 0.66))
PLAIN, MATCHED = "#e8edf3", "#7fb3e6"
LINE_HEIGHT = 0.17
WIDTHS = 0.30


def draw(rows: Sequence[Shown], out: Path) -> Path:
    """Write the picture of the rows to ``out`` (PNG or SVG by its ending)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.0, 0.6 + 0.85 * len(rows)), layout="constrained")
    axes.set(xlim=(0, 1), ylim=(-len(rows), 0.35))
    axes.axis("off")
    for title, x in COLUMNS:
        axes.text(x, 0.12, title, fontweight="bold", fontsize=10)
    figure.canvas.draw()
    for i, row in enumerate(rows):
        axes.text(0.02, -i - 0.12, f"{row.dictionary}, feature {row.feature}", fontsize=7, color="#666666")
        lists = (row.activating, row.tokens["logit_lens_key"], row.tokens["query_lens_key"])
        for (_, x), tokens in zip(COLUMNS, lists, strict=True):
            _chips(axes, x, -i - 0.38, tokens, set(row.activating))
        if i:
            axes.axhline(-i + 0.06, color="#dddddd", linewidth=0.8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160, metadata={"Software": None} if out.suffix == ".png" else None)
    plt.close(figure)
    return out


def _chips(axes: Any, x: float, y: float, tokens: Sequence[str], matched: set[str]) -> None:
    """Tokens as boxes from left to right, on further lines where a column is full."""
    left, renderer = x, axes.figure.canvas.get_renderer()
    for token in tokens:
        box = {"boxstyle": "round,pad=0.25", "facecolor": MATCHED if token in matched else PLAIN, "edgecolor": "none"}
        text = axes.text(left, y, visible([token]), fontsize=9, family="monospace", bbox=box, va="center")
        extent = text.get_window_extent(renderer).transformed(axes.transData.inverted())
        if extent.x1 > x + WIDTHS and left > x:
            left, y = x, y - 2 * LINE_HEIGHT
            text.set_position((left, y))
        left += extent.width + 0.022


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--dictionary", default="sae_layer0", help="which of the demo's dictionaries (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/signatures.png"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for row in run_demo(Path(folder)).rows if row.dictionary == options.dictionary]
    if not rows:
        parser.error(f"the demo has no dictionary {options.dictionary!r}")
    print(draw(rows, options.out))


if __name__ == "__main__":
    main()
