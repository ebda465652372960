"""Commands of `querylens_fast.relations` that explain features: WeightLens, output features, attention, channels.

As in `relating`: one Parquet table each, its first rows shown, and the embedded model by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from querylens_fast.cli.choosing import (
    FeaturesOption,
    LayerOption,
    ManyOption,
    ModelOption,
    OneOption,
    OutOption,
    SaeIdOption,
    ShowOption,
    TransportOption,
    TunedLensOption,
    chosen_dictionaries,
    chosen_dictionary,
    chosen_model,
    chosen_pair,
    report,
)
from querylens_fast.cli.console import DeviceOption, DtypeOption, reported_errors, say, wide_console


def weight_lens(
    model: ModelOption = None,
    dictionary: ManyOption = None,
    features: FeaturesOption = "all",
    earlier: Annotated[list[str] | None, typer.Option(help="Dictionaries that are read only; repeat.")] = None,
    token_z: Annotated[float, typer.Option(help="Tokens count above this z-score.")] = 5.5,
    feature_z: Annotated[float, typer.Option(help="Earlier features count above this z-score.")] = 4.0,
    top_tokens: Annotated[int, typer.Option(help="Largest scores of a feature that z is taken in.")] = 1000,
    top_features: Annotated[int, typer.Option(help="The same, of each earlier dictionary.")] = 100,
    validate: Annotated[bool, typer.Option(help="Accept only tokens that activate the feature behind BOS.")] = True,
    bos_token_id: Annotated[int | None, typer.Option(help="Default: the tokenizer's, else the model's.")] = None,
    out: OutOption = Path("weight_lens.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    show: ShowOption = 10,
) -> None:
    """WeightLens: tokens and earlier features that stand out in a feature's weights; shows the descriptions."""
    with reported_errors():
        import querylens_fast as ql

        loaded = chosen_model(model, bool(dictionary), device, dtype)
        found = ql.weight_lens(
            chosen_dictionaries(dictionary),
            loaded,
            earlier=earlier or (),
            thresholds=ql.WeightLensThresholds(token_z, top_tokens, feature_z, top_features),
            validate=validate,
            bos_token_id=bos_token_id,
            features=None if features == "all" else features,
            out=out,
        )
        report(found, show, shown=ql.weight_descriptions(found))


