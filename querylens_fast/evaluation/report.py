"""The whole evaluation of a model's dictionaries, in one folder: sample → presets → scores → figures → one HTML page.

To the files of `evaluate`, each written once and resumed, come

    judged.parquet                      judgements of scores.parquet (`judge`), where you put them there
    figures/*.png, *.svg                `figures`
    report.html, report.json            the page (self-contained) and its numbers
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from querylens_fast.evaluation.contexts import feature_list
from querylens_fast.evaluation.evaluate import Evaluation, evaluate_signatures
from querylens_fast.evaluation.generation import steer
from querylens_fast.evaluation.means import Gain, MeanScore, gains, mean_scores
from querylens_fast.evaluation.report_data import Report, Shown
from querylens_fast.evaluation.scores import Case
from querylens_fast.evaluation.stability import PRESETS, StabilityRow, compare_groups
from querylens_fast.lens.compute import signatures
from querylens_fast.lens.presets import find_preset
from querylens_fast.relations.tables import RelationTable, read_table
from querylens_fast.runs.atomic_write import write_whole

K = 25
"""Signature size of the tables, where it is among those that are scored."""
SHOWN = 3
"""Features shown per dictionary, at the quartiles of activation strength."""
STEERED_STRENGTH = 1.5
"""Strength of the steered text, in units of the activation that reaches the larger KL target."""
PROMPT = "The next part"
REPORTED = ("input_score", "output_score", "embedding_coherence")


def evaluation_report(
    model: Any, dictionaries: Sequence[Any], tokens: Any, out: str | Path, *, prompt: str = PROMPT, **options: Any
) -> Report:
    """Evaluate dictionaries and write tables, figures and one HTML page.

    Args:
        model: As in `evaluate_signatures`.
        dictionaries: As in `evaluate_signatures`.
        tokens: As in `evaluate_signatures`.
        out: The folder; an interrupted report goes on.
        prompt: Begins the steered texts.
        **options: The fields of `EvaluationOptions`.

    Raises:
        ValueError: What `evaluate_signatures` raises; what is written stays.
        FileExistsError: The folder holds another report's files.
        ImportError: matplotlib or jinja2 is missing.
    """
    from querylens_fast.evaluation.figures import draw_figures
    from querylens_fast.evaluation.page import write_page

    found = evaluate_signatures(model, dictionaries, tokens, out, **options)
    k = K if K in found.scores.metadata["ks"] else max(found.scores.metadata["ks"])
    gained = gains(found.scores, k)
    report = Report(
        folder=found.folder,
        scores=found.scores,
        k=k,
        n_layers=found.context.model.n_layers,
        means=[m for score in REPORTED for m in mean_scores(found.scores, score)] + _judged(found.folder),
        gains=gained,
        rel_var=_rel_var(found),
        oracle=_oracle(found.scores, [case.label for case in found.cases], k),
        stability=_stability(found, k),
        shown=[s for case in found.cases for s in _shown(case, found, gained, prompt, k)],
    )
    write_page(report, draw_figures(report, found.folder / "figures"))
    write_whole(found.folder / "report.json", json.dumps(_numbers(report), indent=1))
    return report


def _judged(folder: Path) -> list[MeanScore]:
    """Means of the judgements in the folder, if there are any."""
    path = folder / "judged.parquet"
    return mean_scores(read_table(path), "interpretability") if path.exists() else []


def _rel_var(found: Evaluation) -> dict[str, dict[str, float]]:
    """Mean rel_var of the chosen features, by "side/order" and dictionary, for what the transport has energies of."""
    means: dict[str, dict[str, float]] = {}
    for side, order in found.transport.energies:
        for case in found.cases:
            vectors = case.dictionary.vectors(side, case.features)
            values, _ = found.transport.rel_var(vectors, side, order, case.dictionary.point(side))
            means.setdefault(f"{side}/{order}", {})[case.label] = float(values.mean())
    return means


def _stability(found: Evaluation, k: int) -> list[StabilityRow]:
    """Agreement of the top tokens between the transport's groups; empty for a transport without."""
    if found.transport.n_groups < 2:
        return []
    held = {side for side, order in found.transport.groups if order == "full"}
    presets = [preset for preset in map(find_preset, PRESETS) if preset.feature_vector in held]
    chosen = [(case.label, case.dictionary, case.features) for case in found.cases]
    return compare_groups(found.context.model, chosen, presets, found.transport, k)


