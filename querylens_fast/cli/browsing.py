"""Commands that read results: one feature, the features whose signature holds a token, and whether a file is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from querylens_fast.cli.console import reported_errors, say, wide_console

ResultArgument = Annotated[Path, typer.Argument(help="A .parquet or .jsonl result of `signatures`.")]
ModelOption = Annotated[str | None, typer.Option(help="Whose tokenizer to use, for a result without token strings.")]


def show(
    result: ResultArgument,
    feature: Annotated[int, typer.Argument(help="Feature id.")],
    model: ModelOption = None,
) -> None:
    """The signature of one feature: its top and bottom tokens with their scores."""
    with reported_errors():
        from rich.table import Table

        from querylens_fast.lens.search import show as rows_of
        from querylens_fast.lens.storage import read_identity

        preset = read_identity(result).get("preset", "")
        rows = rows_of(result, feature, model=model)
    for row in rows:
        table = Table(title=f"feature {feature}, layer {row['layer']}, {preset}")
        for side in ("top", "bottom"):
            table.add_column(f"{side} token")
            table.add_column("score", justify="right")
        sides = [_cells(row, side) for side in ("top", "bottom")]
        for (token, score), (low_token, low_score) in zip(*sides, strict=True):
            table.add_row(token, f"{score:.4f}", low_token, f"{low_score:.4f}")
        wide_console(100).print(table, markup=False)
        for name in ("rel_var", "rel_var_se", "transition"):
            if name in row:
                say(f"{name}: {row[name]}")


def search(
    result: ResultArgument,
    token: Annotated[str, typer.Argument(help="A token, found with and without a leading space.")] = "",
    id: Annotated[int | None, typer.Option(help="A token id instead.", min=0)] = None,
    side: Annotated[str, typer.Option(help="top, bottom or both.")] = "both",
    exact: Annotated[bool, typer.Option(help="Take the token as it is, leading space or none.")] = False,
    limit: Annotated[int, typer.Option(help="Features to show a side.", min=0)] = 20,
    model: ModelOption = None,
) -> None:
    """The features whose signatures hold a token, ranked by its score."""
    with reported_errors():
        from rich.table import Table

        from querylens_fast.lens.search import SIDES, ranked_hits, tokens_like
        from querylens_fast.lens.search import show as rows_of

        if (id is None) == (token == ""):
            raise ValueError("give a token or --id, one of the two")
        if side not in ("top", "bottom", "both"):
            raise ValueError(f"side is {side!r}; expected top, bottom or both")
        wanted: Any = token if id is None else id
        sides = SIDES if side == "both" else (side,)
        found = [ranked_hits(result, wanted, one, exact=exact, model=model) for one in sides]
        if id is None and model is None and not any(len(features) for features, *_ in found):
            like = ", ".join(map(repr, tokens_like(result, token)))
            raise ValueError(f"no signature holds {token!r}" + (f"; tokens like it: {like}" if like else ""))
    for one, columns in zip(sides, found, strict=True):
        say(f"{len(columns[0])} features have it among their {one} tokens")
        table = Table()
        for name in ("feature", "layer", "score", "rank", "token"):
            table.add_column(name, justify="right")
        names: dict[int, str] = {}
        for feature, layer, score, rank, token_id in zip(*(c[:limit].tolist() for c in columns), strict=True):
            if token_id not in names:
                row = next(row for row in rows_of(result, feature, model=model) if row["layer"] == layer)
                names[token_id] = _cells(row, one)[rank][0]
            table.add_row(str(feature), str(layer), f"{score:.4f}", str(rank + 1), names[token_id])
        wide_console(100).print(table, markup=False)


def verify(
    results: Annotated[list[Path], typer.Argument(help="Results of any command, Parquet or JSONL.")],
) -> None:
    """Compare results with the digests written with them; exit code 1 when one is damaged, edited or incomplete."""
    with reported_errors():
        from querylens_fast.lens.storage import is_checked
        from querylens_fast.lens.storage import verify as problems_of

        found = {path: problems_of(path) for path in results}
        for path, problems in found.items():
            note = "" if problems or is_checked(path) else " (an earlier version wrote no digests: it can be decoded)"
            say("\n".join(problems) if problems else f"{path}: as it was written{note}")
    if any(found.values()):
        raise typer.Exit(1)


def _cells(row: dict[str, Any], side: str) -> list[tuple[str, float]]:
    """(token, score) of one side; the token as text with marks for spaces, or as its id where there are no strings."""
    ids, scores = row[f"{side}_ids"], row[f"{side}_scores"]
    tokens = row.get(f"{side}_tokens")
    names = [str(i) for i in ids] if tokens is None else [_visible(t) for t in tokens]
    return list(zip(names, scores, strict=True))


def _visible(token: str) -> str:
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "→")
