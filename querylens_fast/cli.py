"""The command line: `querylens-fast demo | run | transport | signatures | evaluate | topk | convert-features | bench`.

Commands say where their result is. A mistake is one line on stderr that says what to do, exit code 2, and nothing
written.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Token signatures for every feature of sparse autoencoders and transcoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluate_app = typer.Typer(help="Check signatures against what features do on held-out text.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
MemoryOption = Annotated[float, typer.Option(help="Bound on the working memory, GiB.")]


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn the package's own errors into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        for note in getattr(error, "__notes__", []):
            typer.secho(f"  {note}", err=True)
        raise typer.Exit(2) from error


def wide_console(width: int) -> Any:
    """A console as wide as the terminal, or as COLUMNS says; ``width`` where there is neither."""
    from rich.console import Console

    known = Console().is_terminal or "COLUMNS" in os.environ
    return Console(width=None if known else width)


def say(text: str) -> None:
    typer.echo(text)


@app.callback()
def _setup() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("transformers", "httpx", "datasets", "jax"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("querylens_demo"),
    k: Annotated[int, typer.Option(help="Tokens a side in the files.")] = 25,
) -> None:
    """The whole job on the embedded model and dictionaries, offline, in under a minute."""
    from rich.table import Table

    with reported_errors():
        from querylens_fast.demo import showcase

        quiet_loading()
        result = showcase.run_demo(out, k)
    title = "Features at the quartiles of activation strength on held-out text (· space, ⏎ line end)"
    table = Table(title=title, show_lines=True)
    for column in (
        "dictionary",
        "feature",
        "activated by",
        "key tokens: Logit | Query Lens",
        "value tokens: Logit | Query Lens",
    ):
        table.add_column(column, overflow="fold")
    for row in result.rows:
        pairs = [
            f"Logit: {showcase.visible(row.tokens[f'logit_lens_{side}'])}\n"
            f"Query: {showcase.visible(row.tokens[f'query_lens_{side}'])}"
            for side in ("key", "value")
        ]
        table.add_row(row.dictionary, str(row.feature), showcase.visible(row.activating), *pairs)
    wide_console(160).print(table, markup=False)
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    total = f"{showcase.total_seconds(result):.1f} s on {showcase.threads()} threads"
    say(f"{result.n_features} features × 4 signatures in {total} ({steps})")
    say(f"results: {out.resolve()} ({len(result.files)} files: transport, tokens, one Parquet a dictionary and preset)")


def quiet_loading() -> None:
    """Model loading bars say nothing a user of a tiny local model needs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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


@app.command()
def transport(
    model: Annotated[str, typer.Argument(help="Local folder or hub id.")],
    tokens: Annotated[str, typer.Argument(help="Token file, text file or dataset name.")],
    out: Annotated[Path, typer.Option(help="The transport file to write.")] = Path("transport.safetensors"),
    num_samples: Annotated[int | None, typer.Option(help="Sequences to draw.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a sequence, for text.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the draw and the probes.")] = 42,
    energy: Annotated[str, typer.Option(help="none, probes or exact: what rel_var needs.")] = "none",
    n_probes: Annotated[int, typer.Option(help="Sign probes a sequence.")] = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    max_memory_gib: MemoryOption = 2.0,
) -> None:
    """Fit a model's transport once, for every dictionary of it."""
    with reported_errors():
        import querylens_fast as ql

        quiet_loading()
        loaded = ql.load_model(model, device=device, dtype=dtype)
        sample = ql.load_tokens(tokens, model=loaded, num_samples=num_samples, max_length=max_length, seed=seed)
        fitted = ql.fit_transport(
            loaded,
            sample,
            energy=energy,  # type: ignore[arg-type]
            n_probes=n_probes,
            seed=seed,
            max_memory_gib=max_memory_gib,  # type: ignore[arg-type]
        )
        fitted.save(out)
        sample.save(Path(f"{out}.tokens.safetensors"))
    say(f"transport of {loaded.name} over {sample.n_valid} tokens: {out.resolve()}")


@app.command()
def signatures(
    dictionary: Annotated[str, typer.Argument(help="sae-lens folder, weights file, or release (with --sae-id).")],
    model: Annotated[str, typer.Argument(help="Local folder or hub id.")],
    out: Annotated[Path, typer.Option(help="A .parquet or .jsonl file.")] = Path("signatures.parquet"),
    preset: Annotated[str, typer.Option(help="See `querylens_fast.PRESETS`.")] = "query_lens_value",
    transport: Annotated[Path | None, typer.Option(help="A transport file.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token file, text file or dataset name.")] = None,
    sae_id: Annotated[str | None, typer.Option(help="The id within a release.")] = None,
    layer: Annotated[int | None, typer.Option(help="Where the dictionary does not say.")] = None,
    features: Annotated[str, typer.Option(help="all, start:stop, or ids like 1,5,9.")] = "all",
    tuned_lens: Annotated[Path | None, typer.Option(help="Params file of the tuned-lens library.")] = None,
    stats: Annotated[str, typer.Option(help="auto, none, rel_var or exact.")] = "auto",
    k: Annotated[int, typer.Option(help="Tokens a side.")] = 25,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    max_memory_gib: MemoryOption = 2.0,
) -> None:
    """Signatures of one dictionary's features, streamed to a file; run again to resume."""
    with reported_errors():
        import querylens_fast as ql

        source = ql.load_dictionary(dictionary, sae_id, layer)
        quiet_loading()
        loaded = ql.load_model(model, device=device, dtype=dtype)
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
        )
    say(f"{stored.n_features} signatures: {stored.path.resolve()}")