FIXED = ("logit_lens_value", "query_lens_value_approx", "query_lens_value")
ADAPTIVE = "query_lens_value_adaptive"


def _oracle(scores: RelationTable, labels: Sequence[str], k_shown: int) -> dict[str, dict[str, float]]:
    """Output scores of the value transitions by dictionary, and of the best of the fixed ones for each feature."""
    table = scores.table(["method", "k", "source", "source_id", "output_score"]).to_pydict()
    by_method: dict[tuple[str, str], dict[int, float]] = {}
    for method, k, source, feature, score in zip(*table.values(), strict=True):
        if k == k_shown and score is not None and method in (*FIXED, ADAPTIVE):
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


def _shown(case: Case, found: Evaluation, gained: Sequence[Gain], prompt: str, k: int) -> list[Shown]:
    """Features at the quartiles of activation strength, and the first that scores under Query Lens only."""
    model, dictionary = found.context.model, case.dictionary
    order = case.features[case.sample.maximum[case.features].argsort(stable=True)]
    chosen = order[[len(order) * q // (SHOWN + 1) for q in range(1, SHOWN + 1)]].tolist()
    chosen += [g.gained[0] for g in gained if g.source == case.label and g.criterion == "output_score" and g.gained]
    chosen = list(dict.fromkeys(chosen))
    lists = _signatures(case, found, chosen)
    scores = _scores_of(case, found.scores, chosen, k)
    examples = feature_list(case.sample, dictionary, model, found.held_out, chosen)
    shown = []
    for i, feature in enumerate(chosen):
        own = {name: tokens[i] for name, tokens in lists.items()}
        contexts = [a.get_max_token_values(8) for a in (examples[i].activations or [])[:4]]
        text = None
        if case.promoted is not None:
            place = int((case.features == feature).nonzero())
            strength = STEERED_STRENGTH * float(case.promoted.alphas[place, -1])
            text = steer(model, dictionary, feature, strength, prompt)
        shown.append(Shown(case.label, feature, own, contexts, scores.get(feature, {}), text))
    return shown


BESIDE = ("logit_lens_key", "query_lens_key", "logit_lens_value", "query_lens_value")


def _signatures(case: Case, found: Evaluation, features: Sequence[int]) -> dict[str, list[list[tuple[str, float]]]]:
    """(token, score) of the ten top tokens of features, by preset."""
    lists = {}
    for preset in BESIDE:
        given = found.context.transport if preset.startswith("query") else None
        options = {"k": 10, "features": torch.tensor(features), "stats": "none", "progress": False}
        own = signatures(case.dictionary, found.context.model, preset=preset, transport=given, **options)
        pairs = zip(own.top_tokens, own.top_scores.tolist(), strict=True)
        lists[preset] = [list(zip(tokens, scores, strict=True)) for tokens, scores in pairs]
    return lists


def _scores_of(case: Case, scores: RelationTable, features: Sequence[int], k: int) -> dict[int, dict[str, float]]:
    """ "input PRESET" and "output PRESET" → score, of features."""
    import pyarrow.compute as pc

    wanted = (pc.field("source") == case.label) & (pc.field("k") == k) & pc.field("source_id").isin(features)
    columns = ["method", "k", "source", "source_id", "input_score", "output_score"]
    found: dict[int, dict[str, float]] = {}
    for row in scores.table(columns).filter(wanted).to_pylist():
        for side in ("input", "output"):
            if row["method"] in BESIDE and row[f"{side}_score"] is not None:
                found.setdefault(row["source_id"], {})[f"{side} {row['method']}"] = row[f"{side}_score"]
    return found


def _numbers(report: Report) -> dict[str, Any]:
    return {
        "metadata": report.scores.metadata,
        "means": [m.as_dict() for m in report.means],
        "gains": [g._asdict() for g in report.gains],
        "stability": [asdict(row) for row in report.stability],
        "rel_var": report.rel_var,
        "oracle": report.oracle,
    }
