"""Steering: a feature's activation set to a value at every position, and what the model predicts then.

With the error term kept, setting feature f of a dictionary from a_f(x) to α changes the stream at the dictionary's
point by (α − a_f(x)) · W_dec[f]: decode(acts with acts_f = α) + (x − decode(acts)). Without it the dictionary's
reconstruction takes the place of the stream as well. Only the layers above that point run again, many features in one
batch; the pass below it, the activations and the clean predictions are computed once.

KL is mean over prefixes of KL(clean ‖ steered) at the next token (paper §5.2, Appendix). `calibrate` finds the α that
gives a target KL by a secant in (log α, log KL), which is nearly a straight line of slope 2, kept in a bracket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.lens.splice import run_from, splice
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.topk.products import FasterLinear

LOWEST_ALPHA, HIGHEST_ALPHA = 1e-3, 1e3
"""Where `calibrate` looks for α; the reference's upper bound is 1,000 too."""
KL_TOLERANCE = 0.02
"""In nats: a KL this close to its target is taken."""
MAX_EVALUATIONS = 16
SLOPE = 2.0
"""d log KL / d log α at first order."""
ROWS_AT_ONCE = {"cpu": 2048, "cuda": 1 << 17}
"""Positions × features run through the layers at once."""
LOGITS_AT_ONCE = 1 << 26


class Steered:
    """A model with a dictionary on a batch of sequences of one length, some of its features set to given values.

    Args:
        model: The model.
        dictionary: One that can be run.
        ids: Token ids [B, S] without padding.
        features: The feature ids [n] that will be steered; their activations are kept, [n, B, S].
        n_predicted: How many positions, the last ones, are looked at: what follows each of them is predicted.
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, dictionary: Dictionary, ids: Tensor, features: Tensor, n_predicted: int = 1
    ) -> None:
        self.model, self.ids, self.n_predicted = model, ids.to(model.device), n_predicted
        self.splice = splice(model, dictionary, self.ids, error_term=True)
        self.features = features.to(model.device)
        rows = ROWS_AT_ONCE.get(model.device.type, ROWS_AT_ONCE["cuda"])
        vocabulary = max(1, LOGITS_AT_ONCE // (len(ids) * n_predicted * model.vocab_size))
        self.features_at_once = max(1, min(rows // ids.numel(), vocabulary))

    @cached_property
    def clean(self) -> Tensor:
        """Clean next-token logits at every position looked at, [B · n_predicted, V] float32 or wider."""
        return self._logits(self.splice.clean())[0]

    @torch.no_grad()
    def logits(self, chosen: Tensor, alphas: Tensor) -> Tensor:
        """Logits [C, B · n_predicted, V] with feature ``features[chosen[c]]`` at alphas[c]; chosen, alphas [C]."""
        return self._logits(self.splice.changed(self.features[chosen], alphas))

    def kl(self, steered: Tensor) -> Tensor:
        """Σ over the positions of KL(clean ‖ steered) in nats, [C] float64, for `logits`."""
        clean = self.clean.log_softmax(-1)
        p = clean.exp()
        # Σ p log q = Σ p z − logsumexp(z): no second [C, B, V] of log-probabilities.
        cross = torch.einsum("cbv,bv->cb", steered, p) - steered.logsumexp(-1)
        return ((p * clean).sum(-1) - cross).clamp_min(0).sum(-1, dtype=torch.float64).cpu()

    def _logits(self, stream: Tensor) -> Tensor:
        """Logits at the positions looked at for streams [C, B, S, D] at the splice's point."""
        with FasterLinear():
            final = run_from(self.model, stream, self.splice.point, self.ids, last=self.n_predicted)
            return at_least_float32(self.model.logits(final)).flatten(1, 2)


@dataclass(frozen=True)
class Calibrated:
    """The activations that reach a KL target.

    Attributes:
        alphas: [n]; at the bound where the target is not reached.
        kl: The KL there, [n] nats.
        evaluations: KL evaluations spent on each, [n].
        slopes: d log KL / d log α there, [n]; 2 where one evaluation sufficed.
    """

    alphas: Tensor
    kl: Tensor
    evaluations: Tensor
    slopes: Tensor

    def start(self, target: float) -> Tensor:
        """A first guess of the α that reach another target, [n]."""
        return self.alphas * (target / self.kl.clamp_min(1e-6)).pow(1 / self.slopes).clamp(0.1, 10)


def calibrate(kl: Callable[[Tensor, Tensor], Tensor], start: Tensor, target: float) -> Calibrated:
    """The α of each of n features at which KL is ``target`` ± `KL_TOLERANCE`.

    Args:
        kl: (indices [m], alphas [m]) → KL [m] float64. The last call for an index is at the α that is returned.
        start: First guess of each α, [n].
        target: In nats.
    """
    n = len(start)
    x = start.double().cpu().log()
    low, high = torch.full((n,), LOWEST_ALPHA).double().log(), torch.full((n,), HIGHEST_ALPHA).double().log()
    x = x.clamp(low, high)
    before_x, before_y = torch.full((n,), torch.nan).double(), torch.full((n,), torch.nan).double()
    alphas, reached, spent = x.exp(), torch.zeros(n).double(), torch.zeros(n, dtype=torch.int64)
    slopes = torch.full((n,), SLOPE).double()
    open_ = torch.arange(n)
    for _ in range(MAX_EVALUATIONS):
        found = kl(open_, x[open_].exp())
        alphas[open_], reached[open_] = x[open_].exp(), found
        spent[open_] += 1
        y = (found.clamp_min(1e-12) / target).log()
        above = found > target
        high[open_] = torch.where(above, x[open_], high[open_])
        low[open_] = torch.where(above, low[open_], x[open_])
        slope = (y - before_y[open_]) / (x[open_] - before_x[open_])
        slope = torch.where(slope.isfinite() & (slope > 0.2), slope.clamp_max(8), SLOPE)
        slopes[open_] = slope
        step = x[open_] - y / slope
        middle = (low[open_] + high[open_]) / 2
        inside = (step > low[open_]) & (step < high[open_])
        before_x[open_], before_y[open_] = x[open_], y
        at_bound = (high[open_] - low[open_]) < 1e-3
        x[open_] = torch.where(inside, step, middle)
        open_ = open_[((found - target).abs() > KL_TOLERANCE) & ~at_bound]
        if not len(open_):
            break
    return Calibrated(alphas, reached, spent, slopes)
