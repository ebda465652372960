"""How far the ranks of all tokens change under steering, at the positions that a score looks at.

    prefix      the next token of each prefix, the feature set at every position of it (the paper, §5.2)
    forced      the next tokens along one clean continuation of each prefix, sampled once and shared by all features
    generate    the procedure of the reference's code (`write_feature_sample.py`): α by integer bisection on [1, 1000]
                until KL is in [target, target + 0.1], KL averaged over all positions of a prefix and the dictionary
                spliced in without its error term; steered ranks along sampled steered text (error term kept), clean
                ranks along a separate clean text, the dictionary spliced in without error term

A rank is that of the logits, 0 for the most likely token, equal logits by the lower id; Δ is the clean rank less the
steered rank, as a share of the vocabulary, averaged over positions, prefixes and KL targets. "generate" groups prompts
of equal length where the reference pads on the left; the model sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.evaluation.generation import continuation, plain_logits
from querylens_fast.evaluation.steering import HIGHEST_ALPHA, KL_TOLERANCE, SLOPE, Calibrated, Steered, calibrate
from querylens_fast.lens.splice import run_from, splice
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32

Positions = Literal["prefix", "forced", "generate"]
POSITIONS: tuple[Positions, ...] = ("prefix", "forced", "generate")
CONTINUED = 20
"""Tokens of a continuation; the reference's."""
KL_WINDOW = 0.1
"""Above its target, in nats, where the reference's bisection stops."""
LEAST_PROBABILITY = 1e-10
"""The reference's clamp in KL."""


class Ranking(Protocol):
    """Ranks of a block of features under steering."""

    features_at_once: int

    def rise(self, index: Tensor, targets: Sequence[float], guess: Tensor) -> tuple[Tensor, list[Calibrated]]:
        """Δ of every token for the features ``index`` [C] of the block, and the calibration for each target.

        Args:
            index: Places in the block, at most ``features_at_once``.
            targets: KL targets in nats.
            guess: First α to try for each target.

        Returns:
            [C, V] float64, and a `Calibrated` for each target.
        """
        ...


def prefix_ranking(
    model: Model, dictionary: Dictionary, groups: Sequence[Tensor], seed: int, features: Tensor, *, forced: bool
) -> Ranking:
    """The ranking "prefix", or "forced", of features [n] over groups of prefixes [B, S]."""
    steered = [Steered(model, dictionary, ids, features) for ids in groups]
    if not forced:
        return _PrefixRanks(steered, steered)
    continued = [continuation(model, ids, CONTINUED, plain_logits(model), seed=seed) for ids in groups]
    along = [
        Steered(model, dictionary, longer[:, :-1], features, n_predicted=longer.shape[1] - ids.shape[1])
        for ids, longer in zip(groups, continued, strict=True)
    ]
    return _PrefixRanks(steered, along)


def generated_ranking(
    model: Model, dictionary: Dictionary, groups: Sequence[Tensor], seed: int, features: Tensor
) -> Ranking:
    """The ranking "generate" of features [n] over groups of prefixes [B, S]."""
    return _GeneratedRanks(model, dictionary, groups, seed, features)


class _PrefixRanks:
    """KL at the next token of prefixes, those of one length together; ranks at the positions of ``ranked``."""

    def __init__(self, prefixes: Sequence[Steered], ranked: Sequence[Steered]) -> None:
        self.prefixes, self.ranked = prefixes, ranked
        self.n_prefixes = sum(len(g.ids) for g in prefixes)
        self.n_ranked = sum(len(g.clean) for g in ranked)
        self.features_at_once = max(1, min(g.features_at_once for g in (*prefixes, *ranked)))
        self.clean = torch.stack([rank_sums(g.clean[None])[0] for g in ranked]).sum(0)
        """Σ of the clean ranks, [V] float64."""

    def rise(self, index: Tensor, targets: Sequence[float], guess: Tensor) -> tuple[Tensor, list[Calibrated]]:
        delta, calibrated = torch.zeros(len(index), len(self.clean), dtype=torch.float64), []
        for i, target in enumerate(targets):
            start = calibrated[-1].start(target) if calibrated else guess[i].expand(len(index))
            reached, ranks = self._steer(index, target, start)
            calibrated.append(reached)
            delta += self.clean - ranks
        return delta / (len(targets) * self.n_ranked * len(self.clean)), calibrated

    def _steer(self, index: Tensor, target: float, start: Tensor) -> tuple[Calibrated, Tensor]:
        """α of the features ``index`` [C] for a KL target, and Σ of the ranks there, [C, V] float64."""
        ranks = torch.zeros(len(index), len(self.clean), dtype=torch.float64)
        ranked = torch.zeros(len(index), dtype=torch.bool)

        def kl(some: Tensor, alphas: Tensor) -> Tensor:
            logits = [g.logits(index[some], alphas) for g in self.prefixes]
            means = [g.kl(steered) for g, steered in zip(self.prefixes, logits, strict=True)]
            found = torch.stack(means).sum(0) / self.n_prefixes
            if bool(found.isnan().any()):
                feature = int(self.prefixes[0].features[index[some[found.isnan()]][0]])
                raise ValueError(f"steering feature {feature} gives logits that are not finite: its vectors overflow")
            # The logits of the evaluation that reaches the target are those that are ranked.
            near = (found - target).abs() <= KL_TOLERANCE
            if self.ranked is self.prefixes and bool(near.any()):
                parts = [rank_sums(steered[near.to(steered.device)]) for steered in logits]
                ranks[some[near]] = torch.stack(parts).sum(0)
                ranked[some[near]] = True
            return found

        calibrated = calibrate(kl, start, target)
        for place in (~ranked).nonzero():
            logits = [g.logits(index[place], calibrated.alphas[place]) for g in self.ranked]
            ranks[place] = torch.stack([rank_sums(steered) for steered in logits]).sum(0)
        return calibrated, ranks


