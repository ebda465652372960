"""Commands of `querylens_fast.relations` that explain features: WeightLens, output features, attention, channels.

As in `relating`: one Parquet table each, its first rows shown, and the embedded model by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import querylens_fast as ql
from querylens_fast.cli.choosing import (
    MODEL,
    ONE,
    ManyOption,
    ShowOption,
    chosen_dictionaries,
    chosen_dictionary,
    chosen_model,
    chosen_pair,
    relation_flags,
    report,
    sample_for,
)
from querylens_fast.cli.console import reported_errors, say, wide_console
from querylens_fast.cli.flags import Flags, with_flags
from querylens_fast.relations.channels import SPACES
from querylens_fast.relations.flow import site

WEIGHT_LENS = relation_flags(ql.weight_lens, "validate", "bos_token_id", "features", out="weight_lens.parquet")
OUTPUT_FEATURES = relation_flags(
    ql.output_features,
    *("preset", "transport", "tuned_lens", "k", "level", "features"),
    out="output_features.parquet",
    preset="A value preset of signatures.",
    k="Highest tokens that are compared.",
)
PAIRS = relation_flags(
    ql.attention_pairs,
    *("circuit", "per", "features", "k"),
    out="attention_pairs.parquet",
    k="Pairs on each side.",
    per="Rank the pairs of every head, or of every feature in it (feature).",
)
PROFILES = relation_flags(ql.attention_profiles, out="attention_profiles.parquet")
CHANNELS = relation_flags(
    ql.subspace_channels, "rank", out="channels.parquet", rank="Of the maps. Default: d_model // layers."
)


@with_flags
def weight_lens(
    dictionary: ManyOption = None,
    earlier: Annotated[list[str] | None, typer.Option(help="Dictionaries that are read only; repeat.")] = None,
    token_z: Annotated[float, typer.Option(help="Tokens count above this z-score.")] = 5.5,
    feature_z: Annotated[float, typer.Option(help="Earlier features count above this z-score.")] = 4.0,
    top_tokens: Annotated[int, typer.Option(help="Largest scores of a feature that z is taken in.")] = 1000,
    top_features: Annotated[int, typer.Option(help="The same, of each earlier dictionary.")] = 100,
    model: Flags = MODEL,
    asked: Flags = WEIGHT_LENS,
    show: ShowOption = 10,
) -> None:
    """WeightLens: tokens and earlier features that stand out in a feature's weights; shows the descriptions."""
    with reported_errors():
        loaded = chosen_model(bool(dictionary), **model)
        thresholds = ql.WeightLensThresholds(token_z, top_tokens, feature_z, top_features)
        given = chosen_dictionaries(dictionary)
        asked["features"] = None if asked["features"] == "all" else asked["features"]
        found = ql.weight_lens(given, loaded, earlier=earlier or (), thresholds=thresholds, **asked)
        report(found, show, shown=ql.weight_descriptions(found))


@with_flags
def output_features(
    model: Flags = MODEL, dictionary: Flags = ONE, asked: Flags = OUTPUT_FEATURES, show: ShowOption = 10
) -> None:
    """Which features predict output tokens; shows those that do, the most peaked first."""
    with reported_errors():
        import pyarrow.compute as pc

        loaded, source = chosen_pair(model, dictionary)
        found = ql.output_features(source, loaded, **asked)
        columns = ["source_id", "kurtosis", "top_mass", "string_similarity", "embedding_similarity"]
        table = found.table([*columns, "predicts", "tokens"]).filter(pc.field("predicts"))
        say(f"{len(table)} of {len(found)} features predict tokens")
        report(found, show, shown=table.sort_by([("kurtosis", "descending")]).drop_columns("predicts"))


@with_flags
def attention_pairs(
    attention_layer: Annotated[int, typer.Option(help="Layer of the attention.")],
    other: Annotated[
        str | None, typer.Option(help="The other dictionary. Default: QK the same, OV the embedded one.")
    ] = None,
    head: Annotated[list[int] | None, typer.Option(help="Query head; repeat. Default: all.")] = None,
    model: Flags = MODEL,
    dictionary: Flags = ONE,
    asked: Flags = PAIRS,
    show: ShowOption = 10,
) -> None:
    """Pairs of features that a head's QK or OV circuit joins."""
    with reported_errors():
        loaded, source = chosen_pair(model, dictionary)
        embedded_ov = asked["circuit"] == "OV" and dictionary["dictionary"] is None
        behind = chosen_dictionary(layer=attention_layer) if embedded_ov else None
        found = ql.attention_pairs(
            source, loaded, layer=attention_layer, heads=head or None, other=other or behind, **asked
        )
        report(found, show, shown=_without(found.head(show), "circuit", "attention_layer"))


