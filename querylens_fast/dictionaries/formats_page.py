"""The page docs/formats.md, written from the tables of formats, hook points and architectures.

`python -m querylens_fast.dictionaries.formats_page` writes it; a test compares it with the code.
"""

from __future__ import annotations

from pathlib import Path

from querylens_fast.dictionaries.formats import FORMATS
from querylens_fast.dictionaries.hook_points import NAMES, SITES
from querylens_fast.dictionaries.sae import ACTIVATIONS

_HEAD = """# Dictionary formats

`ql.load_dictionary(path)` finds the format by the file's name, a configuration beside it and the names of its tensors.
Matrices are read in part from their file (a `.pt` is memory-mapped); no file runs code, and what a file claims is
checked against its size before it is read. `[n,d]` are axes (features, d_model), `?` is decided by shape alone.
"""
_SITES_HEAD = """## Where dictionaries act

Names follow `blocks.N.`, or a module path such as `model.layers.N.`, `transformer.h.N.` or `gpt_neox.layers.N.`; a
layer's own path is its output. *pre*, *mid* and *post* are the residual stream before the attention, between attention
and MLP, and after the MLP of layer N. Where a side has no point, presets that need one refuse it by name. Keys that
read a module's output, or what its output matrix W_O or W_out reads, go through that module's own Jacobian first
([transport.md](transport.md)); the latter are no directions of the stream, so identity presets refuse them.
"""
_NEW = """## Adding a format

Add one `Format` to `FORMATS` in `querylens_fast/dictionaries/formats.py`: the file's name, which tensors hold values
and keys with their axes, where its configuration lies, and a function that turns the configuration into sae-lens's
terms (hook_name, architecture, k, ...). Add a case to `tests/format_cases.py` that writes the layout; a test fails for
a format without one. Then run `python -m querylens_fast.dictionaries.formats_page`.
"""


def page() -> str:
    """The text of docs/formats.md."""
    formats = _table(
        ("format", "weights file", "values", "keys", "configuration"),
        [(f.name, _code(f.weights), _code(*f.values), _code(*f.keys), _code(*f.config) or "none") for f in FORMATS],
    )
    points = {None: "none", 0: "pre", 1: "mid", 2: "post"}
    read = lambda s: f"{s.carried_by}'s input" if s.reads_inside else points[s.key]  # noqa: E731
    sites = _table(
        ("names", "values are added at", "keys read"),
        [
            (
                _code(*NAMES[s.name].split()),
                points[s.value] + (f", through {s.carried_by}" if s.carried_by else ""),
                "the module's output" if s.reads_output else read(s),
            )
            for s in SITES
        ],
    )
    names = ", ".join(f"`{a}`" for a in ACTIVATIONS)
    running = f"## Architectures that run (token_change, zero_out, evaluation)\n\n{names}"
    running += ". Vectors of others are read, but not run.\n"
    return "\n".join((_HEAD, formats, _SITES_HEAD, sites, running, _NEW))


def _code(*texts: str) -> str:
    return ", ".join("`" + text.replace("|", "\\|") + "`" for text in texts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    Path("docs/formats.md").write_text(page(), encoding="utf-8")
