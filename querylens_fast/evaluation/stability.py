"""Stability: how far the top tokens of features agree between independent token samples (paper, Table 9).

One fit with a group for each sample, at the cost of fitting them one after the other, gives their transports; the same
features are read out under each, and the Jaccard index of their top-k token sets is averaged over pairs of samples.
The paper finds 0.849 (key) and 0.888 (value) at 1,024 sequences of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.compute import signatures
from querylens_fast.lens.presets import Preset, find_preset
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens, load_tokens
from querylens_fast.runs.arguments import whole_number
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.growth import jaccard
from querylens_fast.transport.jacobians import Order
from querylens_fast.transport.transport import Transport

PRESETS = ("query_lens_key", "query_lens_value")


@dataclass(frozen=True)
class StabilityRow:
    """One dictionary under one preset; the Jaccard index of a feature is its mean over pairs of samples."""

    dictionary: str
    layer: int
    preset: str
    n_features: int
    jaccard: float
    """Mean over the features."""
    standard_error: float
    """Of that mean, over the features."""
    median: float
    lowest_decile: float


@dataclass(frozen=True)
class Stability:
    """What `stability` found: a row for every dictionary and preset, and the size of one sample."""

    rows: list[StabilityRow]
    samples: int
    sequences: int
    tokens: int
    k: int

    def mean(self, preset: str) -> float:
        """The mean over dictionaries, each with equal weight, as in the paper's Table 9."""
        found = [row.jaccard for row in self.rows if row.preset == preset]
        if not found:
            raise ValueError(f"preset is {preset!r}; these are rows of {sorted({row.preset for row in self.rows})}")
        return sum(found) / len(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        means = {preset: self.mean(preset) for preset in dict.fromkeys(row.preset for row in self.rows)}
        return {**asdict(self), "means": means}


def stability(
    model: Any,
    dictionaries: Any,
    tokens: Tokens | Tensor | str | Path,
    *,
    seeds: int = 3,
    num_samples: int | None = None,
    max_length: int = 32,
    presets: Sequence[str | Preset] = PRESETS,
    features: int = 100,
    k: int = 25,
    seed: int = 42,
    max_memory_gib: float = 2.0,
    progress: bool = True,
) -> Stability:
    """Compare features' top tokens between independent samples of a corpus.

    Args:
        model: As in `fit_transport`.
        dictionaries: One dictionary or several, loaded or to be loaded.
        tokens: A sample, whose sequences are shuffled and dealt out to the samples; or what `load_tokens` reads, of
            which as many are drawn as are needed.
        seeds: How many samples to compare, at least 2.
        num_samples: Sequences in each; default 1,024 of a dataset, else the sample's divided by ``seeds``.
        max_length: Tokens a sequence, for text and datasets.
        presets: Presets with the transition "full" or "first_order".
        features: Features drawn from each dictionary; all, if it has fewer.
        k: Top tokens that are compared.
        seed: Of the draws.
        max_memory_gib: As in `fit_transport`.
        progress: Show a progress bar.

    Raises:
        ValueError: Bad arguments, or fewer sequences than the samples need.
    """
    model = as_model(model)
    lenses = [find_preset(preset) for preset in presets]
    given = [dictionaries] if isinstance(dictionaries, (Dictionary, str, Path)) else list(dictionaries)
    loaded = [load_dictionary(d) for d in given]
    _check(model, loaded, lenses, seeds, num_samples, features, k, seed)
    sample = _samples(model, tokens, seeds, num_samples, max_length, seed)
    orders: list[Order] = ["first_order" if p.stream_transition == "first_order" else "full" for p in lenses]
    transport = fit_transport(
        model,
        sample,
        sides=[p.feature_vector for p in lenses],
        orders=orders,
        groups=seeds,
        max_memory_gib=max_memory_gib,
        progress=progress,
    )
    chosen = []
    for dictionary in loaded:
        order = torch.randperm(dictionary.n_features, generator=torch.Generator().manual_seed(seed))
        chosen.append((dictionary.name, dictionary, order[:features].sort().values))
    return Stability(
        compare_groups(model, chosen, lenses, transport, k),
        seeds,
        len(sample.ids) // seeds,
        transport.n_valid // seeds,
        k,
    )


def _check(
    model: Model,
    dictionaries: Sequence[Dictionary],
    presets: Sequence[Preset],
    seeds: int,
    num_samples: int | None,
    features: int,
    k: int,
    seed: int,
) -> None:
    if not dictionaries:
        raise ValueError("dictionaries is empty; give at least one")
    for dictionary in dictionaries:
        dictionary.check_model(model)
    if not presets or any(p.stream_transition not in ("first_order", "full") for p in presets):
        raise ValueError(
            f"presets are {[p.name for p in presets]}; expected some whose transition is full or first_order"
        )
    smallest = {"seeds": (seeds, 2), "num_samples": (1 if num_samples is None else num_samples, 1)}
    for name, (value, low) in {**smallest, "features": (features, 1), "k": (k, 1), "seed": (seed, 0)}.items():
        whole_number(name, value, low)


def _samples(model: Model, tokens: Any, seeds: int, num_samples: int | None, max_length: int, seed: int) -> Tokens:
    """All samples' sequences together, as many of each; a fit's groups take them in turn."""
    if isinstance(tokens, (str, Path)) and not Path(tokens).is_file():
        n = seeds * (num_samples or 1024)
        return load_tokens(tokens, model=model, num_samples=n, max_length=max_length, seed=seed)
    if isinstance(tokens, (str, Path)):
        tokens = load_tokens(tokens, model=model, max_length=max_length)
    whole = as_tokens(tokens, model)
    each = len(whole.ids) // seeds if num_samples is None else num_samples
    if not 1 <= each * seeds <= len(whole.ids):
        raise ValueError(
            f"tokens from {whole.source} are {len(whole.ids)} sequences; expected at least {seeds * max(1, each)}, for "
            f"{seeds} samples of {max(1, each)} that share none"
        )
    picked = torch.randperm(len(whole.ids), generator=torch.Generator().manual_seed(seed))[: each * seeds]
    return Tokens(whole.ids[picked], whole.valid_mask[picked], whole.source, whole.details, whole.mask_is_known)


def compare_groups(
    model: Model,
    chosen: Sequence[tuple[str, Dictionary, Tensor]],
    presets: Sequence[Preset],
    transport: Transport,
    k: int,
) -> list[StabilityRow]:
    """Agreement of features' top tokens between the groups of a transport, a row per dictionary and preset.

    Args:
        model: The model.
        chosen: (name, dictionary, feature ids [n]) of each.
        presets: With the transition "full" or "first_order".
        transport: With at least two groups, each a sample.
        k: Top tokens that are compared.
    """
    lists: dict[tuple[int, int], list[Tensor]] = {}
    for group in range(transport.n_groups):
        alone = transport.group(group)
        for i, (_, dictionary, ids) in enumerate(chosen):
            for j, preset in enumerate(presets):
                found = signatures(dictionary, model, preset=preset, transport=alone, k=k, features=ids, stats="none")
                lists.setdefault((i, j), []).append(found.top_ids)
    return [_row(chosen[i][0], chosen[i][1].layer, presets[j].name, ids) for (i, j), ids in lists.items()]


def _row(name: str, layer: int, preset: str, lists: Sequence[Tensor]) -> StabilityRow:
    """The row of one dictionary and preset, from the top tokens [n, k] under each sample."""
    each = torch.stack([jaccard(a, b) for a, b in combinations(lists, 2)]).mean(0)
    error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0
    median, decile = float(each.median()), float(each.quantile(0.1))
    return StabilityRow(name, layer, preset, len(each), float(each.mean()), error, median, decile)
