"""Evaluation: does a signature name what activates the feature? The paper's input score (§5.1).

For each feature, A is the list of its maximally activating tokens, one for each of the token sequences that activate
it most; I(T) is the share of A (repetitions counted) that is in the signature T. Features with too few activating
sequences have no A and are left out, and counted. Means are given by layer with a 95 % interval, mean ± 1.96 s/√n over
features, and over dictionaries with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.lens.ablations import activations
from querylens_fast.lens.compute import signatures
from querylens_fast.lens.presets import find_preset
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.jacobians import Order
from querylens_fast.transport.transport import ORDERS, Transport, load_transport

Z_95 = 1.959964


@dataclass(frozen=True)
class MaxActivating:
    """The sequences that activate each feature most: tokens [n, m] (−1 where there are fewer) and peaks [n, m]."""

    tokens: Tensor
    peaks: Tensor

    @property
    def counts(self) -> Tensor:
        """Activating sequences found for each feature, at most m, [n]."""
        return (self.tokens >= 0).sum(1)


@dataclass(frozen=True)
class InputScore:
    """I(T) of one preset for one dictionary (dictionary None: the mean over dictionaries, equal weights)."""

    preset: str
    dictionary: str | None
    layer: int | None
    mean: float
    low: float
    high: float
    n_features: int
    n_left_out: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def max_activating_tokens(
    model: Model, dictionary: Dictionary, tokens: Tokens, n_examples: int = 20, rows: int = 16
) -> MaxActivating:
    """Run the model and the dictionary over the sample and keep each feature's strongest sequences.

    Args:
        model: The model.
        dictionary: One that can be run.
        tokens: The sample; each sequence gives at most one token, the one at the feature's peak among valid positions.
        n_examples: Sequences kept for each feature, m.
        rows: Sequences run at once.
    """
    if n_examples < 1:
        raise ValueError(f"n_examples is {n_examples}; expected at least 1")
    n = dictionary.n_features
    peaks = torch.zeros(n, 0, device=model.device)
    found = torch.zeros(n, 0, dtype=torch.int64, device=model.device)
    for start in range(0, len(tokens.ids), rows):
        ids = tokens.ids[start : start + rows].to(model.device)
        valid = tokens.valid_mask[start : start + rows].to(model.device)
        acts = activations(model, dictionary, ids)
        strongest = acts.masked_fill(~valid[..., None], 0).max(dim=1)
        at_peak = ids.gather(1, strongest.indices)
        peaks = torch.cat([peaks, strongest.values.mT.float()], 1)
        found = torch.cat([found, at_peak.mT], 1)
        kept = peaks.topk(min(n_examples, peaks.shape[1]), dim=1)
        peaks, found = kept.values, found.gather(1, kept.indices)
    return MaxActivating(found.masked_fill(peaks <= 0, -1).cpu(), peaks.cpu())


def input_scores(signature_ids: Tensor, activating: MaxActivating) -> Tensor:
    """I(T) of each feature, [n], for signature token ids [n, k]; NaN for features with no activating sequence."""
    member = (activating.tokens[:, :, None] == signature_ids.cpu()[:, None, :]).any(-1)
    counts = activating.counts
    return torch.where(counts > 0, member.sum(1) / counts.clamp_min(1), torch.nan)


def evaluate_presets(
    model: Model,
    dictionaries: Sequence[Dictionary],
    held_out: Tokens,
    transport: Transport | Tokens | str | Path,
    presets: Sequence[str],
    k: int = 25,
    n_examples: int = 20,
    min_examples: int = 5,
) -> list[InputScore]:
    """The input score of each preset for each dictionary and over them.

    Args:
        model: The model.
        dictionaries: Ones that can be run.
        held_out: The sample in which activating tokens are found; not the one the transport was fitted on.
        transport: The transport, its file, or a sample to fit one on.
        presets: Preset names.
        k: Signature size.
        n_examples: Activating sequences for each feature.
        min_examples: Features with fewer are left out (and counted).

    Raises:
        ValueError: An ablation or a tuned lens, which have no place here, and what `signatures` raises.
    """
    wanted = [find_preset(p) for p in presets]
    for lens in wanted:
        if lens.is_ablation or lens.stream_transition == "tuned_lens":
            raise ValueError(f"preset {lens.name!r} cannot be evaluated here; use presets that a transport serves")
    moving = {lens.stream_transition for lens in wanted if lens.needs_transport}
    if not moving:
        fitted = None
    elif isinstance(transport, Tokens):
        adaptive = "adaptive" in moving
        orders: list[Order] = [order for order in ORDERS if adaptive or order in moving]
        fitted = fit_transport(model, transport, orders=orders, energy="probes" if adaptive else "none")
    else:
        fitted = transport if isinstance(transport, Transport) else load_transport(transport)
    scores: list[InputScore] = []
    labels = _labels(dictionaries)
    bar = tqdm(dictionaries, desc="activating tokens", unit="dictionary")
    activating = [max_activating_tokens(model, dictionary, held_out, n_examples) for dictionary in bar]
    for preset in presets:
        found = []
        for dictionary, label, examples in zip(dictionaries, labels, activating, strict=True):
            chosen = examples.counts >= min_examples
            given = fitted if find_preset(preset).needs_transport else None
            ids = signatures(dictionary, model, preset=preset, transport=given, k=k, stats="none").top_ids
            values = input_scores(ids, examples)[chosen]
            found.append(_summary(preset, label, dictionary.layer, values, int((~chosen).sum())))
        scores += [*found, _over_dictionaries(preset, found)]
    return scores


def _labels(dictionaries: Sequence[Dictionary]) -> list[str]:
    """A short name of each: the last parts of its own, as many as tell them apart, else with its place in the list."""
    names = [Path(d.name).parts or ("",) for d in dictionaries]
    for n in range(1, max(map(len, names), default=1) + 1):
        labels = ["/".join(parts[-n:]) for parts in names]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(parts)} ({i})" for i, parts in enumerate(names)]


def _summary(preset: str, label: str, layer: int, values: Tensor, left_out: int) -> InputScore:
    values = values.double()
    mean = float(values.mean()) if len(values) else math.nan
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    low, high = mean - Z_95 * error, mean + Z_95 * error
    return InputScore(preset, label, layer, mean, low, high, len(values), left_out)


def _over_dictionaries(preset: str, rows: Sequence[InputScore]) -> InputScore:
    mean = sum(r.mean for r in rows) / len(rows)
    error = sum(((r.high - r.mean) / Z_95) ** 2 for r in rows) ** 0.5 / len(rows)
    n, left_out = sum(r.n_features for r in rows), sum(r.n_left_out for r in rows)
    return InputScore(preset, None, None, mean, mean - Z_95 * error, mean + Z_95 * error, n, left_out)


def as_table(scores: Sequence[InputScore]) -> dict[str, dict[str | None, InputScore]]:
    """preset → dictionary name (None: over all) → score."""
    table: dict[str, dict[str | None, InputScore]] = {}
    for score in scores:
        table.setdefault(score.preset, {})[score.dictionary] = score
    return table
