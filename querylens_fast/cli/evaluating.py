"""Commands that test signatures: feature samples, scores, steered text, judgements and the evaluation report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

import querylens_fast as ql
from querylens_fast.cli.computing import LOADING, ModelArgument
from querylens_fast.cli.console import quiet_loading, reported_errors, say, wide_console
from querylens_fast.cli.flags import Flags, flags_of, with_flags
from querylens_fast.demo import ASSETS
from querylens_fast.evaluation.judge import DEFAULT_JUDGE
from querylens_fast.runs import processes as ranks

ModelOption = Annotated[str | None, typer.Option(help="Default: the embedded model and dictionaries.")]
ManyOption = Annotated[list[str] | None, typer.Option("--dictionary", help="Repeat for more layers.")]
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
def input_score(
    model: ModelOption = None,
    dictionaries: ManyOption = None,
    tokens: Annotated[str | None, typer.Option(help="Held-out sample to find activating tokens in.")] = None,
    transport: Annotated[Path | None, typer.Option(help="Default: fitted on the first tokens, left out after.")] = None,
    presets: Annotated[str, typer.Option(help="Comma-separated presets and result files.")] = (
        "logit_lens_key,key_identity_embed_cosine_centered,query_lens_key,logit_lens_value,query_lens_value"
    ),
    k: Annotated[int, typer.Option(help="Signature size.")] = 25,
    examples: Annotated[int, typer.Option(help="Activating sequences of each feature.")] = 20,
    min_examples: Annotated[int, typer.Option(help="Features with fewer are left out.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the means as JSON too.")] = None,
    loading: Flags = LOADING,
) -> None:
    """The paper's input score I(T): is what activates a feature in its signature? By layer, with 95 % intervals."""
    with reported_errors(), ranks.joined() as group:
        from querylens_fast.demo.showcase import FIT_SEQUENCES
        from querylens_fast.evaluation.methods import Context, find_methods, fit_for
        from querylens_fast.evaluation.scores import Case, labels_of, mean_scores, score_methods
        from querylens_fast.runs.atomic_write import write_whole

        quiet_loading()
        loading |= {"device": group.device(loading["device"])}
        methods = find_methods(presets.split(","))
        loaded, sources, text = _subject(model, dictionaries, tokens, loading)
        # The embedded sample begins with what its own transports are fitted on.
        cut = min(FIT_SEQUENCES, len(text.ids) // 2) if transport is None or model is None else 0
        held_out = ql.Tokens(text.ids[cut:], text.valid_mask[cut:], text.source)
        fitted = fit_for(methods, loaded, text.head(cut)) if transport is None else ql.load_transport(transport)
        share = group.share(range(len(sources)))
        own = {i: ql.feature_sample(sources[i], loaded, held_out, n_examples=examples) for i in share}
        found = dict(pair for some in group.gather(own) for pair in some.items())
        cases = [
            Case(source, label, found[i].choose(source.n_features, min_examples), found[i])
            for i, (source, label) in enumerate(zip(sources, labels_of(sources), strict=True))
        ]
        context = Context(loaded, fitted, text.head(cut or 1))
        scores = mean_scores(score_methods(cases, context, methods, ks=(k,), coherence=False, progress=True))
        if out is not None and group.leads:
            n = {case.label: case.dictionary.n_features for case in cases}
            n_all = {**n, None: sum(n.values())}
            rows = [
                {"preset": s.method, **s.as_dict(), "n_left_out": n_all[s.dictionary] - s.n_features} for s in scores
            ]
            write_whole(out, json.dumps(rows, indent=1))
    if not group.leads:
        return
    from rich.table import Table

    names = [*(case.label for case in cases), None]
    table = Table(title=f"Input score I(T), k={k}: mean over features [95 % interval]")
    for name in ("preset", *names[:-1], "mean over dictionaries"):
        table.add_column(name)
    cells = {(s.method, s.dictionary): f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}] n={s.n_features}" for s in scores}
    for method in methods:
        table.add_row(method.name, *(cells.get((method.name, name), "") for name in names))
    wide_console(200).print(table, markup=False)
    if out is not None:
        say(f"results: {out.resolve()}")


@with_flags
def report(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id. Default: the embedded model.")] = None,
    dictionaries: ManyOption = None,
    tokens: Annotated[str | None, typer.Option(help="Token file, text file or dataset name.")] = None,
    out: Annotated[Path, typer.Option(help="The folder; an interrupted report goes on.")] = Path("report"),
    transport: Annotated[Path | None, typer.Option(help="Default: fitted on the first sequences.")] = None,
    reporting: Flags = REPORTING,
    loading: Flags = LOADING,
) -> None:
    """Scores of every preset, figures and one HTML page, for a model's dictionaries."""
    with reported_errors(), ranks.joined() as group:
        from querylens_fast.demo.showcase import FIT_SEQUENCES

        quiet_loading()
        loading |= {"device": group.device(loading["device"])}
        loaded, sources, text = _subject(model, dictionaries, tokens, loading)
        if model is None and reporting["fit_sequences"] is None:
            reporting |= {"fit_sequences": FIT_SEQUENCES}
        found = ql.evaluation_report(loaded, sources, text, out, transport=transport, **reporting)
    if group.leads:
        say(f"{len(found.scores)} rows of scores; page: {(found.folder / 'report.html').resolve()}")


def _subject(
    model: str | None, dictionaries: list[str] | None, tokens: str | None, loading: Flags
) -> tuple[ql.Model, list[Any], ql.Tokens]:
    """A user's model, dictionaries and sample, or the embedded ones."""
    if model is None:
        from querylens_fast.demo.showcase import load_example

        if dictionaries or tokens:
            raise ValueError("--dictionary and --tokens belong to a model: give --model too, or none of them")
        example = load_example()
        return example.model, example.dictionaries, ql.load_tokens(ASSETS / "tokens.safetensors", model=example.model)
    if not dictionaries or not tokens:
        raise ValueError("with a model, give --dictionary (once for each layer) and --tokens too")
    loaded = ql.load_model(model, **loading)
    return loaded, [ql.load_dictionary(d) for d in dictionaries], ql.load_tokens(tokens, model=loaded)