class _GeneratedRanks:
    """The reference's procedure, one feature at a time."""

    features_at_once = 1

    def __init__(
        self, model: Model, dictionary: Dictionary, groups: Sequence[Tensor], seed: int, features: Tensor
    ) -> None:
        self.model, self.dictionary, self.seed = model, dictionary, seed
        self.groups, self.features = [ids.to(model.device) for ids in groups], features.to(model.device)

    @cached_property
    def clean(self) -> Tensor:
        """Mean clean rank of every token along clean text, the dictionary spliced in without error term, [V]."""
        total, n = torch.zeros(self.model.vocab_size, dtype=torch.float64), 0
        for ids in self.groups:
            text = continuation(self.model, ids, CONTINUED, plain_logits(self.model), seed=self.seed)
            steps = text.shape[1] - ids.shape[1]
            spliced = splice(self.model, self.dictionary, text.to(self.model.device))
            logits = self._logits(spliced.clean(), spliced.point, text)[0, :, -steps - 1 : -1]
            total += rank_sums(logits.flatten(0, 1)[None])[0]
            n += logits.shape[0] * steps
        return total / n

    def rise(self, index: Tensor, targets: Sequence[float], guess: Tensor) -> tuple[Tensor, list[Calibrated]]:
        feature = self.features[index]
        delta, calibrated = torch.zeros(1, len(self.clean), dtype=torch.float64), []
        for target in targets:
            alpha, kl, spent = self.bisect(feature, target)
            values = (torch.tensor([x]) for x in (float(alpha), kl, spent, SLOPE))
            calibrated.append(Calibrated(*values))
            delta += self.clean - self._steered_ranks(feature, float(alpha))
        return delta / (len(targets) * len(self.clean)), calibrated

    def bisect(self, feature: Tensor, target: float) -> tuple[int, float, int]:
        """(α, KL there, evaluations): whole numbers between 1 and 1,000 until KL ∈ [target, target + 0.1]."""
        low, high, middle, kl, spent = 1, round(HIGHEST_ALPHA), 0, -1.0, 0
        while low + 1 < high and not target <= kl <= target + KL_WINDOW:
            middle = (low + high) // 2
            kl, spent = self.kl(feature, float(middle)), spent + 1
            low, high = (low, middle) if kl > target else (middle, high)
        return middle, kl, spent

    def kl(self, feature: Tensor, alpha: float) -> float:
        """Mean over prefixes of the mean over positions (token id 0 left out) of KL(clean ‖ steered), no error term."""
        means = []
        for ids in self.groups:
            spliced = splice(self.model, self.dictionary, ids)
            p, q = (
                self._logits(x, spliced.point, ids)[0].softmax(-1).clamp_min(LEAST_PROBABILITY)
                for x in (spliced.clean(), spliced.changed(feature, alpha))
            )
            kl = (p * (p.log() - q.log())).sum(-1).double()
            counted = (ids != 0) & (kl != 0)
            n = counted.sum(1)
            means.append((kl * counted).sum(1)[n > 0] / n[n > 0])
        found = torch.cat(means)
        return float(found.mean()) if len(found) else 0.0

    def _steered_ranks(self, feature: Tensor, alpha: float) -> Tensor:
        """Mean rank of every token along sampled steered text, [V]."""
        total, n = torch.zeros(len(self.clean), dtype=torch.float64), 0
        for ids in self.groups:
            steps: list[Tensor] = []

            def next_logits(text: Tensor, steps: list[Tensor] = steps) -> Tensor:
                spliced = splice(self.model, self.dictionary, text, error_term=True)
                found = self._logits(spliced.changed(feature, alpha), spliced.point, text, last=1)[0, :, 0]
                steps.append(rank_sums(found[None])[0])
                return found

            continuation(self.model, ids, CONTINUED, next_logits, seed=self.seed)
            total += torch.stack(steps).sum(0)
            n += len(ids) * len(steps)
        return total / n

    def _logits(self, stream: Tensor, point: int, ids: Tensor, last: int | None = None) -> Tensor:
        return at_least_float32(self.model.logits(run_from(self.model, stream, point, ids, last=last)))


def rank_sums(logits: Tensor) -> Tensor:
    """Σ over B of the rank of each token (0: the most likely; equal logits by the lower id), [C, V] float64.

    Args:
        logits: [C, B, V], finite.
    """
    C, B, V = logits.shape
    total = torch.zeros(C, V, dtype=torch.float64, device=logits.device)
    ranks = torch.arange(V, dtype=torch.float64, device=logits.device).repeat(B)
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        for c in range(C):
            order = logits[c].sort(dim=-1, descending=True, stable=True).indices
            total[c].index_add_(0, order.flatten(), ranks)
        return total.cpu()
    ids, keys = torch.arange(V), torch.empty(B, V, dtype=torch.int64)
    for c in range(C):
        # One int64 per token, its logit's bits in descending order above its id: numpy sorts these with SIMD. In place:
        # fresh memory would cost more than the sort.
        bits = logits[c].add(0.0).view(torch.int32)  # + 0.0: −0 and 0 tie
        bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).bitwise_not_()
        keys.copy_(bits).bitwise_left_shift_(32).bitwise_or_(ids)
        keys.numpy().sort(axis=-1)
        total[c].index_add_(0, keys.bitwise_and_(0xFFFFFFFF).flatten(), ranks)
    return total