def output_features(
    model: ModelOption = None,
    dictionary: OneOption = None,
    sae_id: SaeIdOption = None,
    layer: LayerOption = None,
    features: FeaturesOption = "all",
    preset: Annotated[str, typer.Option(help="A value preset of `signatures`.")] = "logit_lens_value",
    transport: TransportOption = None,
    tuned_lens: TunedLensOption = None,
    k: Annotated[int, typer.Option(help="Highest tokens that are compared.")] = 10,
    level: Annotated[float, typer.Option(help="Quantile of random directions that is the threshold.")] = 0.99,
    out: OutOption = Path("output_features.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    show: ShowOption = 10,
) -> None:
    """Which features predict output tokens; shows those that do, the most peaked first."""
    with reported_errors():
        import pyarrow.compute as pc

        import querylens_fast as ql

        loaded, source = chosen_pair(model, dictionary, sae_id, layer, device, dtype)
        found = ql.output_features(
            source,
            loaded,
            preset=preset,
            transport=transport,
            tuned_lens=tuned_lens,
            k=k,
            level=level,
            features=features,
            out=out,
        )
        columns = ["source_id", "kurtosis", "top_mass", "string_similarity", "embedding_similarity"]
        table = found.table([*columns, "predicts", "tokens"]).filter(pc.field("predicts"))
        say(f"{len(table)} of {len(found)} features predict tokens")
        report(found, show, shown=table.sort_by([("kurtosis", "descending")]).drop_columns("predicts"))


def attention_pairs(
    attention_layer: Annotated[int, typer.Option(help="Layer of the attention.")],
    model: ModelOption = None,
    dictionary: OneOption = None,
    sae_id: SaeIdOption = None,
    layer: LayerOption = None,
    other: Annotated[
        str | None, typer.Option(help="The other dictionary. Default: QK the same, OV the embedded one.")
    ] = None,
    circuit: Annotated[str, typer.Option(help="QK or OV.")] = "QK",
    head: Annotated[list[int] | None, typer.Option(help="Query head; repeat. Default: all.")] = None,
    per: Annotated[str, typer.Option(help="Rank pairs of every head, or of every feature in it.")] = "head",
    features: FeaturesOption = "all",
    k: Annotated[int, typer.Option(help="Pairs on each side.")] = 32,
    out: OutOption = Path("attention_pairs.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    show: ShowOption = 10,
) -> None:
    """Pairs of features that a head's QK or OV circuit joins."""
    with reported_errors():
        import querylens_fast as ql

        loaded, source = chosen_pair(model, dictionary, sae_id, layer, device, dtype)
        behind = chosen_dictionary(None, None, attention_layer) if circuit == "OV" and dictionary is None else None
        found = ql.attention_pairs(
            source,
            loaded,
            layer=attention_layer,
            circuit=circuit,  # type: ignore[arg-type]
            heads=head or None,
            other=other or behind,
            k=k,
            per=per,  # type: ignore[arg-type]
            features=features,
            out=out,
        )
        report(found, show, shown=_without(found.head(show), "circuit", "attention_layer"))


def attention_profiles(
    model: ModelOption = None,
    dictionary: ManyOption = None,
    attention_layer: Annotated[list[int] | None, typer.Option(help="Repeat for more. Default: all.")] = None,
    out: OutOption = Path("attention_profiles.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    show: ShowOption = 10,
) -> None:
    """How strongly features that predict tokens, and the others, take part in each head."""
    with reported_errors():
        import querylens_fast as ql

        loaded = chosen_model(model, bool(dictionary), device, dtype)
        found = ql.attention_profiles(chosen_dictionaries(dictionary), loaded, layers=attention_layer or None, out=out)
        report(found, show, shown=_without(found.head(show), "mean", "deviation", "q05", "q95"))


def channels(
    model: ModelOption = None,
    dictionary: ManyOption = None,
    transport: Annotated[Path | None, typer.Option(help="With the value side's first-order terms.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Or fit them on this sample. Default: the embedded one.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the maps. Default: d_model // layers.")] = None,
    sweep: Annotated[list[int] | None, typer.Option(help="Also test maps of this rank; repeat.")] = None,
    n_permutations: Annotated[int, typer.Option(help="Of the test.", min=0)] = 10_000,
    pictures: Annotated[Path | None, typer.Option(help="Folder for the pictures of each space.")] = None,
    out: OutOption = Path("channels.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Subspace channels: do maps into one layer read and write one subspace?"""
    with reported_errors():
        import querylens_fast as ql
        from querylens_fast.relations.channels import SPACES
        from querylens_fast.relations.drawing import draw_channels
        from querylens_fast.relations.flow import site

        loaded = chosen_model(model, bool(dictionary), device, dtype)
        given = chosen_dictionaries(dictionary)
        given = given if dictionary else [d for d in given if site(d) == "residual"]
        fitted = _first_order(loaded, transport, tokens)
        found = ql.subspace_channels(given, loaded, fitted, rank=rank, out=out)
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

    import querylens_fast as ql
    from querylens_fast.relations.channels import SPACES

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
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS
    from querylens_fast.demo.showcase import FIT_SEQUENCES

    if transport is not None and tokens is not None:
        raise ValueError("give --transport, or --tokens to fit one on, not both")
    if transport is not None:
        return transport
    if tokens is None and model.name != str(ASSETS / "model"):
        raise ValueError("channels are of mean Jacobians: give --transport, or --tokens to fit them on")
    sample = ql.load_tokens(tokens or ASSETS / "tokens.safetensors", model=model)
    sample = sample.head(FIT_SEQUENCES) if tokens is None else sample
    return ql.fit_transport(model, sample, sides=("value",), orders=("first_order",))


def _without(table: Any, *columns: str) -> Any:
    return table.drop_columns(list(columns))
