"""Commands of `querylens_fast.relations` on readers, writers and neighbours of features.

Each writes one Parquet table and shows its first rows. Without --model and --dictionary they take the embedded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from querylens_fast.cli.choosing import (
    FeaturesOption,
    KOption,
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
from querylens_fast.cli.console import DeviceOption, DtypeOption, reported_errors

TargetsOption = Annotated[list[str], typer.Option(help="Weight name, pattern with *, or dictionary; repeat for more.")]
CarrierOption = Annotated[
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
    transport: CarrierOption = None,
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

        loaded, source = chosen_pair(model, dictionary, sae_id, layer, device, dtype)
        carrier = _carrier(loaded, source, "value", transport, carry, tokens)
        found = ql.downstream(
            source, loaded, targets=_targets(targets), k=k, features=features, transport=carrier, out=out
        )
        report(found, show, loaded)


def upstream(
    targets: TargetsOption = ["blocks.*.mlp.W_out"],  # noqa: B006
    model: ModelOption = None,
    dictionary: OneOption = None,
    sae_id: SaeIdOption = None,
    layer: LayerOption = None,
    features: FeaturesOption = "all",
    k: KOption = 32,
    transport: CarrierOption = None,
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

        loaded, source = chosen_pair(model, dictionary, sae_id, layer, device, dtype)
        carrier = _carrier(loaded, source, "key", transport, carry, tokens)
        found = ql.upstream(
            source, loaded, targets=_targets(targets), k=k, features=features, transport=carrier, out=out
        )
        report(found, show, loaded)


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

        report(ql.feature_flow(chosen_dictionaries(dictionary), k=k, device=device, out=out), show)


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

        given = chosen_dictionaries(dictionary)
        given = given if dictionary else [d for d in given if site(d) == "residual"]
        found = ql.feature_chains(
            given, threshold=threshold, mutual=mutual, min_length=min_length, device=device, out=out
        )
        report(found, show)


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
        source = chosen_dictionary(dictionary, sae_id, layer)
        found = ql.neighbours(
            source, other, k=k, threshold=threshold, side=side, features=features, device=device, out=out,  # type: ignore[arg-type]
        )  # fmt: skip
        report(found, show)


def token_features(
    model: ModelOption = None,
    dictionary: ManyOption = None,
    preset: Annotated[str, typer.Option(help="As for `signatures`.")] = "logit_lens_value",
    transport: TransportOption = None,
    tuned_lens: TunedLensOption = None,
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

        loaded = chosen_model(model, bool(dictionary), device, dtype)
        found = ql.token_features(
            chosen_dictionaries(dictionary),
            loaded,
            preset=preset,
            transport=transport,
            tuned_lens=tuned_lens,
            k=k,
            token_ids=token,
            out=out,
        )
        report(found, show, loaded)


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
