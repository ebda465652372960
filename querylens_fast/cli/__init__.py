"""The command line, `querylens-fast`: every command, by the module that holds it.

Commands say where their result is. A mistake is one line on stderr that says what to do, exit code 2, and nothing
written.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from querylens_fast.cli import (
    browsing,
    computing,
    console,
    evaluating,
    explaining,
    exporting,
    lenses,
    relating,
    reliability,
    reporting,
    serving,
    showing,
)

app = typer.Typer(
    help="Token signatures for every feature of sparse autoencoders and transcoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(help="Check signatures against what features do on held-out text.", no_args_is_help=True)
SHARED = ("transport", "signatures", "run", "evaluate")
"""Commands whose work several processes share."""
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, too.")]
OWN_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def _setup(context: typer.Context, debug: DebugOption = False) -> None:
    console.debug(debug)
    _refuse_torchrun(context)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("transformers", "httpx", "datasets", "jax"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _refuse_torchrun(context: typer.Context) -> None:
    """Refuse to do the same work once in each of several processes: one line, from the first of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in SHARED:
        if os.environ.get("RANK", "0") == "0":
            said = f"{context.invoked_subcommand} takes one process: start it without torchrun"
            typer.secho(f"error: {said} ({', '.join(SHARED)} share their work)", fg="red", err=True)
        raise typer.Exit(2)


app.command()(showing.demo)
app.command(context_settings=OWN_ARGUMENTS)(computing.run)
app.command()(computing.transport)
app.command()(computing.signatures)
app.command()(browsing.show)
app.command()(browsing.search)
app.command()(browsing.verify)
app.command()(serving.serve)
app.command()(relating.downstream)
app.command()(relating.upstream)
app.command()(relating.flow)
app.command()(relating.chains)
app.command()(relating.neighbours)
app.command("token-features")(relating.token_features)
app.command("weight-lens")(explaining.weight_lens)
app.command("output-features")(explaining.output_features)
app.command("attention-pairs")(explaining.attention_pairs)
app.command("attention-profiles")(explaining.attention_profiles)
app.command()(explaining.channels)
app.command("report")(reporting.report)
app.add_typer(evaluate, name="evaluate")
app.command()(reliability.stability)
evaluate.command("input")(evaluating.input_score)
evaluate.command()(evaluating.scores)
evaluate.command()(evaluating.report)
app.command()(evaluating.sample)
app.command()(evaluating.steer)
app.command()(evaluating.judge)
app.command()(computing.topk)
app.command()(exporting.export)
app.command("annotate-graph")(exporting.annotate_graph)
app.command("convert-transport")(lenses.convert_transport)
app.command("convert-features")(computing.convert_features)
app.command(context_settings=OWN_ARGUMENTS)(showing.bench)
