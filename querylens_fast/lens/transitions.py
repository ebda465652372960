"""Stream transitions: what a feature's vector has become when it is read out.

Each transition is a callable of (feature ids [n], their vectors [n, D]) that gives a `Moved`. `pipeline.plan` chooses
one for a preset: `Identity`, `Tuned`, `Transported` (a fitted transport, full or first order), `Adaptive` (one of
those per feature), `Walked` (each feature carried through the model by itself), `Ablated` (the model run with the
feature changed). `ExactStatistics` adds the statistics of a walk to a transition's vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.lens.ablations import ablate
from querylens_fast.lens.tuned_lens import TunedLens
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens
from querylens_fast.transport.jacobians import Order, Side, Submodule
from querylens_fast.transport.per_feature import Total, alone, walk_features
from querylens_fast.transport.transport import Transport

ADAPTIVE_CHOICES = ("identity", "first_order", "full")
SHRINKAGE = 0.5
"""How much of its relative variance a feature's full transport gives up to the direct path."""


@dataclass(frozen=True)
class Moved:
    """A block of n features after the stream transition.

    Attributes:
        vectors: What is read out, [n, D] in float32 or wider where they were transported; after an ablation of a model
            with a logit soft cap, its logits' differences [n, V].
        stats: Columns [n] by name.
        choices: What the adaptive preset took for each feature, or None.
        layer_means: (label, mean [n, D]) of each layer's first-order term, where there are such.
    """

    vectors: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    choices: list[str] | None = None
    layer_means: list[tuple[int, Tensor]] = field(default_factory=list)


class Transition:
    """What all transitions share: vectors go in as the dictionary has them, on the model's device and in its dtype."""

    reads_vectors: ClassVar[bool] = True
    """False: the transition needs the feature ids alone."""
    costs_passes: ClassVar[bool] = False
    """Does each feature cost a pass through the model?"""

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        raise NotImplementedError


class Identity(Transition):
    """The vector itself."""

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        return Moved(vectors)


