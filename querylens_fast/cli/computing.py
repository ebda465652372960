"""Commands that compute: a transport, the signatures of a dictionary, the reference's run, any product."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from querylens_fast.cli.console import (
    DeviceOption,
    DtypeOption,
    LinearisationOption,
    MemoryOption,
    quiet_loading,
    reported_errors,
    say,
)
from querylens_fast.runs import processes as ranks
from querylens_fast.runs.run_lock import held


def run(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings over the config's.")] = None,
    config_name: Annotated[
        str, typer.Option("--config-name", "-cn", help="gpt2-small, gemma3-1b, qwen3-0.6b, … or a YAML file.")
    ] = "gpt2-small",
    config_path: Annotated[
        Path | None, typer.Option("--config-path", "-cp", help="Folder of your own YAML configs.")
    ] = None,
) -> None:
    """The reference's run: one preset over a list of features or a whole dictionary, resumable."""
    with reported_errors():
        from querylens_fast.analysis.run import run as run_config

        path = run_config(config_name, overrides or [], config_path)
    say(f"results: {Path(path).resolve()}")


def transport(
    model: Annotated[str, typer.Argument(help="Local folder or hub id.")],
    tokens: Annotated[str, typer.Argument(help="Token file, text file or dataset name.")],
    out: Annotated[Path, typer.Option(help="The transport file to write.")] = Path("transport.safetensors"),
    num_samples: Annotated[int | None, typer.Option(help="Sequences to draw.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a sequence, for text.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the draw and the probes.")] = 42,
    energy: Annotated[str, typer.Option(help="none, probes or exact: what rel_var needs.")] = "none",
    n_probes: Annotated[int, typer.Option(help="Sign probes a sequence.")] = 64,
    groups: Annotated[int, typer.Option(help="Groups of sequences to keep, for standard errors: 8 is usual.")] = 1,
    until: Annotated[
        float | None, typer.Option(help="Take sequences until top tokens agree between halves, e.g. 0.85.")
    ] = None,
    k: Annotated[int, typer.Option(help="Top tokens that --until compares.")] = 25,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    linearisation: LinearisationOption = "auto",
    max_memory_gib: MemoryOption = 2.0,
) -> None:
    """Fit a model's transport once, for every dictionary of it."""
    with reported_errors(), ranks.joined() as group, held(out) if group.leads else nullcontext():
        import querylens_fast as ql

        if out.is_dir():
            raise ValueError(f"out is {str(out)!r}, a folder; expected the file to write")
        quiet_loading()
        loaded = ql.load_model(model, device=group.device(device), dtype=dtype, linearisation=linearisation)  # type: ignore[arg-type]
        sample = ql.load_tokens(tokens, model=loaded, num_samples=num_samples, max_length=max_length, seed=seed)
        fitted = ql.fit_transport(
            loaded,
            sample,
            energy=energy,  # type: ignore[arg-type]
            n_probes=n_probes,
            seed=seed,
            groups=groups,
            until=until,
            k=k,
            max_memory_gib=max_memory_gib,  # type: ignore[arg-type]
        )
        sample = sample.head(int(fitted.metadata["n_sequences"]))
        if group.leads:
            fitted.save(out)
            sample.save(Path(f"{out}.tokens.safetensors"))
    if group.leads:
        say(f"transport of {loaded.name} over {sample.n_valid} tokens: {out.resolve()}")


