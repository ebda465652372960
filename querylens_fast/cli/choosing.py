"""What the commands of relations share: options, the embedded model and dictionaries as defaults, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import querylens_fast as ql
from querylens_fast.cli.console import quiet_loading, say, wide_console
from querylens_fast.cli.flags import Flags, flags_of
from querylens_fast.demo import ASSETS
from querylens_fast.demo.showcase import FIT_SEQUENCES

MAX_CELL = 36
"""Characters shown of a text."""
EMBEDDED_LAYER = 1
"""Layer of the embedded dictionary that commands on one dictionary take by default."""

ManyOption = Annotated[
    list[str] | None, typer.Option("--dictionary", help="Repeat for more. Default: all embedded ones.")
]
FeaturesOption = Annotated[str, typer.Option(help="all, start:stop, or ids like 1,5,9.")]
ShowOption = Annotated[int, typer.Option("--show", help="Rows to show.", min=0)]
HELPS = {
    "features": "all, start:stop, or ids like 1,5,9.",
    "k": "Kept on each side.",
    "out": "The .parquet file to write; a killed run resumes.",
    "transport": "A transport file, for presets that need one.",
    "tuned_lens": "A tuned lens's params.pt, for the preset tuned_lens.",
}


def relation_flags(relation: Callable[..., Any], *names: str, out: str, **helps: str) -> Any:
    """Flags of a relation's own arguments; ``out`` is the default of the file to write."""
    defaults = {"out": out, **({"features": "all"} if "features" in names else {})}
    return flags_of(relation, *names, "out", defaults=defaults, helps={**HELPS, **helps})


def chosen_model(given: bool, *, model: str | None = None, device: str = "cpu", dtype: str = "float32") -> Any:
    """The model, or the embedded one where no dictionary is given either.

    Args:
        given: Whether a dictionary is given.
        model: Local folder or hub id, by default the embedded model.
        device: cpu, cuda, cuda:1, …
        dtype: float32, float64, bfloat16 or float16.
    """
    if (model is None) == given:
        raise ValueError("give both --model and --dictionary, or neither for the embedded ones")
    quiet_loading()
    return ql.load_model(ASSETS / "model" if model is None else model, device=device, dtype=dtype)


def chosen_dictionary(*, dictionary: str | None = None, sae_id: str | None = None, layer: int | None = None) -> Any:
    """A dictionary, or the embedded one of a layer.

    Args:
        dictionary: Folder, file or release, by default the embedded one of --layer.
        sae_id: The id within a release.
        layer: Where the dictionary does not say.
    """
    if dictionary is not None:
        return ql.load_dictionary(dictionary, sae_id, layer)
    return ql.load_dictionary(ASSETS / f"sae_layer{EMBEDDED_LAYER if layer is None else layer}")


MODEL, ONE = flags_of(chosen_model), flags_of(chosen_dictionary)


def chosen_pair(model: Flags, dictionary: Flags) -> tuple[Any, Any]:
    """(model, dictionary) that `MODEL` and `ONE` name."""
    return chosen_model(dictionary["dictionary"] is not None, **model), chosen_dictionary(**dictionary)


def chosen_dictionaries(dictionaries: Sequence[str] | None) -> list[Any]:
    """The dictionaries given, or all embedded ones."""
    embedded = [*sorted(ASSETS.glob("sae_layer*")), *sorted(ASSETS.glob("transcoder_layer*"))]
    return [ql.load_dictionary(d) for d in dictionaries or embedded]


def sample_for(model: Any, tokens: str | None, missing: str) -> Any:
    """The token sample given, or with the embedded model its own; else a ValueError that says ``missing``."""
    if tokens is not None:
        return ql.load_tokens(tokens, model=model)
    if model.name != str(ASSETS / "model"):
        raise ValueError(missing)
    return ql.load_tokens(ASSETS / "tokens.safetensors", model=model).head(FIT_SEQUENCES)


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
