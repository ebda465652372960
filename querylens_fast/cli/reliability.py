"""The command that compares features' top tokens between independent samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from querylens_fast.cli.console import (
    DeviceOption,
    DtypeOption,
    LinearisationOption,
    MemoryOption,
    quiet_loading,
    reported_errors,
    say,
    wide_console,
)


def stability(
    model: Annotated[str, typer.Argument(help="Local folder or hub id.")],
    tokens: Annotated[str, typer.Argument(help="Token file, text file or dataset name.")],
    dictionaries: Annotated[list[str], typer.Argument(help="sae-lens folders, weights files or releases.")],
    sae_id: Annotated[str | None, typer.Option(help="The id within a release.")] = None,
    layer: Annotated[int | None, typer.Option(help="Where the dictionary does not say.")] = None,
    seeds: Annotated[int, typer.Option(help="Samples to compare.")] = 3,
    num_samples: Annotated[int | None, typer.Option(help="Sequences in each sample.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a sequence, for text.")] = 32,
    presets: Annotated[str, typer.Option(help="Comma-separated.")] = "query_lens_key,query_lens_value",
    features: Annotated[int, typer.Option(help="Features drawn from each dictionary.")] = 100,
    k: Annotated[int, typer.Option(help="Top tokens compared.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 42,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    linearisation: LinearisationOption = "hand-written",
    max_memory_gib: MemoryOption = 2.0,
) -> None:
    """How far features' top tokens agree between independent samples: Jaccard indices by layer (paper, Table 9)."""
    with reported_errors():
        import querylens_fast as ql
        from querylens_fast.runs.atomic_write import write_whole

        loaded = [ql.load_dictionary(name, sae_id, layer) for name in dictionaries]
        quiet_loading()
        found = ql.stability(
            ql.load_model(model, device=device, dtype=dtype, linearisation=linearisation),  # type: ignore[arg-type]
            loaded,
            tokens,
            seeds=seeds,
            num_samples=num_samples,
            max_length=max_length,
            presets=presets.split(","),
            features=features,
            k=k,
            seed=seed,
            max_memory_gib=max_memory_gib,
        )
        if out is not None:
            write_whole(out, json.dumps(found.as_dict(), indent=1) + "\n")
    from rich.table import Table

    title = f"Jaccard of the top {k} tokens between {found.samples} samples of {found.sequences} sequences"
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
