"""Families of transformers' causal LMs: how each is linearised, and its error against brute force in float64.

    python -m bench families [--only NAME ...] [--out FILE] [--table docs/models.md]

For each tiny model of `family_cases` the transport's matrices are compared, on a random vector, with derivatives of
the model's own forward pass (`brute_force`): the value side from layer 0's input and output, the key side from the
end, with padding on the right and without. ``--table`` writes the newest committed record as a page's table.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import querylens_fast as ql
from bench.brute_force import BruteForce
from bench.family_cases import FAMILIES, tiny
from bench.machine import machine
from bench.record import RESULTS, save, write_text

START, END = "<!-- table of families: python -m bench families --table -->", "<!-- end of table -->"


def errors(name: str, linearisation: Any = "auto") -> tuple[ql.Model, dict[str, float]]:
    """The adapted model, and the relative error of each side and padding."""
    model = ql.as_model(tiny(name), linearisation=linearisation)
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(3))
    v = torch.randn(model.d_model, dtype=model.dtype, generator=torch.Generator().manual_seed(1))
    found: dict[str, float] = {}
    for padding in ("none", "right"):
        valid = torch.ones_like(ids, dtype=torch.bool)
        if padding == "right":
            valid[1, 5:] = False
        transport = ql.fit_transport(model, ql.Tokens(ids, valid), orders=("full",), progress=False)
        brute = BruteForce(tiny(name), model.n_layers, ids, valid)
        last = 2 * model.n_layers
        pairs = {
            "value from the embedding": (transport.matrix("value", "full", 0) @ v, brute.value(-1, v)),
            "value from layer 0": (transport.matrix("value", "full", 2) @ v, brute.value(0, v)),
            "key from the end": (transport.matrix("key", "full", last) @ v, brute.key(v)),
        }
        for side, (ours, theirs) in pairs.items():
            found[f"{side}, padding {padding}"] = float((ours - theirs).norm() / theirs.norm())
    return model, found


def measure(name: str) -> dict[str, Any]:
    """One row of the record: how the family is linearised, at which points, to what error; or why it is refused."""
    start = time.perf_counter()
    row: dict[str, Any] = {"family": name, "config": FAMILIES[name][0]}
    try:
        model, found = errors(name)
    except ql.UnsupportedModelError as error:
        return {**row, "refused": str(error)}
    return {
        **row,
        "type": model.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        "linearisation": model.linearisation,
        "submodules": model.has_submodules,
        "parallel": model.parallel,
        "routed": model.mixture_of_experts,
        "beside_the_stream": bool(model.own is not None and model.own.token_dependent),
        "modules_add_directly": all(p.adds_directly for b in model.blocks for p in (b.attention, b.mlp)),
        "errors": found,
        "largest_error": max(found.values()),
        "seconds": time.perf_counter() - start,
    }


def table(record: dict[str, Any]) -> str:
    """The record's rows as Markdown."""
    lines = [
        "| family | how | points | largest error | notes |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if "refused" in row:
            lines.append(f"| {row['family']} | refused | – | – | {row['refused'].partition(': ')[2]} |")
            continue
        notes = [
            "attention and MLP side by side" if row["parallel"] else "",
            "routing held fixed" if row["routed"] else "",
            "inputs beside the stream held fixed" if row["beside_the_stream"] else "",
            "norm or factor behind attention or MLP" if row["submodules"] and not row["modules_add_directly"] else "",
            "in float32: its own pass fails in float64" if row["dtype"] == "float32" else "",
        ]
        how = "by hand" if row["linearisation"] == "hand-written" else "autodiff"
        points = "all" if row["submodules"] else "resid_pre, resid_post"
        text = "; ".join(n for n in notes if n)
        lines.append(f"| {row['family']} | {how} | {points} | {row['largest_error']:.0e} | {text} |")
    return "\n".join(lines)


def write_table(page: Path, record: dict[str, Any]) -> None:
    """Replace what lies between the page's two markers."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    write_text(page, f"{before}{START}\n{table(record)}\n{END}{after}")


def newest() -> dict[str, Any]:
    """The newest committed record."""
    import json

    return json.loads(sorted(RESULTS.glob("families-*.json"))[-1].read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench families", description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), help="families to measure")
    parser.add_argument("--out", type=Path, help="record (default: bench/results/families-DATE.json)")
    parser.add_argument("--table", type=Path, help="write the newest record's table into this page and measure nothing")
    options = parser.parse_args(arguments)
    if options.table:
        write_table(options.table, newest())
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("querylens_fast").setLevel(logging.ERROR)
    rows = []
    for name in options.only:
        rows.append(measure(name))
        print(f"{name:22s} {rows[-1].get('refused') or format(rows[-1]['largest_error'], '.1e')}", flush=True)
    record = {"machine": machine(torch.device("cpu")), "rows": rows}
    save(options.out or RESULTS / f"families-{record['machine']['date']}.json", record)


if __name__ == "__main__":
    main()
