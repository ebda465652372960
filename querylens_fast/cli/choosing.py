"""What the commands of relations share: options, the embedded model and dictionaries as defaults, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from querylens_fast.cli.console import quiet_loading, say, wide_console

MAX_CELL = 36
"""Characters shown of a text."""
EMBEDDED_LAYER = 1
"""Layer of the embedded dictionary that commands on one dictionary take by default."""

ModelOption = Annotated[str | None, typer.Option(help="Local folder or hub id. Default: the embedded model.")]
OneOption = Annotated[
    str | None, typer.Option(help="Folder, file or release of a dictionary. Default: the embedded one of --layer.")
]
ManyOption = Annotated[
    list[str] | None, typer.Option("--dictionary", help="Repeat for more. Default: all embedded ones.")
]
SaeIdOption = Annotated[str | None, typer.Option(help="The id within a release.")]
LayerOption = Annotated[int | None, typer.Option(help="Where the dictionary does not say.")]
FeaturesOption = Annotated[str, typer.Option(help="all, start:stop, or ids like 1,5,9.")]
KOption = Annotated[int, typer.Option(help="Kept on each side.")]
ShowOption = Annotated[int, typer.Option("--show", help="Rows to show.", min=0)]
TransportOption = Annotated[Path | None, typer.Option(help="A transport file, for presets that need one.")]
TunedLensOption = Annotated[Path | None, typer.Option(help="A tuned lens's params.pt, for the preset tuned_lens.")]
OutOption = Annotated[Path, typer.Option(help="The .parquet file to write; a killed run resumes.")]


def chosen_model(model: str | None, given: bool, device: str, dtype: str) -> Any:
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS

    if (model is None) == given:
        raise ValueError("give both --model and --dictionary, or neither for the embedded ones")
    quiet_loading()
    return ql.load_model(ASSETS / "model" if model is None else model, device=device, dtype=dtype)


def chosen_dictionary(dictionary: str | None, sae_id: str | None, layer: int | None) -> Any:
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS

    if dictionary is not None:
        return ql.load_dictionary(dictionary, sae_id, layer)
    return ql.load_dictionary(ASSETS / f"sae_layer{EMBEDDED_LAYER if layer is None else layer}")


def chosen_pair(
    model: str | None, dictionary: str | None, sae_id: str | None, layer: int | None, device: str, dtype: str
) -> tuple[Any, Any]:
    return chosen_model(model, dictionary is not None, device, dtype), chosen_dictionary(dictionary, sae_id, layer)


def chosen_dictionaries(dictionaries: Sequence[str] | None) -> list[Any]:
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS

    embedded = [*sorted(ASSETS.glob("sae_layer*")), *sorted(ASSETS.glob("transcoder_layer*"))]
    return [ql.load_dictionary(d) for d in dictionaries or embedded]


def report(found: Any, show: int, model: Any = None, shown: Any = None) -> None:
    """The first rows of ``shown`` (default: of the table), then where all of them are."""
    from rich.table import Table

    hidden = {"source_layer", "target_layer"}
    rows = (found.head(show) if shown is None else shown.slice(0, show)).to_pylist()
    if rows:
        table = Table()
        for name in (n for n in rows[0] if n not in hidden):
            table.add_column(name)
        for row in rows:
            table.add_row(*(_cell(name, row, model) for name in row if name not in hidden))
        wide_console(120).print(table, markup=False)
    say(f"{len(found)} rows: {found.path.resolve()}")


def _cell(name: str, row: dict[str, Any], model: Any) -> str:
    value = row[name]
    if isinstance(value, float):
        return f"{value:.4f}"
    if name in ("source", "target"):
        return Path(value).name
    if name == "target_id" and model is not None and model.tokenizer is not None and _is_token(row["target"]):
        return f"{value} {model.str_tokens([value])[0]!r}"
    text = "" if value is None else repr(value) if name == "token" else str(value)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _is_token(target: str) -> bool:
    return target in ("embed", "unembed") or ".attn.OV." in target
