"""Commands of `querylens_fast.relations`: what reads a feature, and which features talk to which.

Each writes one Parquet table and shows its first rows. Without --model and --dictionary they take the embedded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from querylens_fast.cli.console import DeviceOption, DtypeOption, quiet_loading, reported_errors, say, wide_console

EMBEDDED_LAYER = 1
"""Of the embedded dictionary that commands on one dictionary take."""

ModelOption = Annotated[str | None, typer.Option(help="Local folder or hub id. Default: the embedded model.")]
OneOption = Annotated[
    str | None, typer.Option(help="What `signatures` takes as one. Default: the embedded one of --layer.")
]
ManyOption = Annotated[
    list[str] | None, typer.Option("--dictionary", help="Repeat for more. Default: all embedded ones.")
]
SaeIdOption = Annotated[str | None, typer.Option(help="The id within a release.")]
LayerOption = Annotated[int | None, typer.Option(help="Where the dictionary does not say.")]
FeaturesOption = Annotated[str, typer.Option(help="all, start:stop, or ids like 1,5,9.")]
KOption = Annotated[int, typer.Option(help="Kept on each side.")]
ShowOption = Annotated[int, typer.Option("--show", help="Rows to show.")]
OutOption = Annotated[Path, typer.Option(help="The .parquet file to write; a killed run resumes.")]
TargetsOption = Annotated[list[str], typer.Option(help="Weight name, pattern with *, or dictionary; repeat for more.")]
TransportOption = Annotated[
    Path | None, typer.Option(help="Transport file with first-order terms: features are carried to the target first.")
]
CarryOption = Annotated[
    str, typer.Option(help="direct, or first_order or full: fitted on --tokens up to the target's layer.")
]
TokensOption = Annotated[str | None, typer.Option(help="Sample for --carry. Default: with the embedded model its own.")]


def downstream(
    targets: TargetsOption = ["blocks.*.mlp.W_*"],  # noqa: B006
    model: ModelOption = None,
    dictionary: OneOption = None,
    sae_id: SaeIdOption = None,
    layer: LayerOption = None,
    features: FeaturesOption = "all",
    k: KOption = 32,
    transport: TransportOption = None,
    carry: CarryOption = "direct",
    tokens: TokensOption = None,
    out: OutOption = Path("downstream.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    show: ShowOption = 10,
) -> None:
    """What reads each feature: neurons, heads, OV circuits, other dictionaries' features."""
    with reported_errors():
        import querylens_fast as ql

        loaded, source = _one(model, dictionary, sae_id, layer, device, dtype)
        carrier = _carrier(loaded, source, "value", transport, carry, tokens)
        found = ql.downstream(
            source, loaded, targets=_targets(targets), k=k, features=features, transport=carrier, out=out
        )
        _report(found, show, loaded)


