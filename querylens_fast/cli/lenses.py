"""Commands on transport files: to and from the Jacobian lens's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from querylens_fast.cli.console import quiet_loading, reported_errors, say


def convert_transport(
    source: Annotated[Path, typer.Argument(help="A transport (.safetensors) or a Jacobian-lens file (.pt).")],
    target: Annotated[Path, typer.Argument(help="The file to write, of the other kind.")],
    model: Annotated[str | None, typer.Option(help="The lens's model: local folder or hub id.")] = None,
) -> None:
    """Turn a transport into a Jacobian-lens file, or (with --model) a Jacobian-lens file into a transport."""
    with reported_errors():
        import querylens_fast as ql
        from querylens_fast.transport.jacobian_lens import export_jacobian_lens, import_jacobian_lens

        if source.suffix == ".safetensors":
            export_jacobian_lens(ql.load_transport(source), target)
            say(f"Jacobian lens: {target.resolve()}")
            return
        if model is None:
            raise ValueError(f"{source} is read as a Jacobian lens: pass --model, the model it was fitted on")
        quiet_loading()
        imported = import_jacobian_lens(source, ql.load_model(model))
        imported.save(target)
    say(f"transport for {len(imported.points)} layers' resid_post, value side: {target.resolve()}")
