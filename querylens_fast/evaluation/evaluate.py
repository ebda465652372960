"""The steps of an evaluation, each with its file in one folder: transport → samples → promoted tokens → scores.

    transport.safetensors               fitted on the first part of the tokens, unless one is given
    sample-LABEL.parquet                `feature_sample` on the rest of the tokens
    promoted-LABEL.parquet              `promoted_tokens` of the chosen features
    scores.parquet                      `score_methods`

A step is skipped when its file is there and of the same settings, so an interrupted evaluation goes on where it
stopped. Within `processes.joined` the fit, the promoted tokens and the scores are shared among the processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample, load_feature_sample
from querylens_fast.evaluation.methods import Context, Method, find_methods
from querylens_fast.evaluation.output_score import N_PROMOTED, promoted_tokens
from querylens_fast.evaluation.ranking import POSITIONS
from querylens_fast.evaluation.scores import Case, labels_of, score_methods
from querylens_fast.lens.options import from_keywords
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.relations.tables import RelationTable
from querylens_fast.runs import processes
from querylens_fast.runs.arguments import finite_number, whole_number
from querylens_fast.runs.run_record import agree
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
ABLATION_SEQUENCES = 4
"""Sequences that token_change and zero_out run on."""
SAMPLES = 3
"""Groups of a fitted transport, whose signatures are compared with one another; the paper compares three seeds."""
FEW = 100
"""Features of methods that run the model for each, where all features are scored."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is scored, on what.

    Attributes:
        transport: A transport of the model, with energies for the adaptive preset, or its file; None: one is fitted.
        fit_sequences: Sequences at the beginning of the tokens that it is fitted on, and that are left out after. None:
            a quarter, at most 1,024; ignored with ``transport``.
        methods: Presets, ablations at an activation ("token_change@5") and result files; None: the paper's, with
            tuned_lens where its file is given.
        tuned_lens: The parameter file of the method tuned_lens.
        k: Sizes of the signatures, all from one pass.
        n_features: Features sampled from each dictionary, 100 in the paper; 0: all with enough examples (but 100 for
            methods that run the model for each feature).
        min_examples: Activating sequences that a feature needs; 20 in the paper.
        positions: Where tokens are ranked for the output score: prefix, forced or generate; none: no output score.
        prefixes: As in `promoted_tokens`.
        seed: Of the samples.
        max_memory_gib: Bound on the working memory of passes through the model, GiB.
        progress: Show progress bars.
    """

    transport: Transport | str | Path | None = None
    fit_sequences: int | None = None
    methods: Sequence[str | Path] | None = None
    tuned_lens: str | Path | None = None
    k: Sequence[int] = (5, 10, 25, 50)
    n_features: int = 100
    min_examples: int = 20
    positions: Literal["prefix", "forced", "generate", "none"] = "prefix"
    prefixes: Sequence[str] | Tensor | None = None
    seed: int = 0
    max_memory_gib: float = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without a model. Raises ValueError for an option, by its name and value."""
        if self.positions not in (*POSITIONS, "none"):
            raise ValueError(f"positions is {self.positions!r}; expected one of {', '.join(POSITIONS)}, or none")
        for name, least in (("n_features", 0), ("min_examples", 1), ("seed", 0), ("fit_sequences", 1)):
            if name != "fit_sequences" or self.fit_sequences is not None:
                whole_number(name, getattr(self, name), least)
        finite_number("max_memory_gib", self.max_memory_gib, above=0)
        if not [whole_number("k", k) for k in self.k]:
            raise ValueError("k is empty; expected sizes of at least 1")
        if self.tuned_lens is not None and "tuned_lens" not in self.method_names:
            raise ValueError(f"tuned_lens is given, but none of the methods {list(self.method_names)} uses it")

    @property
    def method_names(self) -> Sequence[str | Path]:
        """The methods, by default those that have what they need."""
        if self.methods is not None:
            return self.methods
        return METHODS if self.tuned_lens is None else (*METHODS, "tuned_lens")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        folder: Where its files lie.
        scores: One row per dictionary, method, feature and k; see `score_methods`.
        cases: The dictionaries, with their samples and promoted tokens.
        context: The model and what the methods were given.
        transport: With its groups; ``context`` has it without, which standard errors would otherwise slow down.
        held_out: The tokens that activity was taken on.
    """

    folder: Path
    scores: RelationTable
    cases: list[Case]
    context: Context
    transport: Transport
    held_out: Tokens


def evaluate_signatures(
    model: Any, dictionaries: Sequence[Any], tokens: Any, out: str | Path, **options: Any
) -> Evaluation:
    """Score methods on features of every dictionary: input score, output score and coherence.

    Args:
        model: As in `signatures`, with a tokenizer.
        dictionaries: Those of one model, that can be run.
        tokens: As in `fit_transport`; the transport is fitted on the first part, activity is taken on the rest.
        out: The folder; an interrupted evaluation goes on.
        **options: The fields of `EvaluationOptions`.

    Raises:
        ValueError: No dictionaries, too few tokens, no tokenizer, or what the steps raise; what is written stays.
        FileExistsError: The folder holds files of other settings.
    """
    given = from_keywords(EvaluationOptions, options)
    model, loaded = as_model(model), [load_dictionary(d) for d in dictionaries]
    if not loaded:
        raise ValueError("dictionaries is an empty list; expected at least one")
    model.str_tokens([0])
    methods = find_methods(given.method_names)
    fit, held_out = _cut(as_tokens(tokens, model), given)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    transport = _transport(model, fit, folder, given)
    ungrouped = replace(transport, groups={}, group_centres=None)
    ablated = fit.head(ABLATION_SEQUENCES)
    context = Context(model, ungrouped, ablated, given.tuned_lens, given.max_memory_gib)
    _try_out(methods, context, loaded, given.k)
    hidden = not (given.progress and processes.current().leads)
    bar = tqdm(list(zip(loaded, labels_of(loaded), strict=True)), desc="dictionaries", disable=hidden)
    cases = [_case(model, dictionary, label, held_out, folder, given) for dictionary, label in bar]
    scores = score_methods(cases, context, methods, ks=given.k, out=folder / "scores.parquet", progress=given.progress)
    return Evaluation(folder, scores, cases, context, transport, held_out)


def _try_out(
    methods: Sequence[Method], context: Context, dictionaries: Sequence[Dictionary], ks: Sequence[int]
) -> None:
    """Raise what a method lacks before anything long begins: name one feature of each dictionary by each preset."""
    for method in methods:
        for dictionary in dictionaries:
            if method.path is not None:
                method.sizes(ks)
            elif method.preset is not None and not method.preset.is_ablation:
                method.token_ids(context, dictionary, torch.zeros(1, dtype=torch.int64), max(ks))


def _cut(tokens: Tokens, given: EvaluationOptions) -> tuple[Tokens, Tokens]:
    """(sequences to fit on, sequences to look at)."""
    n = len(tokens.ids)
    cut = min(1024, max(1, n // 4)) if given.fit_sequences is None else given.fit_sequences
    if given.transport is not None:
        return tokens.head(min(n, ABLATION_SEQUENCES)), tokens
    if not 1 <= cut < n:
        raise ValueError(f"fit_sequences is {cut}; expected 1 to {n - 1}: the sample has {n} sequences")
    return tokens.head(cut), Tokens(tokens.ids[cut:], tokens.valid_mask[cut:], tokens.source)


def _transport(model: Model, tokens: Tokens, folder: Path, given: EvaluationOptions) -> Transport:
    """The transport given, that of the folder, or a new one."""
    if given.transport is not None:
        return given.transport if isinstance(given.transport, Transport) else load_transport(given.transport)
    path, group = folder / "transport.safetensors", processes.current()
    if not path.exists():
        groups = min(SAMPLES, len(tokens.ids))
        limits: dict[str, Any] = {"max_memory_gib": given.max_memory_gib, "progress": given.progress}
        fitted = fit_transport(model, tokens, energy="probes", groups=groups, **limits)
        if group.leads:
            fitted.save(path)
    group.wait("transport")
    found = load_transport(path)  # also what was fitted: here matrices are the sums of their groups
    found.check_model(model)
    if found.metadata["tokens_digest"] != tokens.digest:
        raise FileExistsError(f"{str(path)!r} was fitted on other tokens; delete it or choose another folder")
    return found


def _case(
    model: Model, dictionary: Dictionary, label: str, tokens: Tokens, folder: Path, given: EvaluationOptions
) -> Case:
    """A dictionary with its sample, the features chosen, and the tokens that they promote."""
    name = label.replace("/", "-")
    sample = _sample(model, dictionary, tokens, folder / f"sample-{name}.parquet", given)
    chosen = sample.choose(given.n_features or sample.n_features, given.min_examples, given.seed)
    few = None if given.n_features else sample.choose(FEW, given.min_examples, given.seed)
    if given.positions == "none":
        return Case(dictionary, label, chosen, sample, None, few)
    promoted = promoted_tokens(
        dictionary,
        model,
        chosen,
        prefixes=given.prefixes,
        n_tokens=min(model.vocab_size, max(N_PROMOTED, *given.k)),
        positions=given.positions,
        seed=given.seed,
        out=folder / f"promoted-{name}.parquet",
        progress=given.progress,
    )
    return Case(dictionary, label, chosen, sample, promoted, few)


def _sample(
    model: Model, dictionary: Dictionary, tokens: Tokens, path: Path, given: EvaluationOptions
) -> FeatureSample:
    group = processes.current()
    if group.leads and not path.exists():
        examples = max(20, given.min_examples)
        limits = {"max_memory_gib": given.max_memory_gib, "progress": given.progress}
        feature_sample(dictionary, model, tokens, n_examples=examples, out=path, **limits)
    group.wait("sample")
    found = load_feature_sample(path)
    made = [found.metadata[name] for name in ("tokens_digest", "dictionary_fingerprint", "n_examples")]
    same = agree(made, [tokens.digest, dictionary.fingerprint, max(20, given.min_examples)])
    if not same or model.difference_from(found.metadata) is not None:
        raise FileExistsError(
            f"{str(path)!r} is a sample of other tokens, another dictionary or model, or another number of examples; "
            "delete it or choose another folder"
        )
    return found