@with_flags
def attention_profiles(
    dictionary: ManyOption = None,
    attention_layer: Annotated[list[int] | None, typer.Option(help="Repeat for more. Default: all.")] = None,
    model: Flags = MODEL,
    asked: Flags = PROFILES,
    show: ShowOption = 10,
) -> None:
    """How strongly features that predict tokens, and the others, take part in each head."""
    with reported_errors():
        loaded = chosen_model(bool(dictionary), **model)
        found = ql.attention_profiles(chosen_dictionaries(dictionary), loaded, layers=attention_layer or None, **asked)
        report(found, show, shown=_without(found.head(show), "mean", "deviation", "q05", "q95"))


@with_flags
def channels(
    dictionary: ManyOption = None,
    transport: Annotated[Path | None, typer.Option(help="With the value side's first-order terms.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Or fit them on this sample. Default: the embedded one.")] = None,
    sweep: Annotated[list[int] | None, typer.Option(help="Also test maps of this rank; repeat.")] = None,
    n_permutations: Annotated[int, typer.Option(help="Of the test.", min=0)] = 10_000,
    pictures: Annotated[Path | None, typer.Option(help="Folder for the pictures of each space.")] = None,
    model: Flags = MODEL,
    asked: Flags = CHANNELS,
) -> None:
    """Subspace channels: do maps into one layer read and write one subspace?"""
    with reported_errors():
        from querylens_fast.relations.drawing import draw_channels

        loaded = chosen_model(bool(dictionary), **model)
        given = chosen_dictionaries(dictionary)
        given = given if dictionary else [d for d in given if site(d) == "residual"]
        fitted = _first_order(loaded, transport, tokens)
        found = ql.subspace_channels(given, loaded, fitted, **asked)
        _show_tests(found, n_permutations)
        if sweep:
            swept = ql.channel_sweep([(given, loaded, fitted)], sweep, n_permutations=n_permutations, progress=True)
            _show_sweep(swept)
        if pictures is not None:
            for space in SPACES:
                for path in draw_channels(found, pictures, space):
                    say(f"{path.resolve()}")
        say(f"{len(found)} rows: {found.path.resolve()}")  # type: ignore[union-attr]


def _show_tests(found: Any, n_permutations: int) -> None:
    from rich.table import Table

    table = Table()
    for name in (
        "space",
        "maps that share their",
        "OL same",
        "OL different",
        "OL random",
        "p",
        "AUC",
        "Spearman",
        "p ",
    ):
        table.add_column(name)
    for space in SPACES:
        for shares in ("destination", "source"):
            try:
                test = ql.channel_test(found, shares=shares, space=space, n_permutations=n_permutations)
                table.add_row(space, shares, *("" if x is None else f"{x:.4f}" for x in test))
            except ValueError as error:  # of few maps: none share it, or all do
                table.add_row(space, shares, str(error))
    wide_console(120).print(table, markup=False)


def _show_sweep(swept: Any) -> None:
    """One line per rank, space and shared end."""
    from rich.table import Table

    names = ("rank", "space", "shares", "same", "different", "p_value", "auc", "held_out_error", "held_out_cosine")
    table = Table(*names)
    for row in swept.table().to_pylist():
        table.add_row(*("" if row[n] is None else str(row[n]) if n in names[:3] else f"{row[n]:.4f}" for n in names))
    wide_console(120).print(table, markup=False)


def _first_order(model: Any, transport: Path | None, tokens: str | None) -> Any:
    """The transport given, or one fitted here."""
    if transport is not None and tokens is not None:
        raise ValueError("give --transport, or --tokens to fit one on, not both")
    if transport is not None:
        return transport
    sample = sample_for(model, tokens, "channels are of mean Jacobians: give --transport, or --tokens to fit them on")
    return ql.fit_transport(model, sample, sides=("value",), orders=("first_order",))


def _without(table: Any, *columns: str) -> Any:
    return table.drop_columns(list(columns))