def signatures(
    dictionary: Annotated[str, typer.Argument(help="sae-lens folder, weights file, or release (with --sae-id).")],
    model: Annotated[str, typer.Argument(help="Local folder or hub id.")],
    out: Annotated[Path, typer.Option(help="A .parquet or .jsonl file.")] = Path("signatures.parquet"),
    preset: Annotated[str, typer.Option(help="See `querylens_fast.PRESETS`.")] = "query_lens_value",
    transport: Annotated[Path | None, typer.Option(help="A transport file.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token file, text file or dataset name.")] = None,
    sae_id: Annotated[str | None, typer.Option(help="The id within a release.")] = None,
    layer: Annotated[int | None, typer.Option(help="Where the dictionary does not say.")] = None,
    kind: Annotated[str | None, typer.Option(help="sae or transcoder, where the dictionary does not say.")] = None,
    hook_name: Annotated[str | None, typer.Option(help="What it reads, like blocks.3.hook_resid_post.")] = None,
    hook_name_out: Annotated[str | None, typer.Option(help="What it writes, where that is elsewhere.")] = None,
    features: Annotated[str, typer.Option(help="all, start:stop, or ids like 1,5,9.")] = "all",
    tuned_lens: Annotated[Path | None, typer.Option(help="Params file of the tuned-lens library.")] = None,
    stats: Annotated[str, typer.Option(help="auto, none, rel_var or exact.")] = "auto",
    k: Annotated[int, typer.Option(help="Tokens a side.")] = 25,
    token_strings: Annotated[bool, typer.Option(help="Write token strings beside ids.")] = True,
    block_rows: Annotated[
        int | None, typer.Option(help="Features computed at a time: what a killed run loses.", show_default="by memory")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    linearisation: LinearisationOption = "auto",
    max_memory_gib: MemoryOption = 2.0,
) -> None:
    """Signatures of one dictionary's features, streamed to a file; run again to resume."""
    with reported_errors(), ranks.joined() as group:
        import querylens_fast as ql

        source = ql.load_dictionary(
            dictionary,
            sae_id,
            layer,
            kind=kind,  # type: ignore[arg-type]
            hook_name=hook_name,
            hook_name_out=hook_name_out,
        )
        quiet_loading()
        loaded = ql.load_model(model, device=group.device(device), dtype=dtype, linearisation=linearisation)  # type: ignore[arg-type]
        sample = None if tokens is None else ql.load_tokens(tokens, model=loaded)
        stored = ql.signatures(
            source,
            loaded,
            preset=preset,
            transport=transport,
            tokens=sample,
            tuned_lens=tuned_lens,
            stats=stats,  # type: ignore[arg-type]
            k=k,
            features=features,
            out=out,
            max_memory_gib=max_memory_gib,
            token_strings=token_strings,
            block_rows=block_rows,
        )
    if group.leads:
        say(f"{stored.n_features} signatures: {stored.path.resolve()}")


def topk(
    rows: Annotated[str, typer.Argument(help="file.safetensors:name of a matrix [n, d].")],
    columns: Annotated[str, typer.Argument(help="file.safetensors:name of a matrix [V, d].")],
    k: Annotated[int, typer.Option(help="Entries a side.")] = 25,
    out: Annotated[Path, typer.Option(help="safetensors file for ids and scores.")] = Path("topk.safetensors"),
    device: DeviceOption = "cpu",
    backend: Annotated[str, typer.Option(help="auto, torch or triton.")] = "auto",
) -> None:
    """Top-k and bottom-k of each row of A·Bᵀ for two matrices in safetensors files, without holding the product."""
    with reported_errors():
        from safetensors.torch import save_file

        from querylens_fast.models.folders import parse_device
        from querylens_fast.runs.atomic_write import whole
        from querylens_fast.topk.api import streamed_topk

        a, b = (_read_matrix(spec).to(parse_device(device)) for spec in (rows, columns))
        found = streamed_topk(a, b.to(a.dtype), k, backend=backend)
        with whole(out) as partial:
            save_file({name: x.cpu().contiguous() for name, x in found.sides().items()}, str(partial))
    say(f"top and bottom {k} of {a.shape[0]} × {b.shape[0]}: {out.resolve()}")


def _read_matrix(spec: str) -> Any:
    from safetensors import SafetensorError, safe_open

    path, _, name = spec.rpartition(":")
    if not path:
        raise ValueError(f"{spec!r}: expected file.safetensors:name")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():
                raise ValueError(f"{path!r} has no tensor {name!r}; it holds {', '.join(file.keys())}")
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path!r} is damaged or truncated: {error}") from error


def convert_features(
    source: Annotated[Path, typer.Argument(help="A pickled feature list of the reference.")],
    target: Annotated[Path, typer.Argument(help="The JSON file to write.")],
) -> None:
    """Turn a pickled feature list into the safe JSON form (only the reference's two data classes are admitted)."""
    with reported_errors():
        from querylens_fast.dictionaries.feature_lists import convert_features as convert

        convert(source, target)
    say(f"features: {target.resolve()}")
