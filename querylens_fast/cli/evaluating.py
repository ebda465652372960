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
from querylens_fast.evaluation.evaluate import EvaluationOptions
from querylens_fast.evaluation.judge import DEFAULT_JUDGE
from querylens_fast.evaluation.report import PROMPT
from querylens_fast.evaluation.scores import Case, labels_of
from querylens_fast.runs import processes
from querylens_fast.runs.input_file import read_text

ModelOption = Annotated[str | None, typer.Option(help="Default: the embedded model and dictionaries.")]
ManyOption = Annotated[list[str] | None, typer.Option("--dictionary", help="Repeat for more layers.")]
DictionaryArgument = Annotated[str, typer.Argument(help="sae-lens folder, weights file or release.")]
DictionariesArgument = Annotated[list[str] | None, typer.Argument(help="sae-lens folders, weights files or releases.")]
TokensOption = Annotated[str | None, typer.Option(help="Token file, text file or dataset name.")]
TransportOption = Annotated[Path | None, typer.Option(help="Default: fitted on the first sequences.")]
MethodsOption = Annotated[str | None, typer.Option(help="Comma-separated presets, token_change@5, result files.")]
SizesOption = Annotated[str, typer.Option(help="Sizes of the signatures, comma-separated; all from one pass.")]
PrefixesOption = Annotated[Path | None, typer.Option(help="Text file, a prefix a line. Default: 100 neutral ones.")]
READING = flags_of(ql.load_tokens, "num_samples", "max_length")
SAMPLING = flags_of(ql.feature_sample, "n_examples", "max_memory_gib")
STEERING = flags_of(ql.steer, "n_tokens", "temperature", "seed")
SCORING = flags_of(
    EvaluationOptions,
    *("fit_sequences", "tuned_lens", "n_features", "min_examples", "positions", "seed", "max_memory_gib"),
)


@with_flags
def sample(
    dictionary: DictionaryArgument,
    model: ModelArgument,
    tokens: Annotated[str, typer.Argument(help="Token file, text file or dataset name.")],
    out: Annotated[Path, typer.Option(help="The .parquet file to write.")] = Path("sample.parquet"),
    lists: Annotated[Path | None, typer.Option(help="Also write contexts of a sample of features as JSON.")] = None,
    features: Annotated[int, typer.Option(help="Features of --lists, a seeded sample.")] = 100,
    min_examples: Annotated[int, typer.Option(help="Activating sequences that those need.")] = 20,
    seed: Annotated[int, typer.Option(help="Of that sample.")] = 0,
    sampling: Flags = SAMPLING,
    reading: Flags = READING,
    loading: Flags = LOADING,
) -> None:
    """Where every feature is active: density, mean, maximum, strongest sequences and tokens."""
    with reported_errors():
        from querylens_fast.dictionaries.feature_lists import save_features_json
        from querylens_fast.evaluation.contexts import feature_list

        source = ql.load_dictionary(dictionary)
        quiet_loading()
        loaded = ql.load_model(model, **loading)
        text = ql.load_tokens(tokens, model=loaded, **reading)
        found = ql.feature_sample(source, loaded, text, out=out, **sampling)
        active = int((found.density > 0).sum())
        say(f"{active} of {len(found.density)} features are active; result: {out.resolve()}")
        if lists is not None:
            chosen = found.choose(features, min_examples, seed)
            save_features_json(feature_list(found, source, loaded, text, chosen), lists)
            say(f"contexts of {len(chosen)} features: {lists.resolve()}")


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
        text = ql.steer(ql.load_model(model, **loading), source, feature, strength, prompt, **steering)
    say(f"clean:   {text.prompt}{text.clean}")
    say(f"steered: {text.prompt}{text.steered}")


