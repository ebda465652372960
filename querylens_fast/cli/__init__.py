"""The command line, `querylens-fast`: every command, by the module that holds it.

Commands say where their result is. A mistake is one line on stderr that says what to do, exit code 2, and nothing
written.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

import typer

from querylens_fast import __version__
from querylens_fast.cli import console
from querylens_fast.cli.lazy import lazy_group

COMMANDS = {
    "demo": "showing.demo",
    "run": "computing.run",
    "transport": "computing.transport",
    "signatures": "computing.signatures",
    "show": "browsing.show",
    "search": "browsing.search",
    "verify": "browsing.verify",
    "serve": "serving.serve",
    "downstream": "relating.downstream",
    "upstream": "relating.upstream",
    "flow": "relating.flow",
    "chains": "relating.chains",
    "neighbours": "relating.neighbours",
    "token-features": "relating.token_features",
    "weight-lens": "explaining.weight_lens",
    "output-features": "explaining.output_features",
    "attention-pairs": "explaining.attention_pairs",
    "attention-profiles": "explaining.attention_profiles",
    "channels": "explaining.channels",
    "report": "reporting.report",
    "stability": "reliability.stability",
    "sample": "evaluating.sample",
    "steer": "evaluating.steer",
    "judge": "evaluating.judge",
    "topk": "computing.topk",
    "export": "exporting.export",
    "annotate-graph": "exporting.annotate_graph",
    "convert-transport": "lenses.convert_transport",
    "convert-features": "computing.convert_features",
    "bench": "showing.bench",
}
"""The module and function of each command."""
EVALUATE_COMMANDS = {
    "input": "evaluating.input_score",
    "scores": "evaluating.scores",
    "report": "evaluating.report",
}
OWN_ARGUMENTS = ("run", "bench")
"""Commands that take any further arguments."""


class _App(typer.Typer):
    def __call__(self, *arguments: Any, **given: Any) -> Any:
        with console.interruptible():  # also while commands are looked up, which imports torch
            return super().__call__(*arguments, **given)


app = _App(
    cls=lazy_group(COMMANDS, OWN_ARGUMENTS),
    help="Token signatures for every feature of sparse autoencoders and transcoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(
    cls=lazy_group(EVALUATE_COMMANDS),
    help="Check signatures against what features do on held-out text.",
    no_args_is_help=True,
)
SHARED = ("transport", "signatures", "run", "evaluate")
"""Commands whose work several processes share."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"querylens_fast {__version__}")
        raise typer.Exit()


DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, too.")]
VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
]


@app.callback()
def _setup(context: typer.Context, debug: DebugOption = False, version: VersionOption = False) -> None:
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


app.add_typer(evaluate, name="evaluate")
