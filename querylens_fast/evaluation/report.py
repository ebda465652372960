"""The whole evaluation of a model's dictionaries, in one folder: sample → presets → scores → figures → one HTML page.

Every step writes its own file and is skipped when that file is there and of the same settings, so an interrupted report
goes on where it stopped:

    transport.safetensors               fitted on the first part of the tokens, unless one is given
    sample-LABEL.parquet                `feature_sample` on the rest of the tokens
    promoted-LABEL.parquet              `promoted_tokens` of the chosen features
    scores.parquet                      `score_methods`
    figures/*.png, *.svg                `figures`
    report.html, report.json            the page (self-contained) and its numbers
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample, load_feature_sample
from querylens_fast.evaluation.generation import steer
from querylens_fast.evaluation.methods import Context, find_methods
from querylens_fast.evaluation.output_score import promoted_tokens
from querylens_fast.evaluation.report_data import Report, Shown
from querylens_fast.evaluation.scores import Case, labels_of, mean_scores, score_methods
from querylens_fast.lens.compute import signatures
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.relations.tables import RelationTable
from querylens_fast.runs import processes
from querylens_fast.runs.atomic_write import write_whole
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.transport import Transport, load_transport

METHODS = (
    "logit_lens_key",
    "query_lens_key_approx",
    "query_lens_key",
    "logit_lens_value",
    "query_lens_value_approx",
    "query_lens_value",
    "query_lens_value_adaptive",
    "token_change",
    "zero_out",
)
"""The methods of the paper's tables that need no further file, and the adaptive preset."""
KS = (5, 10, 25, 50)
K = 25
"""Signature size of the tables; `KS` is the sweep."""
ABLATION_SEQUENCES = 4
"""Sequences that token_change and zero_out run on."""
SHOWN = 3
"""Features shown per dictionary, at the quartiles of activation strength."""
STEERED_STRENGTH = 1.5
"""Strength of the steered text, in units of the activation that reaches the larger KL target."""
PROMPT = "The next part"


def evaluation_report(
    model: Any,
    dictionaries: Sequence[Any],
    tokens: Tokens | Tensor | str | Path,
    out: str | Path,
    *,
    transport: Transport | str | Path | None = None,
    fit_sequences: int | None = None,
    methods: Sequence[str | Path] = METHODS,
    tuned_lens: str | Path | None = None,
    n_features: int = 100,
    min_examples: int = 20,
    prefixes: Sequence[str] | Tensor | None = None,
    prompt: str = PROMPT,
    seed: int = 0,
    max_memory_gib: float = 2.0,
    progress: bool = True,
) -> Report:
    """Evaluate dictionaries and write tables, figures and one HTML page.

    Args:
        model: As in `signatures`, with a tokenizer.
        dictionaries: Those of one model, that can be run.
        tokens: As in `fit_transport`; the transport is fitted on the first ``fit_sequences``, activity is taken on the
            rest.
        out: The folder.
        transport: A transport of the model with energies, or its file; None: one is fitted.
        fit_sequences: None: a quarter of the sequences, at most 1,024; ignored with ``transport``.
        methods: Presets and result files, as in `find_methods`.
        tuned_lens: The params file, for the method tuned_lens.
        n_features: Features sampled from each dictionary; 100 in the paper.
        min_examples: Activating sequences that a sampled feature needs; 20 in the paper.
        prefixes: As in `promoted_tokens`.
        prompt: Begins the steered texts.
        seed: Of the samples.
        max_memory_gib: As in `fit_transport`.
        progress: Show progress bars.

    Raises:
        ValueError: No dictionaries, too few tokens, no tokenizer, or what the steps raise; what is written stays.
        FileExistsError: The folder holds another report's files.
        ImportError: matplotlib or jinja2 is missing.
    """
    from querylens_fast.evaluation.figures import draw_figures
    from querylens_fast.evaluation.page import write_page

    model = as_model(model)
    loaded = [load_dictionary(d) for d in dictionaries]
    if not loaded:
        raise ValueError("dictionaries is an empty list; expected at least one")
    model.str_tokens([0])
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    group = processes.current()
    fit, held_out = _cut(as_tokens(tokens, model), fit_sequences, transport is not None)
    context = Context(
        model,
        _transport(model, fit, transport, folder, max_memory_gib, progress),
        fit.head(ABLATION_SEQUENCES),
        tuned_lens,
        max_memory_gib,
    )
    labels = labels_of(loaded)
    pairs = list(zip(loaded, labels, strict=True))
    for dictionary, label in group.share(pairs):
        _sample(model, dictionary, label, held_out, folder, min_examples, progress)
    group.wait("feature samples")
    bar = tqdm(pairs, desc="dictionaries", disable=not (progress and group.leads))
    settings = {"n_features": n_features, "min_examples": min_examples, "prefixes": prefixes, "seed": seed}
    cases = [_case(model, dictionary, label, held_out, folder, progress, **settings) for dictionary, label in bar]
    scores = score_methods(
        cases, context, find_methods(methods), ks=KS, out=folder / "scores.parquet", progress=progress
    )
    report = Report(
        folder,
        scores,
        [m for score in ("input_score", "output_score", "embedding_coherence") for m in mean_scores(scores, score)],
        _rel_var(cases, context.transport),
        _oracle(scores, labels),
        [s for case in cases for s in _shown(case, context, held_out, scores, prompt)] if group.leads else [],
    )
    if group.leads:
        figures = draw_figures(report, folder / "figures")
        write_page(report, figures)
        write_whole(folder / "report.json", json.dumps(_numbers(report), indent=1))
    group.wait("report")
    return report