def upstream(
    targets: TargetsOption = ["blocks.*.mlp.W_out"],  # noqa: B006
    model: ModelOption = None,
    dictionary: OneOption = None,
    sae_id: SaeIdOption = None,
    layer: LayerOption = None,
    features: FeaturesOption = "all",
    k: KOption = 32,
    transport: TransportOption = None,
    carry: CarryOption = "direct",
    tokens: TokensOption = None,
    out: OutOption = Path("upstream.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    show: ShowOption = 10,
) -> None:
    """What writes what each feature reads: neurons, heads, OV circuits, other dictionaries' features."""
    with reported_errors():
        import querylens_fast as ql

        loaded, source = _one(model, dictionary, sae_id, layer, device, dtype)
        carrier = _carrier(loaded, source, "key", transport, carry, tokens)
        found = ql.upstream(
            source, loaded, targets=_targets(targets), k=k, features=features, transport=carrier, out=out
        )
        _report(found, show, loaded)


def flow(
    dictionary: ManyOption = None,
    k: KOption = 8,
    out: OutOption = Path("flow.parquet"),
    device: DeviceOption = "cpu",
    show: ShowOption = 10,
) -> None:
    """Feature flow: cosine matches of every feature in the dictionaries before and after it."""
    with reported_errors():
        import querylens_fast as ql

        _report(ql.feature_flow(_many(dictionary), k=k, device=device, out=out), show)


def chains(
    dictionary: ManyOption = None,
    threshold: Annotated[float, typer.Option(help="Smallest cosine that is followed.")] = 0.5,
    mutual: Annotated[bool, typer.Option(help="Follow a match only when it is each other's best.")] = True,
    min_length: Annotated[int, typer.Option(help="Features of the shortest chain kept.")] = 2,
    out: OutOption = Path("chains.parquet"),
    device: DeviceOption = "cpu",
    show: ShowOption = 10,
) -> None:
    """Features followed from layer to layer of the residual stream by their best cosine match."""
    with reported_errors():
        import querylens_fast as ql
        from querylens_fast.relations.flow import site

        given = _many(dictionary)
        given = given if dictionary else [d for d in given if site(d) == "residual"]
        found = ql.feature_chains(
            given, threshold=threshold, mutual=mutual, min_length=min_length, device=device, out=out
        )
        _report(found, show)


def neighbours(
    dictionary: OneOption = None,
    other: Annotated[str | None, typer.Option(help="Search this dictionary instead of itself.")] = None,
    sae_id: SaeIdOption = None,
    layer: LayerOption = None,
    features: FeaturesOption = "all",
    k: KOption = 8,
    threshold: Annotated[float | None, typer.Option(help="Keep only cosines of at least this.")] = None,
    side: Annotated[str, typer.Option(help="value (decoder) or key (encoder).")] = "value",
    out: OutOption = Path("neighbours.parquet"),
    device: DeviceOption = "cpu",
    show: ShowOption = 10,
) -> None:
    """The closest other features of every feature by cosine: duplicates and split features."""
    with reported_errors():
        import querylens_fast as ql

        if side not in ("value", "key"):
            raise ValueError(f"side is {side!r}; expected value or key")
        source = _dictionary(dictionary, sae_id, layer)
        found = ql.neighbours(
            source, other, k=k, threshold=threshold, side=side, features=features, device=device, out=out,  # type: ignore[arg-type]
        )  # fmt: skip
        _report(found, show)


def token_features(
    model: ModelOption = None,
    dictionary: ManyOption = None,
    preset: Annotated[str, typer.Option(help="As for `signatures`.")] = "logit_lens_value",
    transport: Annotated[Path | None, typer.Option(help="A transport file, for presets that need one.")] = None,
    token: Annotated[list[int] | None, typer.Option(help="Token id; repeat. Default: the whole vocabulary.")] = None,
    k: KOption = 32,
    out: OutOption = Path("token_features.parquet"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    show: ShowOption = 10,
) -> None:
    """The features that score highest and lowest for each token, over all dictionaries given."""
    with reported_errors():
        import querylens_fast as ql

        loaded = _model(model, bool(dictionary), device, dtype)
        found = ql.token_features(
            _many(dictionary), loaded, preset=preset, transport=transport, k=k, token_ids=token, out=out
        )
        _report(found, show, loaded)


def _model(model: str | None, given: bool, device: str, dtype: str) -> Any:
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS

    if (model is None) == given:
        raise ValueError("give both --model and --dictionary, or neither for the embedded ones")
    quiet_loading()
    return ql.load_model(ASSETS / "model" if model is None else model, device=device, dtype=dtype)


def _dictionary(dictionary: str | None, sae_id: str | None, layer: int | None) -> Any:
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS

    if dictionary is not None:
        return ql.load_dictionary(dictionary, sae_id, layer)
    return ql.load_dictionary(ASSETS / f"sae_layer{EMBEDDED_LAYER if layer is None else layer}")


def _one(
    model: str | None, dictionary: str | None, sae_id: str | None, layer: int | None, device: str, dtype: str
) -> tuple[Any, Any]:
    return _model(model, dictionary is not None, device, dtype), _dictionary(dictionary, sae_id, layer)


def _many(dictionaries: Sequence[str] | None) -> list[Any]:
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS

    embedded = [*sorted(ASSETS.glob("sae_layer*")), *sorted(ASSETS.glob("transcoder_layer*"))]
    return [ql.load_dictionary(d) for d in dictionaries or embedded]


def _targets(targets: Sequence[str]) -> list[Any]:
    """Names of weights as they are, paths as the dictionaries that lie there."""
    import querylens_fast as ql

    return [ql.load_dictionary(t) if Path(t).exists() else t for t in targets]


def _carrier(model: Any, dictionary: Any, side: Any, transport: Path | None, carry: str, tokens: str | None) -> Any:
    """What carries features to the targets: a transport file, a passage fitted here, or None for the direct path."""
    import querylens_fast as ql
    from querylens_fast.demo import ASSETS
    from querylens_fast.demo.showcase import FIT_SEQUENCES

    if carry not in ("direct", "first_order", "full"):
        raise ValueError(f"carry is {carry!r}; expected direct, first_order or full")
    if transport is not None and (tokens is not None or carry != "direct"):
        raise ValueError("give --transport, or --carry with --tokens, not both")
    if carry == "direct":
        if tokens is not None:
            raise ValueError("--tokens is for --carry first_order or full; the direct path needs none")
        return transport
    embedded = model.name == str(ASSETS / "model")
    if tokens is None and not embedded:
        raise ValueError(f"--carry {carry} is an average over a sample: give --tokens")
    sample = ql.load_tokens(tokens or ASSETS / "tokens.safetensors", model=model)
    sample = sample.head(FIT_SEQUENCES) if tokens is None else sample
    return ql.fit_passage(model, sample, dictionary.point(side), side=side, order=carry)  # type: ignore[arg-type]


def _report(found: Any, show: int, model: Any = None) -> None:
    """The first rows, then where all of them are."""
    from rich.table import Table

    hidden = {"source_layer", "target_layer"}
    rows = found.head(show).to_pylist()
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
    return "" if value is None else repr(value) if name == "token" else str(value)


def _is_token(target: str) -> bool:
    return target in ("embed", "unembed") or ".attn.OV." in target
