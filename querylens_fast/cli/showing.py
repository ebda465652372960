"""Commands that show what the package does: the demo, the input score, the benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import querylens_fast as ql
from querylens_fast.cli.computing import LOADING
from querylens_fast.cli.console import quiet_loading, reported_errors, say, wide_console
from querylens_fast.cli.flags import Flags, with_flags


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("querylens_demo"),
    k: Annotated[int, typer.Option(help="Tokens on each side, in the files.")] = 25,
) -> None:
    """The whole job on the embedded model and dictionaries, offline, in under a minute."""
    from rich.table import Table

    with reported_errors():
        from querylens_fast.demo import showcase

        quiet_loading()
        result = showcase.run_demo(out, k)
    title = "Features at the quartiles of activation strength on held-out text (· space, ⏎ line end)"
    table = Table(title=title, show_lines=True)
    for column in (
        "dictionary",
        "feature",
        "activated by",
        "key tokens: Logit | Query Lens",
        "value tokens: Logit | Query Lens",
    ):
        table.add_column(column, overflow="fold", no_wrap=column in ("dictionary", "feature"))
    for row in result.rows:
        pairs = [
            f"Logit: {showcase.visible(row.tokens[f'logit_lens_{side}'])}\n"
            f"Query: {showcase.visible(row.tokens[f'query_lens_{side}'])}"
            for side in ("key", "value")
        ]
        table.add_row(row.dictionary, str(row.feature), showcase.visible(row.activating), *pairs)
    wide_console(160).print(table, markup=False)
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    total = f"{showcase.total_seconds(result):.1f} s on {showcase.threads()} threads"
    say(f"{result.n_features} features × 4 signatures in {total} ({steps})")
    say(f"results: {out.resolve()} ({len(result.files)} files: transport, tokens, one Parquet a dictionary and preset)")


@with_flags
def evaluate_input(
    model: Annotated[str | None, typer.Option(help="Default: the embedded model and dictionaries.")] = None,
    dictionary: Annotated[list[str] | None, typer.Option(help="Repeat for more layers.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Held-out sample to find activating tokens in.")] = None,
    transport: Annotated[Path | None, typer.Option(help="Default: fitted on the first tokens, left out after.")] = None,
    presets: Annotated[str, typer.Option(help="Comma-separated.")] = (
        "logit_lens_key,key_identity_embed_cosine_centered,query_lens_key,logit_lens_value,query_lens_value"
    ),
    k: Annotated[int, typer.Option(help="Signature size.")] = 25,
    examples: Annotated[int, typer.Option(help="Activating sequences of each feature.")] = 20,
    min_examples: Annotated[int, typer.Option(help="Features with fewer are left out.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the scores as JSON too.")] = None,
    loading: Flags = LOADING,
) -> None:
    """The paper's input score I(T): is what activates a feature in its signature? By layer, with 95 % intervals."""
    with reported_errors():
        from querylens_fast.evaluation.input_score import evaluate_presets

        quiet_loading()
        example = _example(model, dictionary, tokens, transport is None, loading)
        scores = evaluate_presets(
            example.model, example.dictionaries, example.held_out, transport or example.fit_tokens,
            presets.split(","), k, examples, min_examples,
        )  # fmt: skip
    _show_scores(scores, k)
    if out is not None:
        out.write_text(json.dumps([s.as_dict() for s in scores], indent=1), encoding="utf-8")
        say(f"results: {out.resolve()}")


def _example(model: str | None, dictionaries: list[str] | None, tokens: str | None, cut: bool, loading: Flags) -> Any:
    """A user's model, dictionaries and sample (``cut``: its first sequences are to fit on), or the embedded ones."""
    from querylens_fast.demo.showcase import FIT_SEQUENCES, Example, load_example

    if model is None:
        if dictionaries or tokens:
            raise ValueError(
                "--dictionary and --tokens belong to a model: give --model too, or none for the embedded ones"
            )
        return load_example()
    if not dictionaries or not tokens:
        raise ValueError("with --model, give --dictionary (once for each layer) and --tokens too")
    loaded = ql.load_model(model, **loading)
    sample = ql.load_tokens(tokens, model=loaded)
    n = min(FIT_SEQUENCES, len(sample.ids) // 2) if cut else 0
    held_out = ql.Tokens(sample.ids[n:], sample.valid_mask[n:], sample.source)
    return Example(loaded, [ql.load_dictionary(d) for d in dictionaries], sample.head(n or 1), held_out)


def _show_scores(scores: Sequence[Any], k: int) -> None:
    from rich.table import Table

    from querylens_fast.evaluation.input_score import as_table

    names = list(dict.fromkeys(s.dictionary for s in scores if s.dictionary))
    table = Table(title=f"Input score I(T), k={k}: mean over features [95 % interval]")
    for name in ("preset", *names, "mean over dictionaries"):
        table.add_column(name)
    for preset, row in as_table(scores).items():
        cells = [row[n] for n in [*names, None]]
        table.add_row(preset, *(f"{c.mean:.3f} [{c.low:.3f}, {c.high:.3f}] n={c.n_features}" for c in cells))
    wide_console(200).print(table, markup=False)


def bench(ctx: typer.Context) -> None:
    """The bundled benchmarks (from a source checkout); arguments go to `python -m bench`."""
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    with reported_errors():
        if not (root / "bench" / "__main__.py").is_file():
            raise FileNotFoundError("the benchmarks come with a source checkout; install that with `pip install -e .`")
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    raise typer.Exit(subprocess.call([sys.executable, "-m", "bench", *ctx.args], env=environment))