def _cut(tokens: Tokens, fit_sequences: int | None, given: bool) -> tuple[Tokens, Tokens]:
    """(sequences to fit on, sequences to look at)."""
    n = len(tokens.ids)
    cut = min(1024, max(1, n // 4)) if fit_sequences is None else fit_sequences
    if given:
        return tokens.head(min(n, ABLATION_SEQUENCES)), tokens
    if not 1 <= cut < n:
        raise ValueError(f"fit_sequences is {cut}; expected 1 to {n - 1}: the sample has {n} sequences")
    return tokens.head(cut), Tokens(tokens.ids[cut:], tokens.valid_mask[cut:], tokens.source)


def _transport(
    model: Model,
    tokens: Tokens,
    given: Transport | str | Path | None,
    folder: Path,
    max_memory_gib: float,
    progress: bool,
) -> Transport:
    path = folder / "transport.safetensors"
    if given is not None:
        return given if isinstance(given, Transport) else load_transport(given)
    if path.exists():
        found = load_transport(path)
        found.check_model(model)
        if found.metadata["tokens_digest"] != tokens.digest:
            raise FileExistsError(f"{str(path)!r} was fitted on other tokens; delete it or choose another folder")
        return found
    found = fit_transport(model, tokens, energy="probes", max_memory_gib=max_memory_gib, progress=progress)
    if processes.current().leads:
        found.save(path)
    return found


def _case(
    model: Model,
    dictionary: Dictionary,
    label: str,
    tokens: Tokens,
    folder: Path,
    progress: bool,
    *,
    n_features: int,
    min_examples: int,
    prefixes: Sequence[str] | Tensor | None,
    seed: int,
) -> Case:
    sample = _sample(model, dictionary, label, tokens, folder, min_examples, progress)
    chosen = sample.choose(n_features, min_examples, seed)
    out = folder / f"promoted-{label.replace('/', '-')}.parquet"
    promoted = promoted_tokens(dictionary, model, chosen, prefixes=prefixes, out=out, progress=progress)
    return Case(dictionary, label, chosen, sample, promoted)


def _sample(
    model: Model, dictionary: Dictionary, label: str, tokens: Tokens, folder: Path, min_examples: int, progress: bool
) -> FeatureSample:
    """Where the dictionary's features are active: from its file in the folder, or computed and written there."""
    path = folder / f"sample-{label.replace('/', '-')}.parquet"
    if not path.exists():
        n_examples = max(20, min_examples)
        return feature_sample(dictionary, model, tokens, n_examples=n_examples, out=path, progress=progress)
    sample = load_feature_sample(path)
    wanted = (tokens.digest, dictionary.fingerprint)
    if (sample.metadata["tokens_digest"], sample.metadata["dictionary_fingerprint"]) != wanted:
        raise FileExistsError(f"{str(path)!r} is of another sample; delete it or choose another folder")
    return sample


def _rel_var(cases: Sequence[Case], transport: Transport | None) -> dict[str, dict[str, float]]:
    """Mean rel_var of the chosen features, by "side/order" and dictionary, for what the transport has energies of."""
    found: dict[str, dict[str, float]] = {}
    for (side, order), _ in () if transport is None else transport.energies.items():
        for case in cases:
            vectors = case.dictionary.vectors(side, case.features)
            values, _ = transport.rel_var(vectors, side, order, case.dictionary.point(side))  # type: ignore[union-attr]
            found.setdefault(f"{side}/{order}", {})[case.label] = float(values.mean())
    return found


FIXED = ("logit_lens_value", "query_lens_value_approx", "query_lens_value")
ADAPTIVE = "query_lens_value_adaptive"


def _oracle(scores: RelationTable, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Output scores of the value transitions by dictionary, and of the best of the fixed ones for each feature."""
    table = scores.table(["method", "k", "source", "source_id", "output_score"]).to_pydict()
    by_method: dict[tuple[str, str], dict[int, float]] = {}
    for method, k, source, feature, score in zip(*table.values(), strict=True):
        if k == K and score is not None and method in (*FIXED, ADAPTIVE):
            by_method.setdefault((source, method), {})[feature] = score
    found: dict[str, dict[str, float]] = {}
    for label in labels:
        own = {method: by_method[label, method] for method in (*FIXED, ADAPTIVE) if (label, method) in by_method}
        if not set(FIXED) <= set(own):
            continue
        means = {method: sum(values.values()) / len(values) for method, values in own.items()}
        best = [max(own[method][f] for method in FIXED) for f in own[FIXED[0]]]
        found[label] = {**means, "oracle": sum(best) / len(best)}
    return found


def _shown(case: Case, context: Context, tokens: Tokens, scores: RelationTable, prompt: str) -> list[Shown]:
    """The features at the quartiles of activation strength among those scored."""
    from querylens_fast.evaluation.contexts import feature_list

    model, dictionary = context.model, case.dictionary
    order = case.features[case.sample.maximum[case.features].argsort(stable=True)]
    chosen = order[[len(order) * q // (SHOWN + 1) for q in range(1, SHOWN + 1)]].unique()
    names = ("logit_lens_key", "query_lens_key", "logit_lens_value", "query_lens_value")
    found = {
        name: signatures(
            dictionary, model, preset=name, k=10, features=chosen, stats="none",
            transport=context.transport if name.startswith("query") else None, progress=False,
        )
        for name in names
    }  # fmt: skip
    table = scores.table(["method", "k", "source", "source_id", "input_score", "output_score"]).to_pylist()
    examples = feature_list(case.sample, dictionary, model, tokens, chosen)
    shown = []
    for i, feature in enumerate(chosen.tolist()):
        lists = {name: list(zip(s.top_tokens[i], s.top_scores[i].tolist(), strict=True)) for name, s in found.items()}
        own = [r for r in table if r["source"] == case.label and r["source_id"] == feature and r["k"] == K]
        values = {
            f"{side} {r['method']}": r[f"{side}_score"]
            for r in own if r["method"] in names for side in ("input", "output") if r[f"{side}_score"] is not None
        }  # fmt: skip
        contexts = [a.get_max_token_values(8) for a in (examples[i].activations or [])[:4]]
        text = None
        if case.promoted is not None:
            place = int((case.features == feature).nonzero())
            strength = STEERED_STRENGTH * float(case.promoted.alphas[place, -1])
            text = steer(dictionary, model, feature, strength, prompt)
        shown.append(Shown(case.label, feature, lists, contexts, values, text))
    return shown


def _numbers(report: Report) -> dict[str, Any]:
    return {
        "metadata": report.scores.metadata,
        "means": [m.as_dict() for m in report.means],
        "rel_var": report.rel_var,
        "oracle": report.oracle,
    }