@dataclass(frozen=True)
class Tuned(Transition):
    """A tuned lens's translator for the residual stream after ``layer``."""

    lens: TunedLens
    layer: int
    n_layers: int

    @classmethod
    def of(cls, lens: TunedLens, dictionary: Dictionary, n_layers: int) -> Tuned:
        """The translator for a dictionary's values.

        Raises:
            ValueError: The values are not written at the end of a layer, where translators are fitted.
        """
        point = dictionary.point("value")
        if point % 2 or not point:
            raise ValueError(
                f"dictionary {dictionary.name!r} writes at {dictionary.hook_name_out or dictionary.hook_name!r}, but a "
                "tuned lens translates the residual stream after a layer (hook_resid_post, hook_mlp_out, or "
                "hook_resid_pre of a later layer); use another preset"
            )
        return cls(lens, point // 2 - 1, n_layers)

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        return Moved(self.lens(vectors, self.layer, self.n_layers))


@dataclass(frozen=True)
class Transported(Transition):
    """A fitted transport's matrix for one point of the stream.

    ``rel_var`` adds the relative variance and its standard error, which needs the transport's energies; ``layer`` (the
    dictionary's) adds the first order's terms by layer.
    """

    transport: Transport
    side: Side
    order: Order
    point: int
    rel_var: bool = False
    layer: int | None = None

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        moved = self.transport.apply(vectors, self.side, self.order, self.point)
        stats, means = {}, []
        if self.rel_var:
            spread, error = self.transport.rel_var(vectors, self.side, self.order, self.point)
            stats = {"rel_var": spread, "rel_var_se": error}
        if self.layer is not None:
            own = vectors.to(moved)
            terms = self.transport.layer_terms(self.side, self.point, self.layer)
            means = [(label, own if matrix is None else own @ matrix.mT) for label, matrix in terms]
        return Moved(moved, stats, layer_means=means)


def shrunk(moved: Tensor, vectors: Tensor, rel_var: Tensor) -> Tensor:
    """(1 − c r) M v + c r v for M v [n, D], v [n, D] and r [n]; see `Adaptive`."""
    return torch.lerp(moved, vectors, (SHRINKAGE * rel_var).to(moved)[:, None])


@dataclass(frozen=True)
class Adaptive(Transition):
    """The full transport of the value side, corrected for how well its mean represents the contexts.

    The full transport M counts every indirect path but averages over contexts; the direct path, v itself, is the same
    in all of them. With r = rel_var(full), the share of the transported energy that the mean does not carry, a feature
    is read out as

        (1 − c r) M v + c r v,    c = `SHRINKAGE`,

    which raises the output score O(T) by more than choosing the best of the fixed transitions for each feature does
    (``python -m bench evaluation``; c was chosen on one half of its features, the other half is reported). With a
    ``threshold`` one transition is chosen for each feature instead: "full" where rel_var(full) ≤ threshold, else
    "first_order" where rel_var(first_order) ≤ threshold, else "identity". The paper leaves the choice open (Appendix
    E).
    """

    transport: Transport
    point: int
    threshold: float | None = None
    rel_var: bool = False

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        spread, error = self.transport.rel_var(vectors, "value", "full", self.point)
        stats = {"rel_var": spread, "rel_var_se": error} if self.rel_var else {}
        if self.threshold is not None:
            moved, choices = self._chosen(vectors, spread, self.threshold)
            return Moved(moved, stats, choices)
        moved = self.transport.apply(vectors, "value", "full", self.point)
        return Moved(shrunk(moved, vectors.to(moved), spread), stats, ["shrunk"] * len(vectors))

    def _chosen(self, vectors: Tensor, spread: Tensor, threshold: float) -> tuple[Tensor, list[str]]:
        """The chosen transition's vectors and its name for each feature; ``spread`` is rel_var(full)."""
        first, _ = self.transport.rel_var(vectors, "value", "first_order", self.point)
        moved = vectors.to(self.transport.matrix("value", "full", self.point))
        choice = torch.zeros(len(vectors), dtype=torch.int64, device=moved.device)
        orders: tuple[tuple[Order, Tensor], ...] = (("first_order", first), ("full", spread))
        for index, (order, own) in enumerate(orders, start=1):
            taken = own <= threshold
            moved = torch.where(taken[:, None], self.transport.apply(vectors, "value", order, self.point), moved)
            choice[taken] = index
        return moved, [ADAPTIVE_CHOICES[c] for c in choice.tolist()]


@dataclass(frozen=True)
class Walked(Transition):
    """Each feature carried through the model over the whole sample, with all statistics; nothing is fitted.

    ``layer`` (the dictionary's) adds the first order's terms by layer. ``total`` sums a tensor over the processes that
    hold the other parts of the sample.
    """

    costs_passes: ClassVar[bool] = True

    model: Model
    tokens: Tokens
    side: Side
    order: Order
    point: int
    layer: int | None = None
    submodule: Submodule = "both"
    through_norms: bool = True
    max_memory_gib: float = 2.0
    total: Total = alone

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        found = walk_features(
            self.model,
            self.tokens,
            vectors,
            self.point,
            self.side,
            self.order,
            layer=self.layer,
            submodule=self.submodule,
            through_norms=self.through_norms,
            max_memory_gib=self.max_memory_gib,
            total=self.total,
        )
        return Moved(found.mean, found.stats, layer_means=found.layer_means)


@dataclass(frozen=True)
class ExactStatistics(Transition):
    """A transition with the statistics of a walk."""

    costs_passes: ClassVar[bool] = True

    transition: Transition
    walk: Walked

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        return replace(self.transition(ids, vectors), stats=self.walk(ids, vectors).stats)


@dataclass(frozen=True)
class Ablated(Transition):
    """The model run with each feature's activation set to ``value`` (token_change), or to 0 where None (zero_out)."""

    costs_passes: ClassVar[bool] = True
    reads_vectors: ClassVar[bool] = False

    model: Model
    tokens: Tokens
    dictionary: Dictionary
    value: float | None
    max_memory_gib: float = 2.0
    total: Total = alone

    def __call__(self, ids: Tensor, vectors: Tensor) -> Moved:
        value, inverted = (0.0, True) if self.value is None else (self.value, False)
        mean = ablate(self.model, self.tokens, self.dictionary, ids, value, inverted, self.max_memory_gib)
        n = torch.tensor(float(self.tokens.ids.numel()), dtype=mean.dtype, device=mean.device)
        return Moved(self.total(mean * (n / self.total(n))))