@evaluate_app.command("input")
def evaluate_input(
    model: Annotated[str | None, typer.Option(help="Default: the embedded model and dictionaries.")] = None,
    dictionary: Annotated[list[str] | None, typer.Option(help="Repeat for more layers.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Held-out sample to find activating tokens in.")] = None,
    transport: Annotated[Path | None, typer.Option(help="Default: fitted on the first tokens, left out after.")] = None,
    presets: Annotated[str, typer.Option(help="Comma-separated.")] = (
        "logit_lens_key,key_identity_embed_cosine_centered,query_lens_key,logit_lens_value,query_lens_value"
    ),
    k: Annotated[int, typer.Option(help="Signature size.")] = 25,
    examples: Annotated[int, typer.Option(help="Activating sequences a feature.")] = 20,
    min_examples: Annotated[int, typer.Option(help="Features with fewer are left out.")] = 5,
    device: DeviceOption = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the scores as JSON too.")] = None,
) -> None:
    """The paper's input score I(T): is what activates a feature in its signature? By layer, with 95 % intervals."""
    from rich.table import Table

    with reported_errors():
        from querylens_fast.demo.showcase import FIT_SEQUENCES, Example, load_example
        from querylens_fast.evaluation import as_table, evaluate_presets

        if model is None:
            quiet_loading()
            example = load_example()
        else:
            if not dictionary or not tokens:
                raise ValueError("with --model, give --dictionary (once for each layer) and --tokens too")
            import querylens_fast as ql

            quiet_loading()
            loaded = ql.load_model(model, device=device)
            sample = ql.load_tokens(tokens, model=loaded)
            cut = 0 if transport is not None else min(FIT_SEQUENCES, len(sample.ids) // 2)
            example = Example(
                loaded, [ql.load_dictionary(d) for d in dictionary], sample.head(cut or 1),
                ql.Tokens(sample.ids[cut:], sample.valid_mask[cut:], sample.source),
            )  # fmt: skip
        scores = evaluate_presets(
            example.model, example.dictionaries, example.held_out, transport or example.fit_tokens,
            presets.split(","), k, examples, min_examples,
        )  # fmt: skip
    by_preset = as_table(scores)
    names = sorted(
        {s.dictionary for s in scores if s.dictionary}, key=lambda n: [s.dictionary for s in scores].index(n)
    )
    table = Table(title=f"Input score I(T), k={k}: mean over features [95 % interval]")
    table.add_column("preset")
    for name in [*names, "mean over dictionaries"]:
        table.add_column(name)
    for preset, row in by_preset.items():
        cells = [row[n] for n in [*names, None]]
        table.add_row(preset, *(f"{c.mean:.3f} [{c.low:.3f}, {c.high:.3f}] n={c.n_features}" for c in cells))
    wide_console(200).print(table, markup=False)
    if out is not None:
        out.write_text(json.dumps([s.as_dict() for s in scores], indent=1), encoding="utf-8")
        say(f"results: {out.resolve()}")


@app.command()
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

        from querylens_fast.ops import streamed_topk

        a, b = (_read_matrix(spec).to(device) for spec in (rows, columns))
        found = streamed_topk(a, b.to(a.dtype), k, backend=backend)
        save_file({name: x.cpu().contiguous() for name, x in found._asdict().items() if x is not None}, str(out))
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


@app.command("convert-features")
def convert_features(
    source: Annotated[Path, typer.Argument(help="A pickled feature list of the reference.")],
    target: Annotated[Path, typer.Argument(help="The JSON file to write.")],
) -> None:
    """Turn a pickled feature list into the safe JSON form (only the reference's two data classes are admitted)."""
    with reported_errors():
        from querylens_fast.features import convert_features as convert

        convert(source, target)
    say(f"features: {target.resolve()}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(ctx: typer.Context) -> None:
    """The bundled benchmarks (from a source checkout); arguments go to `python -m bench`."""
    import subprocess
    import sys

    root = Path(__file__).parent.parent
    with reported_errors():
        if not (root / "bench" / "__main__.py").is_file():
            raise FileNotFoundError("the benchmarks come with a source checkout; install that with `pip install -e .`")
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    raise typer.Exit(subprocess.call([sys.executable, "-m", "bench", *ctx.args], env=environment))


if __name__ == "__main__":
    app()