def judge(
    result: Annotated[Path, typer.Argument(help="A result of `signatures`, or scores.parquet of `evaluate`.")],
    requests: Annotated[Path | None, typer.Option(help="Write batch requests to this .jsonl file.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Answers of a batch, or where --base-url keeps them.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Server with OpenAI's chat interface, up to /v1.")] = None,
    out: Annotated[Path | None, typer.Option(help="The .parquet file of judgements to write.")] = None,
    judge: Annotated[str, typer.Option(help="The judging model's name.")] = DEFAULT_JUDGE,
    features: Annotated[int, typer.Option(help="Features to judge of each dictionary, a seeded sample.")] = 100,
    queries: Annotated[int, typer.Option(help="Times each list is asked about; the median counts.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer to use, for files without token strings.")] = None,
) -> None:
    """Interpretability of token lists, 0 to 10, by a language model. A key for the server: OPENAI_API_KEY."""
    with reported_errors():
        from querylens_fast.evaluation.judge import ask, read_answers, write_requests
        from querylens_fast.evaluation.judged import judge_table, result_lists

        lists = result_lists(result, features, seed=seed, model=model)
        texts = [one.tokens for one in lists]
        if requests is not None:
            write_requests(texts, requests, judge=judge, queries=queries)
            say(f"requests: {requests.resolve()} ({len(lists)} token lists)")
            return
        if answers is None:
            raise ValueError("give --requests to write a batch, or --answers to read one; --base-url asks a server")
        if base_url is not None:
            key = os.environ.get("OPENAI_API_KEY")
            found = ask(texts, base_url, answers, judge=judge, api_key=key, queries=queries)
        else:
            found = read_answers(answers)
        table = judge_table(lists, found, judge=judge, source=str(result), out=out)
        columns = ["method", "interpretability"]
        scores = [row for row in table.table(columns).to_pylist() if row["interpretability"] is not None]
    for method in dict.fromkeys(row["method"] for row in scores):
        own = [row["interpretability"] for row in scores if row["method"] == method]
        say(f"{method}: mean {sum(own) / len(own):.2f} of {len(own)} token lists")
    say(f"{len(scores)} of {len(lists)} token lists judged" + (f"; result: {out.resolve()}" if out else ""))


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
    min_examples: Annotated[int, typer.Option(help="Features with fewer are left out.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write the means as JSON too.")] = None,
    loading: Flags = LOADING,
) -> None:
    """The paper's input score I(T): is what activates a feature in its signature? By layer, with 95 % intervals."""
    with reported_errors(), processes.joined() as group:
        from querylens_fast.demo.showcase import FIT_SEQUENCES
        from querylens_fast.evaluation.means import mean_scores
        from querylens_fast.evaluation.methods import Context, find_methods, fit_for
        from querylens_fast.evaluation.scores import score_methods
        from querylens_fast.runs.atomic_write import write_whole

        quiet_loading()
        loading |= {"device": group.device(loading["device"])}
        methods = find_methods(presets.split(","))
        loaded, sources, text = _subject(model, dictionaries, tokens, loading)
        # The embedded sample begins with what its own transports are fitted on.
        cut = min(FIT_SEQUENCES, len(text.ids) // 2) if transport is None or model is None else 0
        fitted = fit_for(methods, loaded, text.head(cut)) if transport is None else ql.load_transport(transport)
        if not group.leads:  # the fit was shared; the rest takes one process
            group.wait("scores")
            return
        held_out = ql.Tokens(text.ids[cut:], text.valid_mask[cut:], text.source)
        cases = _cases(loaded, sources, held_out, examples, min_examples)
        context = Context(loaded, fitted, text.head(cut or 1))
        scores = mean_scores(score_methods(cases, context, methods, ks=(k,), coherence=False, progress=True))
        if out is not None:
            n = {case.label: case.dictionary.n_features for case in cases}
            n_all = {**n, None: sum(n.values())}
            rows = [
                {"preset": s.method, **s.as_dict(), "n_left_out": n_all[s.dictionary] - s.n_features} for s in scores
            ]
            write_whole(out, json.dumps(rows, indent=1))
        group.wait("scores")
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


def _cases(model: ql.Model, sources: list[Any], tokens: ql.Tokens, examples: int, min_examples: int) -> list[Case]:
    """Each dictionary with all its features that have enough examples, and where they are active."""
    cases = []
    for source, label in zip(sources, labels_of(sources), strict=True):
        found = ql.feature_sample(source, model, tokens, n_examples=examples)
        cases.append(Case(source, label, found.choose(source.n_features, min_examples), found))
    return cases


@with_flags
def scores(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id. Default: the embedded model.")] = None,
    dictionaries: DictionariesArgument = None,
    tokens: TokensOption = None,
    out: Annotated[Path, typer.Option(help="The folder; an interrupted run goes on.")] = Path("scores"),
    methods: MethodsOption = None,
    k: SizesOption = "5,10,25,50",
    transport: TransportOption = None,
    prefixes: PrefixesOption = None,
    scoring: Flags = SCORING,
    loading: Flags = LOADING,
) -> None:
    """Input score, output score and coherence of every method: one Parquet row a feature and method."""
    with reported_errors(), processes.joined() as group:
        quiet_loading()
        loading |= {"device": group.device(loading["device"])}
        subject = _subject(model, dictionaries, tokens, loading)
        given = _options(methods, k, transport, prefixes, scoring, embedded=model is None)
        found = ql.evaluate_signatures(*subject, out, **given)
        if group.leads:
            _show_scores(found.scores)
            say(f"{len(found.scores)} rows: {found.scores.path.resolve()}")  # type: ignore[union-attr]


@with_flags
def report(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id. Default: the embedded model.")] = None,
    dictionaries: DictionariesArgument = None,
    tokens: TokensOption = None,
    out: Annotated[Path, typer.Option(help="The folder; an interrupted report goes on.")] = Path("report"),
    methods: MethodsOption = None,
    k: SizesOption = "5,10,25,50",
    transport: TransportOption = None,
    prefixes: PrefixesOption = None,
    prompt: Annotated[str, typer.Option(help="Begins the steered texts.")] = PROMPT,
    scoring: Flags = SCORING,
    loading: Flags = LOADING,
) -> None:
    """Scores of every method, figures and one HTML page, for a model's dictionaries."""
    with reported_errors(), processes.joined() as group:
        quiet_loading()
        loading |= {"device": group.device(loading["device"])}
        subject = _subject(model, dictionaries, tokens, loading)
        given = _options(methods, k, transport, prefixes, scoring, embedded=model is None)
        if group.leads:
            found = ql.evaluation_report(*subject, out, prompt=prompt, **given)
            _show_scores(found.scores)
            say(f"{len(found.scores)} rows of scores; page: {(found.folder / 'report.html').resolve()}")
        else:
            ql.evaluate_signatures(*subject, out, **given)
        group.wait("report")


def _options(
    methods: str | None, k: str, transport: Path | None, prefixes: Path | None, scoring: Flags, embedded: bool
) -> dict[str, Any]:
    """The fields of `EvaluationOptions` from the flags of a command."""
    from querylens_fast.demo.showcase import FIT_SEQUENCES

    if embedded and scoring["fit_sequences"] is None:
        scoring |= {"fit_sequences": FIT_SEQUENCES}
    try:
        sizes = [int(size) for size in k.split(",")]
    except ValueError:
        raise ValueError(f"--k is {k!r}; expected whole numbers like 5,10,25,50") from None
    texts = None
    if prefixes is not None:
        if not prefixes.is_file():
            raise FileNotFoundError(f"prefixes file {str(prefixes)!r} does not exist")
        texts = [line for line in read_text(prefixes).splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"prefixes file {str(prefixes)!r} is empty; expected a prefix a line")
    names = None if methods is None else methods.split(",")
    return {**scoring, "methods": names, "k": sizes, "transport": transport, "prefixes": texts}


def _show_scores(found: ql.RelationTable) -> None:
    """Means over dictionaries, and what Query Lens finds and Logit Lens does not, on the terminal."""
    from rich.table import Table

    from querylens_fast.evaluation.means import gains, mean_scores

    sizes = found.metadata["ks"]
    k = 25 if 25 in sizes else max(sizes)
    names = ("input_score", "output_score", "embedding_coherence")
    cells = {
        (m.method, name): f"{m.mean:.3f} ± {m.high - m.mean:.3f}"
        for name in names for m in mean_scores(found, name) if m.k == k and m.dictionary is None
    }  # fmt: skip
    table = Table(title=f"k = {k}: mean over {len(found.metadata['dictionaries'])} dictionaries ± 95 % interval")
    for name in ("method", *names):
        table.add_column(name)
    for method in found.metadata["methods"]:
        table.add_row(method, *(cells.get((method, name), "") for name in names))
    wide_console(120).print(table, markup=False)
    for gain in gains(found, k):
        first = ", ".join(map(str, gain.gained[:5]))
        say(
            f"{gain.source}: {len(gain.gained)} of {gain.n} features pass {gain.criterion} under {gain.after} and not "
            f"under {gain.before}" + (f" ({first}{', …' if len(gain.gained) > 5 else ''})" if first else "")
            + f"; {len(gain.lost)} the other way round"
        )  # fmt: skip


def _subject(
    model: str | None, dictionaries: list[str] | None, tokens: str | None, loading: Flags
) -> tuple[ql.Model, list[Any], ql.Tokens]:
    """A user's model, dictionaries and sample, or the embedded ones."""
    if model is None:
        from querylens_fast.demo.showcase import load_example

        if dictionaries or tokens:
            raise ValueError("dictionaries and tokens belong to a model: give --model too, or none of them")
        example = load_example()
        return example.model, example.dictionaries, ql.load_tokens(ASSETS / "tokens.safetensors", model=example.model)
    if not dictionaries or not tokens:
        raise ValueError("with a model, give its dictionaries (one for each layer) and --tokens too")
    loaded = ql.load_model(model, **loading)
    return loaded, [ql.load_dictionary(d) for d in dictionaries], ql.load_tokens(tokens, model=loaded)
