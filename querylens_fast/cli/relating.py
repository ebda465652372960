"""Commands of `querylens_fast.relations` on readers, writers and neighbours of features.

Each writes one Parquet table and shows its first rows. Without --model and --dictionary they take the embedded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from querylens_fast.cli.console import reported_errors
from querylens_fast.cli.flags import Flags, flags_of, with_flags
from querylens_fast.relations.flow import site

TargetsOption = Annotated[list[str], typer.Option(help="Weight name, pattern with *, or dictionary; repeat for more.")]
DOWNSTREAM = relation_flags(ql.downstream, "features", "k", out="downstream.parquet")
UPSTREAM = relation_flags(ql.upstream, "features", "k", out="upstream.parquet")
FLOW = relation_flags(ql.feature_flow, "k", "device", out="flow.parquet")
CHAINS = relation_flags(ql.feature_chains, "threshold", "mutual", "min_length", "device", out="chains.parquet")
NEIGHBOURS = relation_flags(ql.neighbours, "features", "k", "threshold", "side", "device", out="neighbours.parquet")
TOKEN_FEATURES = relation_flags(
    ql.token_features, "preset", "transport", "tuned_lens", "k", out="token_features.parquet"
)


def _carrier(
    model: Any,
    dictionary: Any,
    side: Any,
    *,
    transport: str | None = None,
    carry: str = "direct",
    tokens: str | None = None,
) -> Any:
    """What carries features to the targets: a transport file, a passage fitted here, or None for the direct path.

    Args:
        model: The model.
        dictionary: The features.
        side: Whose vectors are carried.
        transport: Transport file with first-order terms: features are carried to the target first.
        carry: direct, or first_order or full: fitted on --tokens up to the target's layer.
        tokens: Sample for --carry, by default with the embedded model its own.
    """
    if carry not in ("direct", "first_order", "full"):
        raise ValueError(f"carry is {carry!r}; expected direct, first_order or full")
    if transport is not None and (tokens is not None or carry != "direct"):
        raise ValueError("give --transport, or --carry with --tokens, not both")
    if carry == "direct":
        if tokens is not None:
            raise ValueError("--tokens is for --carry first_order or full; the direct path needs none")
        return transport
    sample = sample_for(model, tokens, f"--carry {carry} is an average over a sample: give --tokens")
    return ql.fit_passage(model, sample, dictionary.point(side), side=side, order=carry)  # type: ignore[arg-type]


CARRIER = flags_of(_carrier)


@with_flags
def downstream(
    targets: TargetsOption = ["blocks.*.mlp.W_*"],  # noqa: B006
    model: Flags = MODEL,
    dictionary: Flags = ONE,
    asked: Flags = DOWNSTREAM,
    carrier: Flags = CARRIER,
    show: ShowOption = 10,
) -> None:
    """What reads each feature: neurons, heads, OV circuits, other dictionaries' features."""
    with reported_errors():
        loaded, source = chosen_pair(model, dictionary)
        carried = _carrier(loaded, source, "value", **carrier)
        report(ql.downstream(source, loaded, targets=_targets(targets), transport=carried, **asked), show, loaded)


@with_flags
def upstream(
    targets: TargetsOption = ["blocks.*.mlp.W_out"],  # noqa: B006
    model: Flags = MODEL,
    dictionary: Flags = ONE,
    asked: Flags = UPSTREAM,
    carrier: Flags = CARRIER,
    show: ShowOption = 10,
) -> None:
    """What writes what each feature reads: neurons, heads, OV circuits, other dictionaries' features."""
    with reported_errors():
        loaded, source = chosen_pair(model, dictionary)
        carried = _carrier(loaded, source, "key", **carrier)
        report(ql.upstream(source, loaded, targets=_targets(targets), transport=carried, **asked), show, loaded)


@with_flags
def flow(dictionary: ManyOption = None, asked: Flags = FLOW, show: ShowOption = 10) -> None:
    """Feature flow: cosine matches of every feature in the dictionaries before and after it."""
    with reported_errors():
        report(ql.feature_flow(chosen_dictionaries(dictionary), **asked), show)


@with_flags
def chains(dictionary: ManyOption = None, asked: Flags = CHAINS, show: ShowOption = 10) -> None:
    """Features followed from layer to layer of the residual stream by their best cosine match."""
    with reported_errors():
        given = chosen_dictionaries(dictionary)
        given = given if dictionary else [d for d in given if site(d) == "residual"]
        report(ql.feature_chains(given, **asked), show)


@with_flags
def neighbours(
    dictionary: Flags = ONE,
    other: Annotated[str | None, typer.Option(help="Search this dictionary instead of itself.")] = None,
    asked: Flags = NEIGHBOURS,
    show: ShowOption = 10,
) -> None:
    """The closest other features of every feature by cosine: duplicates and split features."""
    with reported_errors():
        if asked["side"] not in ("value", "key"):
            raise ValueError(f"side is {asked['side']!r}; expected value or key")
        report(ql.neighbours(chosen_dictionary(**dictionary), other, **asked), show)


@with_flags
def token_features(
    dictionary: ManyOption = None,
    token: Annotated[list[int] | None, typer.Option(help="Token id; repeat. Default: the whole vocabulary.")] = None,
    model: Flags = MODEL,
    asked: Flags = TOKEN_FEATURES,
    show: ShowOption = 10,
) -> None:
    """The features that score highest and lowest for each token, over all dictionaries given."""
    with reported_errors():
        loaded = chosen_model(bool(dictionary), **model)
        found = ql.token_features(chosen_dictionaries(dictionary), loaded, token_ids=token, **asked)
        report(found, show, loaded)


def _targets(targets: Sequence[str]) -> list[Any]:
    """Names of weights as they are, paths as the dictionaries that lie there."""
    return [ql.load_dictionary(t) if Path(t).exists() else t for t in targets]
