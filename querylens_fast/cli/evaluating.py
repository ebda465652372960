"""Commands that test signatures: feature samples, steered text, judgements and the evaluation report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import querylens_fast as ql
from querylens_fast.cli.computing import LOADING, ModelArgument
from querylens_fast.cli.console import quiet_loading, reported_errors, say
from querylens_fast.cli.flags import Flags, flags_of, with_flags
from querylens_fast.demo import ASSETS
from querylens_fast.evaluation.judge import DEFAULT_JUDGE

DictionaryArgument = Annotated[str, typer.Argument(help="sae-lens folder, weights file or release.")]
SAMPLING = flags_of(ql.feature_sample, "n_examples")
STEERING = flags_of(ql.steer, "n_tokens", "temperature", "seed")
REPORTING = flags_of(
    ql.evaluation_report,
    *("fit_sequences", "n_features", "min_examples", "prompt", "seed", "max_memory_gib"),
)


@with_flags
def sample(
    dictionary: DictionaryArgument,
    model: ModelArgument,
    tokens: Annotated[str, typer.Argument(help="Token file, text file or dataset name.")],
    out: Annotated[Path, typer.Option(help="The .parquet file to write.")] = Path("sample.parquet"),
    sampling: Flags = SAMPLING,
    loading: Flags = LOADING,
) -> None:
    """Where every feature is active: density, mean, maximum, strongest sequences and tokens."""
    with reported_errors():
        source = ql.load_dictionary(dictionary)
        quiet_loading()
        found = ql.feature_sample(source, ql.load_model(model, **loading), tokens, out=out, **sampling)
    active = int((found.density > 0).sum())
    say(f"{active} of {len(found.density)} features are active; result: {out.resolve()}")


@with_flags
def steer(
    dictionary: DictionaryArgument,
    model: ModelArgument,
    feature: Annotated[int, typer.Argument(help="Feature id.")],
    strength: Annotated[float, typer.Option(help="The activation that the feature is set to.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    steering: Flags = STEERING,
    loading: Flags = LOADING,
) -> None:
    """Continue a prompt with and without a feature set to a value at every position."""
    with reported_errors():
        source = ql.load_dictionary(dictionary)
        quiet_loading()
        text = ql.steer(source, ql.load_model(model, **loading), feature, strength, prompt, **steering)
    say(f"clean:   {text.prompt}{text.clean}")
    say(f"steered: {text.prompt}{text.steered}")


def judge(
    result: Annotated[Path, typer.Argument(help="A .parquet or .jsonl result of `signatures`.")],
    requests: Annotated[Path | None, typer.Option(help="Write batch requests to this .jsonl file.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Answers of a batch, or where --base-url keeps them.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Server with OpenAI's chat interface, up to /v1.")] = None,
    out: Annotated[Path | None, typer.Option(help="The .parquet file of judgements to write.")] = None,
    judge: Annotated[str, typer.Option(help="The judging model's name.")] = DEFAULT_JUDGE,
    features: Annotated[int, typer.Option(help="Features to judge, a seeded sample.")] = 100,
    queries: Annotated[int, typer.Option(help="Times each list is asked about; the median counts.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer to use, without token strings.")] = None,
) -> None:
    """Interpretability of token lists, 0 to 10, by a language model. A key for the server: OPENAI_API_KEY."""
    with reported_errors():
        from querylens_fast.evaluation.judge import ask, read_answers, write_requests
        from querylens_fast.evaluation.judged import judge_table, result_lists

        lists = result_lists(result, features, seed=seed, model=model)
        if requests is not None:
            write_requests(list(lists.values()), requests, judge=judge, queries=queries)
            say(f"requests: {requests.resolve()} ({len(lists)} features)")
            return
        if answers is None:
            raise ValueError("give --requests to write a batch, or --answers to read one; --base-url asks a server")
        if base_url is not None:
            key = os.environ.get("OPENAI_API_KEY")
            found = ask(list(lists.values()), base_url, answers, judge=judge, api_key=key, queries=queries)
        else:
            found = read_answers(answers)
        table = judge_table(lists, found, source=str(result), out=out).table(["score"])
    scores = [score for score in table["score"].to_pylist() if score is not None]
    mean = f"mean score {sum(scores) / len(scores):.2f}" if scores else "no scores"
    say(f"{len(scores)} of {len(lists)} features judged, {mean}" + (f"; result: {out.resolve()}" if out else ""))


@with_flags
def report(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id. Default: the embedded model.")] = None,
    dictionary: Annotated[list[str] | None, typer.Option(help="Repeat for more layers.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token file, text file or dataset name.")] = None,
    out: Annotated[Path, typer.Option(help="The folder; an interrupted report goes on.")] = Path("report"),
    transport: Annotated[Path | None, typer.Option(help="Default: fitted on the first sequences.")] = None,
    reporting: Flags = REPORTING,
    loading: Flags = LOADING,
) -> None:
    """Scores of every preset, figures and one HTML page, for a model's dictionaries."""
    with reported_errors():
        quiet_loading()
        if model is None:
            from querylens_fast.demo.showcase import FIT_SEQUENCES, load_example

            if dictionary or tokens:
                raise ValueError("--dictionary and --tokens belong to a model: name it, or give neither")
            example = load_example()
            loaded, dictionaries = example.model, example.dictionaries
            text = ql.load_tokens(ASSETS / "tokens.safetensors", model=loaded)
            if transport is None and reporting["fit_sequences"] is None:
                reporting |= {"fit_sequences": FIT_SEQUENCES}
        else:
            if not dictionary or not tokens:
                raise ValueError("with a model, give --dictionary (once for each layer) and --tokens too")
            loaded, text = ql.load_model(model, **loading), tokens
            dictionaries = [ql.load_dictionary(d) for d in dictionary]
        found = ql.evaluation_report(loaded, dictionaries, text, out, transport=transport, **reporting)
    say(f"{len(found.scores)} rows of scores; page: {(found.folder / 'report.html').resolve()}")
