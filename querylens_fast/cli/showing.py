"""Commands that show what the package does: the demo and the benchmarks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from querylens_fast.cli.console import quiet_loading, reported_errors, say, wide_console
from querylens_fast.demo import ASSETS


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; by default querylens_demo, or a new one where that holds others."),
    ] = None,
    k: Annotated[int, typer.Option(help="Tokens on each side, in the files.")] = 25,
    serve: Annotated[bool, typer.Option("--serve", help="Then show the results in a browser.")] = False,
    port: Annotated[int, typer.Option(help="Of --serve.")] = 8765,
) -> None:
    """The whole job on the embedded model and dictionaries, offline, in under a minute."""
    from rich.table import Table

    with reported_errors():
        from querylens_fast.demo import showcase

        quiet_loading()
        result = showcase.run_demo(out, k, browsable=serve)
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
    if out is None and result.folder != showcase.FOLDER:
        say(f"{showcase.FOLDER} holds results of an earlier version or with another k; these are in {result.folder}")
    listed = "transport, tokens, one Parquet a dictionary and preset"
    say(f"results: {result.folder.resolve()} ({len(result.files)} files: {listed})")
    if serve:
        from querylens_fast.cli.serving import serve_results

        with reported_errors():
            known = [f"{path.name}={path}" for path in sorted(ASSETS.iterdir()) if (path / "cfg.json").is_file()]
            serve_results([result.folder], "127.0.0.1", port, None, str(ASSETS / "model"), known, open_browser=True)


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
