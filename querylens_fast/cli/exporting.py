"""Commands that write other tools' files from dictionaries and results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from querylens_fast.cli.choosing import FeaturesOption
from querylens_fast.cli.console import DeviceOption, DtypeOption, quiet_loading, reported_errors, say

FORMATS = ("neuronpedia", "circuit-tracer", "saedashboard", "delphi")
ModelOption = Annotated[str, typer.Option(help="Local folder or hub id.")]
_ROWS = ("features", "unembedding", "dictionary", "rows_per_file", "model_id", "source_set")
USED = {
    "neuronpedia": (*_ROWS, "neighbours", "release", "creator_id", "hook_name", "vectors", "activations", "sample"),
    "circuit-tracer": ("transcoder_id", "unembedding", "activations"),
    "saedashboard": (*_ROWS, "columnar"),
    "delphi": ("hookpoint", "features", "neighbours"),
}
"""The options of `export` that a format uses, beside those that all use."""


def export(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(help="Dictionary (folder, file, release) or result (.parquet, .jsonl); several for layers."),
    ],
    format: Annotated[str, typer.Option(help=", ".join(FORMATS) + ".")],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The folder to write into; a killed export resumes.")],
    model_id: Annotated[str, typer.Option(help="Neuronpedia's name of the model, such as gpt2-small.")] = "",
    source_set: Annotated[str, typer.Option(help="Name of the set of dictionaries, such as res-jb.")] = "",
    release: Annotated[str | None, typer.Option(help="neuronpedia: name of the release.")] = None,
    creator_id: Annotated[str | None, typer.Option(help="neuronpedia: an existing user's id.")] = None,
    hook_name: Annotated[str | None, typer.Option(help="neuronpedia: where steering adds the vector.")] = None,
    dictionary: Annotated[str | None, typer.Option(help="Of a result: its dictionary, for vectors.")] = None,
    features: FeaturesOption = "all",
    k: Annotated[int, typer.Option(help="Tokens on each side.")] = 10,
    unembedding: Annotated[str, typer.Option(help="Of dictionaries: raw or folded.")] = "raw",
    vectors: Annotated[bool, typer.Option(help="neuronpedia: write the features' vectors.")] = True,
    neighbours: Annotated[int | None, typer.Option(help="Neighbours: neuronpedia 10, delphi 250; 0: none.")] = None,
    activations: Annotated[
        Path | None, typer.Option(help="neuronpedia, circuit-tracer: a feature list with texts.")
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="neuronpedia: a feature sample (.parquet).")] = None,
    rows_per_file: Annotated[int | None, typer.Option(help="Features a file.")] = None,
    columnar: Annotated[bool, typer.Option(help="saedashboard: tables instead of batch files.")] = False,
    transcoder_id: Annotated[str, typer.Option(help="circuit-tracer: name of the set.")] = "",
    hookpoint: Annotated[str, typer.Option(help="delphi: its name of the place, such as layers.6.")] = "",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Write the files of Neuronpedia, circuit-tracer, SAEDashboard or delphi."""
    with reported_errors():
        import querylens_fast as ql

        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; expected {', '.join(FORMATS)}")
        if format != "circuit-tracer" and len(sources) != 1:
            raise ValueError(f"--format {format} takes one dictionary or result; {len(sources)} are given")
        _refuse_unused(context, format)
        quiet_loading()
        loaded = ql.load_model(model, device=device, dtype=dtype)
        given: dict[str, Any] = {"k": k, "unembedding": unembedding}
        if format == "circuit-tracer":
            by_layer = _by_layer(sources)
            given |= {"transcoder_id": _needed("transcoder-id", transcoder_id, format), "activations": activations}
            target = ql.export_circuit_tracer(by_layer, out, model=loaded, **given)
            say(f"{len(by_layer)} layers; features_dir for circuit-tracer: {target.resolve()}")
            return
        if format == "delphi":
            _delphi(sources[0], loaded, out, _needed("hookpoint", hookpoint, format), k, neighbours, features)
            return
        given |= {"features": None if features == "all" else features, "dictionary": dictionary}
        if rows_per_file is not None:
            given["rows_per_file"] = rows_per_file
        if format == "saedashboard":
            written = ql.export_saedashboard(
                sources[0],
                loaded,
                out,
                into="columnar" if columnar else "batch-*.json",
                model_id=model_id,
                sae_set=source_set,
                **given,
            )
            say(f"{len(written)} files: {out.resolve()}")
            return
        given |= {"neighbours": neighbours, "creator_id": creator_id}
        target = ql.export_neuronpedia(
            sources[0],
            loaded,
            out,
            model_id=_needed("model-id", model_id, format),
            source_set=_needed("source-set", source_set, format),
            release=release,
            hook_name=hook_name,
            vectors=vectors,
            activations=activations,
            sample=sample,
            progress=True,
            **{name: value for name, value in given.items() if value is not None},
        )
        say(f"Neuronpedia folder; into a local one with `psql -f import.sql` there: {target.resolve()}")


