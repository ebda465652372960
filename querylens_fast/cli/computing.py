"""Commands that compute: a transport, the signatures of a dictionary, a run of the reference's kind, any product."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

import querylens_fast as ql
from querylens_fast.cli.console import DeviceOption, quiet_loading, reported_errors, say
from querylens_fast.cli.flags import Flags, flags_of, with_flags
from querylens_fast.lens.options import LensOptions
from querylens_fast.runs import processes as ranks
from querylens_fast.runs.run_lock import held

ModelArgument = Annotated[str, typer.Argument(help="Local folder or hub id.")]
LOADING = flags_of(ql.load_model, "device", "dtype", "linearisation")
SAMPLING = flags_of(ql.load_tokens, "num_samples", "max_length", "seed")
FITTING = flags_of(
    ql.fit_transport,
    *("energy", "n_probes", "seed", "groups", "until", "k", "submodule", "through_norms", "max_memory_gib"),
    defaults={"seed": 42},
    helps={"seed": "Of the draw of sequences, of the probes, and of the features that --until compares."},
)
PRODUCT = flags_of(ql.streamed_topk, "backend", "precision", helps={"precision": "exact, float32 or bf16."})
DICTIONARY = flags_of(ql.load_dictionary, "sae_id", "layer", "kind", "hook_name", "hook_name_out")
LENS = flags_of(
    LensOptions,
    *(
        "preset",
        "transport",
        "tokens",
        "tuned_lens",
        "features",
        "k",
        "stats",
        "layers",
        "histogram",
        "token_change_value",
    ),
    *("adaptive_threshold", "final_norm", "unit_norm", "unembedding", "submodule", "through_norms"),
    *("format", "token_strings", "block_rows", "resume", "progress", "backend", "max_memory_gib"),
    defaults={"features": "all"},
    helps={
        "preset": f"{', '.join(ql.PRESETS)}, or components like key_identity_embed.",
        "transport": "A transport file (querylens-fast transport).",
        "tokens": "Token file, text file or dataset name; used to carry features through the model, or to fit.",
        "features": "all, start:stop, or ids like 1,5,9.",
        "adaptive_threshold": "With query_lens_value_adaptive: choose a transition by this largest relative variance.",
        "submodule": "both, attn or mlp: whose Jacobians count. Default: as the transport was fitted.",
        "progress": "Show a progress bar.",
        "resume": "Continue what a killed run wrote, or refuse a file that exists.",
    },
)


def run(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings over the config's.")] = None,
    config_name: Annotated[
        str, typer.Option("--config-name", "-cn", help="gpt2-small, gemma3-1b, qwen3-0.6b, … or a YAML file.")
    ] = "gpt2-small",
    config_path: Annotated[
        Path | None, typer.Option("--config-path", "-cp", help="Folder of your own YAML configs.")
    ] = None,
) -> None:
    """One preset over a list of features or whole dictionaries, configured as HYU-NLP/query-lens is; resumable."""
    with reported_errors(), ranks.joined() as group:
        from querylens_fast.analysis.run import run as run_config

        path = run_config(config_name, overrides or [], config_path)
    if group.leads:
        say(f"results: {Path(path).resolve()}")


@with_flags
def transport(
    model: ModelArgument,
    tokens: Annotated[str, typer.Argument(help="Token file, text file or dataset name.")],
    out: Annotated[Path, typer.Option(help="The transport file to write.")] = Path("transport.safetensors"),
    inside: Annotated[
        list[str] | None,
        typer.Option(help="Carry keys that read inside modules too: blocks.3.attn.hook_z, blocks.*.mlp.hook_post, …"),
    ] = None,
    sampling: Flags = SAMPLING,
    fitting: Flags = FITTING,
    loading: Flags = LOADING,
) -> None:
    """Fit a model's transport once, for every dictionary of it."""
    with reported_errors(), ranks.joined() as group, held(out) if group.leads else nullcontext():
        if out.is_dir():
            raise ValueError(f"out is {str(out)!r}, a folder; expected the file to write")
        quiet_loading()
        loaded = ql.load_model(model, **{**loading, "device": group.device(loading["device"])})
        sample = ql.load_tokens(tokens, model=loaded, **sampling)
        fitted = ql.fit_transport(loaded, sample, inside=inside or (), **fitting)
        sample = sample.head(int(fitted.metadata["n_sequences"]))
        if group.leads:
            fitted.save(out)
            sample.save(Path(f"{out}.tokens.safetensors"))
    if group.leads:
        say(f"transport of {loaded.name} over {sample.n_valid} tokens: {out.resolve()}")


@with_flags
def signatures(
    dictionary: Annotated[str, typer.Argument(help="sae-lens folder, weights file, or release (with --sae-id).")],
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="A .parquet or .jsonl file.")] = Path("signatures.parquet"),
    of_dictionary: Flags = DICTIONARY,
    options: Flags = LENS,
    loading: Flags = LOADING,
    sampling: Flags = SAMPLING,
) -> None:
    """Signatures of one dictionary's features, streamed to a file; run again to resume."""
    with reported_errors(), ranks.joined() as group:
        source = ql.load_dictionary(dictionary, **of_dictionary)
        quiet_loading()
        loaded = ql.load_model(model, **{**loading, "device": group.device(loading["device"])})
        if options["tokens"] is not None:
            options["tokens"] = ql.load_tokens(options["tokens"], model=loaded, **sampling)
        stored = ql.signatures(source, loaded, out=out, **options)
    if group.leads:
        say(f"{stored.n_features} signatures: {stored.path.resolve()}")


@with_flags
def topk(
    rows: Annotated[str, typer.Argument(help="file.safetensors:name of a matrix [n, d].")],
    columns: Annotated[str, typer.Argument(help="file.safetensors:name of a matrix [V, d].")],
    k: Annotated[int, typer.Option(help="Entries on each side.")] = 25,
    out: Annotated[Path, typer.Option(help="safetensors file for ids and scores.")] = Path("topk.safetensors"),
    device: DeviceOption = "cpu",
    product: Flags = PRODUCT,
) -> None:
    """Top-k and bottom-k of each row of A·Bᵀ for two matrices in safetensors files, without storing the product."""
    with reported_errors():
        from querylens_fast.models.folders import parse_device
        from querylens_fast.runs.sealed_tensors import write_tensors

        a, b = (_read_matrix(spec).to(parse_device(device)) for spec in (rows, columns))
        found = ql.streamed_topk(a, b.to(a.dtype), k, **product)
        write_tensors(out, found.sides(), {})
    say(f"top and bottom {k} of {a.shape[0]} × {b.shape[0]}: {out.resolve()}")


def _read_matrix(spec: str) -> Any:
    import torch
    from safetensors import SafetensorError, safe_open

    from querylens_fast.runs.sealed_tensors import check_seal

    path, _, name = spec.rpartition(":")
    if not path:
        raise ValueError(f"{spec!r}: expected file.safetensors:name")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path!r} does not exist")
    try:
        check_seal(path)
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():
                raise ValueError(f"{path!r} has no tensor {name!r}; it holds {', '.join(file.keys())}")
            found = file.get_tensor(name)
            if found.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise ValueError(
                    f"{path!r}: {name} holds {found.dtype}; expected float16, bfloat16, float32 or float64"
                )
            return found
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
