"""Sample size: do two independent halves of a sample give features the same top tokens?

A transport is a mean over sequences, so its top tokens change from sample to sample (paper, Table 9: mean Jaccard
0.849 for keys and 0.888 for values between seeds of 1,024 × 32 tokens). `Agreement` compares the halves of a fit while
it runs: the Jaccard index of the top k token sets for the same features, the median over features. Each half has half
of the sequences, so the figure is that of two fits of that size; the whole fit is better than either.

`sequences_needed` extrapolates. The noise of a mean over n sequences falls with 1/√n, and with it, as long as few
tokens are exchanged, the share 1 − o of them that is, where o = 2J/(1 + J) is the overlap of two sets of equal size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary, neuron_dictionary
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.runs import processes as ranks
from querylens_fast.topk.api import streamed_topk
from querylens_fast.transport.jacobians import Order, Side
from querylens_fast.transport.sums import JacobianSums
from querylens_fast.transport.transport import matrix_at

FEATURES_EACH = 64
"""Features drawn from each dictionary."""


@dataclass(frozen=True)
class Probe:
    """Some features of one dictionary: vectors [n, D] that act at a point."""

    name: str
    side: Side
    point: int
    vectors: Tensor


def probes(model: Model, sides: Sequence[Side], dictionaries: Sequence[Dictionary] | None, seed: int) -> list[Probe]:
    """Features to compare: of the dictionaries given, else of the MLP neurons of every layer.

    Raises:
        ValueError: A dictionary of another model, or none given for a model without plain MLP neurons.
    """
    if dictionaries is None:
        try:
            dictionaries = [neuron_dictionary(model, layer) for layer in range(model.n_layers)]
        except UnsupportedModelError as error:
            raise ValueError(
                f"until= compares features, by default MLP neurons: pass dictionaries= ({error})"
            ) from error
    found = []
    for dictionary in dictionaries:
        dictionary.check_model(model)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(dictionary.n_features, generator=generator)[:FEATURES_EACH].sort().values
        for side in sides:
            found.append(
                Probe(
                    f"{side}s of {dictionary.name}",
                    side,
                    dictionary.point(side),
                    dictionary.vectors(side, ids).to(model.device),
                )
            )
    return found


class Agreement:
    """The Jaccard index of top tokens between the even and the odd groups of a running fit."""

    def __init__(self, model: Model, probed: Sequence[Probe], order: Order, k: int) -> None:
        self.model, self.probed, self.k = model, probed, k
        self.order: Order = order

    @torch.no_grad()
    def __call__(self, fitted: JacobianSums, counts: Tensor, centres: Tensor) -> tuple[float, float, str]:
        """(the lower of the sides' medians over all features, the same of `middle`, the dictionary with the lowest
        median and that median).

        Args:
            fitted: The sums so far, of G groups; this process's share of them.
            counts: Valid positions of each group over all processes, [G].
            centres: Sums of the token embeddings of each group, [G, D].
        """
        process = ranks.current()
        found: dict[Side, list[Tensor]] = {}
        medians: dict[str, float] = {}
        for probe in self.probed:
            summed = matrix_at(fitted.sums[probe.side, self.order], probe.side, self.order, probe.point)
            halves = process.sum_(torch.stack([summed[half::2].sum(0) for half in (0, 1)]))
            lists = []
            for half, matrix in enumerate(halves):
                n = counts[half::2].sum()
                matrix = matrix / n
                moved = probe.vectors.to(matrix) @ matrix.mT
                if self.order == "first_order":
                    moved = moved + probe.vectors
                lists.append(top_tokens(self.model, moved, probe.side, centres[half::2].sum(0) / n, self.k))
            each = jaccard(*lists)
            found.setdefault(probe.side, []).append(each)
            medians[probe.name] = float(each.median())
        sides = [torch.cat(values) for values in found.values()]
        lowest = [min(float(side.median()) for side in sides), min(map(middle, sides))]
        # One process decides for all: their sums might differ in the last bit.
        reached = process.sum_(torch.tensor(lowest if process.leads else [0.0, 0.0], dtype=torch.float64)).tolist()
        worst = min(medians, key=medians.__getitem__)
        return reached[0], reached[1], f"{medians[worst]:.3f} for {worst}"


def top_tokens(model: Model, moved: Tensor, side: Side, centre: Tensor, k: int) -> Tensor:
    """[n, k] ids of the highest tokens of transported vectors [n, D]: unembed (value), centered cosine (key)."""
    if side == "value":
        x, bias = model.final_norm(at_least_float32(moved)).to(model.W_U.dtype), model.b_U
        bias = None if bias is None else at_least_float32(bias)
        found = streamed_topk(x, model.W_U, k, bias=bias, bottom=False)
    else:
        embedded = at_least_float32(model.W_E) * model.embed_scale - centre
        found = streamed_topk(moved.to(embedded), torch.nn.functional.normalize(embedded, dim=1), k, bottom=False)
    if found.top_ids is None:
        raise ValueError("the top side was not computed")
    return found.top_ids


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """[n] Jaccard indices of two lists [n, k] of ids, each without repeats."""
    shared = (first[:, :, None] == second[:, None, :]).any(2).sum(1).double()
    return shared / (first.shape[1] + second.shape[1] - shared)


def middle(jaccards: Tensor) -> float:
    """Near the median of Jaccard indices [n], without its steps: of the mean share exchanged over their middle half."""
    exchanged = ((1 - jaccards) / (1 + jaccards)).sort().values
    cut = len(exchanged) // 4
    mean = float(exchanged[cut : len(exchanged) - cut].mean())
    return (1 - mean) / (1 + mean)


def sequences_needed(n: int, reached: float, target: float) -> int:
    """Sequences that bring a Jaccard index from ``reached``, with n of them, to ``target`` < 1 (an extrapolation)."""
    exchanged, allowed = ((1 - j) / (1 + j) for j in (reached, target))
    return max(1, math.ceil(n * (exchanged / allowed) ** 2))
