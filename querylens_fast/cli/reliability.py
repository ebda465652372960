"""The command that compares features' top tokens between independent samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import querylens_fast as ql
from querylens_fast.cli.computing import LOADING, ModelArgument
from querylens_fast.cli.console import quiet_loading, reported_errors, say, wide_console
from querylens_fast.cli.flags import Flags, flags_of, with_flags

COMPARING = flags_of(
    ql.stability,
    *("seeds", "num_samples", "max_length", "features", "k", "seed", "max_memory_gib"),
    helps={"max_memory_gib": "Bound on the working memory, GiB."},
)
PLACE = flags_of(ql.load_dictionary, "sae_id", "layer")


@with_flags
def stability(
    model: ModelArgument,
    tokens: Annotated[str, typer.Argument(help="Token file, text file or dataset name.")],
    dictionaries: Annotated[list[str], typer.Argument(help="sae-lens folders, weights files or releases.")],
    presets: Annotated[str, typer.Option(help="Comma-separated.")] = "query_lens_key,query_lens_value",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    place: Flags = PLACE,
    comparing: Flags = COMPARING,
    loading: Flags = LOADING,
) -> None:
    """How far features' top tokens agree between independent samples: Jaccard indices by layer (paper, Table 9)."""
    with reported_errors():
        from querylens_fast.runs.atomic_write import write_whole

        loaded = [ql.load_dictionary(name, **place) for name in dictionaries]
        quiet_loading()
        found = ql.stability(ql.load_model(model, **loading), loaded, tokens, presets=presets.split(","), **comparing)
        if out is not None:
            write_whole(out, json.dumps(found.as_dict(), indent=1) + "\n")
    from rich.table import Table

    title = f"Jaccard of the top {comparing['k']} tokens between {found.samples} samples of {found.sequences} sequences"
    table = Table(title=title)
    for column in ("layer", "dictionary", "preset", "features", "mean ± se", "median", "lowest tenth"):
        table.add_column(column, overflow="fold")
    for r in found.rows:
        mean = f"{r.jaccard:.3f} ± {r.standard_error:.3f}"
        row = (
            str(r.layer),
            r.dictionary,
            r.preset,
            str(r.n_features),
            mean,
            f"{r.median:.3f}",
            f"{r.lowest_decile:.3f}",
        )
        table.add_row(*row)
    wide_console(120).print(table, markup=False)
    for preset, mean in found.as_dict()["means"].items():
        say(f"{preset}: mean {mean:.3f} over {len(loaded)} dictionaries ({found.tokens} tokens a sample)")
    if out is not None:
        say(f"figures: {out.resolve()}")
