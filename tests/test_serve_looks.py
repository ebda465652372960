"""What pages are drawn with: colours, numbers, names and plots."""

import re
from pathlib import Path

import querylens_fast as ql
from querylens_fast.serve.markup import number, preset_name, score_bar, shade
from querylens_fast.serve.plots import histogram, line_plot, nice_ticks

STYLE = Path(ql.__file__).parent / "serve" / "static" / "style.css"


def test_colours_can_be_read() -> None:
    """Text has a contrast of at least 4.5 with what it stands on, in both schemes, on every shade."""
    colours = dict(re.findall(r"--([\w-]+): light-dark\((#\w+, #\w+)\)", STYLE.read_text()))
    shades = [f"{sign}{i}" for sign in "pn" for i in range(1, 7)]
    grounds = ("paper", "card", "sunk")
    pairs = [("ink", g) for g in (*grounds, "warn-back", *shades)] + [("soft", g) for g in grounds]
    pairs += [("link", "paper"), ("link", "card"), ("warn", "warn-back")]
    pairs += [(f"series-{i}", "card") for i in range(1, 7)] + [("soft", s) for s in shades if s[1] in "123"]
    for scheme in (0, 1):
        hexes = {name: both.split(", ")[scheme] for name, both in colours.items()}
        for text, ground in pairs:
            assert contrast(hexes[text], hexes[ground]) >= 4.5, (scheme, text, ground)
        marks = "#3f4a58" if scheme == 0 else "#d3dbe5"  # of marks in strong chips
        assert all(contrast(marks, hexes[s]) >= 4.5 for s in shades if s[1] in "456")
        assert contrast("#ffffff" if scheme == 0 else "#10161e", hexes["link"]) >= 4.5  # of the main buttons


def contrast(first: str, second: str) -> float:
    """WCAG 2's contrast ratio."""
    light = []
    for colour in (first, second):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        light.append(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05)
    return max(light) / min(light)


def test_colours_and_bars_follow_the_score() -> None:
    assert [shade(x, 6.0) for x in (6.0, 3.0, 0.1, 0.0, -0.1, -6.0, 9.0, None, float("nan"))] == [
        "p6", "p3", "p1", "z", "n1", "n6", "p6", "z", "z",
    ]  # fmt: skip
    assert shade(1.0, 0.0) == "z" and score_bar(1.0, None, 0.0) == ""
    assert 'class="bar-p" y="1" width="50.0"' in score_bar(3.0, None, 6.0)
    assert 'class="bar-n"' in score_bar(-3.0, 0.6, 6.0) and 'd="M40.0 4.5H60.0"' in score_bar(-3.0, 0.6, 6.0)


def test_numbers_names_and_plots() -> None:
    assert [number(x) for x in (None, float("nan"), 0.0, 0.25, 12.345, 1234567, 2.5e-7, -3)] == [
        "–", "–", "0", "0.250", "12.3", "1\u202f234\u202f567", "2.50e−07", "−3",
    ]  # fmt: skip
    assert preset_name("query_lens_value_approx~2") == "Query Lens, first order (2)"
    assert preset_name("value_identity_embed") == "value identity embed"
    for low, high in ((0.0, 0.74), (-3.0, 8.0), (5.0, 5.0), (1e-9, 2e-9)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    assert line_plot({}, "x", "y") is None and line_plot({"a": [(0, float("nan"), None)]}, "x", "y") is None
    drawn = histogram([-2.0, -1.0, 0.5, 2.0], [1, 4, 9])
    assert drawn is not None and [c.sign for c in drawn.columns] == ["n", "n", "p"]
    assert "\u22122" in [t.label for t in drawn.ticks]
    plot = line_plot({"a": [(3, 0.2, None), (0, 0.9, 0.1)], "b": [(1, 0.5, None)]}, "x", "y")
    assert plot is not None and [m.x for m in plot.series[0].marks] == sorted(m.x for m in plot.series[0].marks)
    assert plot is not None and all(0 <= m.y <= plot.bottom for line in plot.series for m in line.marks)