def annotate_graph(
    graph: Annotated[Path, typer.Argument(help="An attribution graph of circuit-tracer (.json).")],
    model: ModelOption,
    values: Annotated[list[str] | None, typer.Option(help="Result of value signatures; repeat for layers.")] = None,
    keys: Annotated[list[str] | None, typer.Option(help="Result of key signatures; repeat for layers.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write. Default: the graph itself.")] = None,
    k: Annotated[int, typer.Option(help="Tokens on each side.")] = 10,
    overwrite: Annotated[bool, typer.Option(help="Replace labels that nodes have already.")] = False,
) -> None:
    """Fill an attribution graph's feature nodes: label, top outputs (values) and top inputs (keys)."""
    with reported_errors():
        import querylens_fast as ql

        quiet_loading()
        done = ql.annotate_graph(
            graph,
            values=_by_layer(values or []),
            keys=_by_layer(keys or []),
            model=ql.load_model(model),
            k=k,
            overwrite=overwrite,
            out=out,
        )
        say(f"{done.labelled} feature nodes labelled, {done.unknown} in no result: {done.path.resolve()}")


def _delphi(source: str, model: Any, out: Path, hookpoint: str, k: int, neighbours: int | None, features: str) -> None:
    from querylens_fast.integrations.delphi import write_explanations, write_neighbours
    from querylens_fast.lens.storage import FORMATS as RESULTS

    chosen = None if features == "all" else features
    written = write_explanations(source, out / "explanations", hookpoint, model=model, k=k, features=chosen)
    say(f"{len(written)} explanations: {(out / 'explanations').resolve()}")
    if Path(source).suffix in RESULTS:
        say("a result holds no vectors: for neighbours, export its dictionary")
    elif neighbours != 0:
        for method in ("encoder_similarity", "decoder_similarity"):
            path = write_neighbours(source, out / "neighbours", hookpoint, method, neighbours or 250)
            say(f"neighbours: {path.resolve()}")


def _refuse_unused(context: typer.Context, format: str) -> None:
    """Raise ValueError for an option that was given and that the format would leave out of account."""
    for name in sorted({name for used in USED.values() for name in used} - set(USED[format])):
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT":
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --format {format}")


def _needed(name: str, value: str, format: str) -> str:
    if not value:
        raise ValueError(f"--format {format} needs --{name}")
    return value


def _by_layer(sources: list[str]) -> dict[int, Any]:
    """Results and dictionaries by the layer that they say."""
    import querylens_fast as ql
    from querylens_fast.lens.storage import FORMATS as RESULTS
    from querylens_fast.lens.storage import read_identity

    found: dict[int, Any] = {}
    for source in sources:
        given: Any = source if Path(source).suffix in RESULTS else ql.load_dictionary(source)
        layer = read_identity(source).get("layer", -1) if given is source else given.layer
        if layer in found:
            raise ValueError(f"{source!r} is of layer {layer}, as one before it; give one for each layer")
        found[layer] = given
    return found
