"""Fit a transport: `transport` has the mathematics, `sums` and `energy` the accumulators, `growth` the sample size.

Each batch of sequences is linearised once and directions are carried through it a few at a time, so that memory keeps
to the user's bound. Batch b belongs to group b mod G of the sequences and to process b mod R.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.hook_points import hook_point
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.runs import processes as ranks
from querylens_fast.runs.versions import versions
from querylens_fast.transport.energy import Energy, EnergySums, rows_for_energy
from querylens_fast.transport.growth import Agreement, probes, sequences_needed
from querylens_fast.transport.jacobians import Budget, Order, Side, Submodule, check_submodules, counts, linearise
from querylens_fast.transport.sums import JacobianSums
from querylens_fast.transport.transport import FORMAT, ORDERS, SIDES, Transport

EMBEDDED_AT_ONCE = 1 << 12
"""Token embeddings held at a time."""
GROWTH = 1.5
"""By how much a growing sample is larger at the next comparison."""

logger = logging.getLogger(__name__)
logging.getLogger(f"{__name__}.other_processes").disabled = True


@torch.no_grad()
def fit_transport(
    model: Any,
    tokens: Tokens | Tensor,
    *,
    sides: Sequence[Side] = SIDES,
    orders: Sequence[Order] | None = None,
    energy: Energy = "none",
    n_probes: int = 64,
    seed: int = 0,
    max_memory_gib: float = 2.0,
    submodule: Submodule = "both",
    through_norms: bool = True,
    groups: int = 1,
    until: float | None = None,
    k: int = 25,
    dictionaries: Sequence[Dictionary] | None = None,
    inside: Sequence[str] = (),
    progress: bool = True,
) -> Transport:
    """Fit the transport of a model over a token sample: every layer and both sides.

    Cost: D directions carried through the model for each side of the full order, over all tokens; the first order costs
    some forward passes. Within `ranks.joined` the sequences are shared among the processes; every one gets the whole
    transport, equal to that of one process but for the order of its sums.

    Args:
        model: From `load_model`, or any model `as_model` takes.
        tokens: From `load_tokens`, or ids [B, S].
        sides: "value", "key" or both.
        orders: "full", "first_order" or both; by default both, or "full" alone for a model whose layers are opaque.
        energy: "probes" or "exact" also fits E[JᵀJ], for rel_var. Exact costs D directions for each point.
        n_probes: Sign probes a sequence, for energy="probes".
        seed: Of the probes, and of the features that ``until`` compares.
        max_memory_gib: Bound on the working memory (not on the result: groups · P · D² numbers a side and order).
        submodule: "attn" or "mlp" leaves the other module's Jacobian out (reference's ``submodule``).
        through_norms: False takes Jacobians of the modules without their norms (reference's ``use_*_layer_norm``).
        groups: Keep the matrices of so many disjoint groups of sequences (with energies, those of the value side too),
            at the same cost; the file is so many times as large. Gives standard errors of scores (`lens.reliability`)
            and independent fits (`Transport.group`).
        until: Take only as many of the sequences as it needs until the top tokens of the median feature agree between
            the two halves of what was taken, with at least this Jaccard index (0 < until < 1). What was reached, and
            how many sequences would do if it was not, is logged and is in the metadata.
        k: Top tokens that ``until`` compares.
        dictionaries: Features that ``until`` compares; by default MLP neurons of every layer.
        inside: Hook names inside modules whose keys the transport is to carry too, as "blocks.3.attn.hook_z" or
            "blocks.*.mlp.hook_post" for every layer: D · W numbers each, W heads' outputs or neurons.
        progress: Show a progress bar.

    Raises:
        ValueError: Bad arguments, or max_memory_gib too small for one sequence (the message says how much is needed).
    """
    model = as_model(model)
    tokens = as_tokens(tokens, model)
    if orders is None:
        orders = ORDERS if model.has_submodules else ("full",)
    options = FitOptions(
        _once(sides), _once(orders), energy, n_probes, seed, max_memory_gib, submodule, through_norms, groups, until, k,
        modules_inside(model, _once(inside)),
    )  # fmt: skip
    options.check(model, tokens)
    return _Fit(model, tokens, options, dictionaries).run(progress)


def mean_embedding(model: Model, tokens: Tokens) -> Tensor:
    """The mean token embedding over the valid positions, [D] in float32 or wider."""
    return _embedding_sum(model, tokens.ids[tokens.valid_mask]) / tokens.n_valid


def _embedding_sum(model: Model, ids: Tensor) -> Tensor:
    """Σ of the token embeddings of ids [n], [D] in float32 or wider."""
    wide = torch.promote_types(model.dtype, torch.float32)
    total = torch.zeros(model.d_model, dtype=wide, device=model.device)
    for some in ids.split(EMBEDDED_AT_ONCE):
        total += model.embed(some).to(wide).sum(0)
    return total


@dataclass(frozen=True)
class FitOptions:
    """The arguments of `fit_transport` that say what is fitted and how."""

    sides: tuple[Side, ...]
    orders: tuple[Order, ...]
    energy: Energy
    n_probes: int
    seed: int
    max_memory_gib: float
    submodule: Submodule
    through_norms: bool
    groups: int
    until: float | None
    k: int
    inside: tuple[int, ...]

    def check(self, model: Model, tokens: Tokens) -> None:
        """Raise ValueError for anything that is unknown or does not fit the model or the sample."""
        _check_choice("sides", self.sides, SIDES)
        _check_choice("orders", self.orders, ORDERS)
        _check_choice("energy", [self.energy], ("none", "probes", "exact"))
        _check_choice("submodule", [self.submodule], ("both", "attn", "mlp"))
        check_submodules(model, self.orders, self.submodule)
        if self.inside and ("key" not in self.sides or not all(counts(i, self.submodule) for i in self.inside)):
            raise ValueError(
                f"inside= is for keys and needs the modules' own Jacobians, but sides are {list(self.sides)} and "
                f"submodule is {self.submodule!r}; fit it with sides=('key',) or both, and submodule='both'"
            )
        n, fewest = len(tokens.ids), self.groups if self.until is None else self.inner_groups
        if type(self.groups) is not int or not 1 <= self.groups or fewest > n:
            raise ValueError(
                f"groups is {self.groups}; expected 1 to the number of sequences, {n} (at least 2 for until=)"
            )
        if self.until is None:
            return
        if not 0 < self.until < 1:
            raise ValueError(f"until is {self.until}; expected a Jaccard index between 0 and 1, such as 0.85")
        if self.groups > 1 and self.groups % 2:
            raise ValueError(f"groups is {self.groups}; expected an even number with until=, which compares two halves")
        if type(self.k) is not int or not 1 <= self.k <= model.vocab_size:
            raise ValueError(f"k is {self.k}; expected 1 to the vocabulary's {model.vocab_size}")

    @property
    def inner_groups(self) -> int:
        """Groups of sums that are kept while fitting: two halves at least when they are compared."""
        return self.groups if self.until is None else max(2, self.groups)


def modules_inside(model: Model, names: Sequence[str]) -> tuple[int, ...]:
    """The modules whose inside the hook names stand for, in order.

    Raises:
        ValueError: A name that is none, or of a place or layer that has no such inside.
    """
    layers = range(model.n_layers)
    hooks = [hook_point(each) for name in names for each in dict.fromkeys(name.replace("*", str(i)) for i in layers)]
    for hook in hooks:
        if not hook.site.reads_inside or hook.module is None or hook.layer >= model.n_layers:
            raise ValueError(
                f"inside names {hook.name!r}; expected names such as 'blocks.0.attn.hook_z' or "
                f"'blocks.0.mlp.hook_post', of the {model.n_layers} layers of {model.name!r}"
            )
    return tuple(sorted({hook.module for hook in hooks if hook.module is not None}))


def _once(chosen: Any) -> Any:
    """A choice, or several, each once."""
    return tuple(dict.fromkeys([chosen] if isinstance(chosen, str) else chosen))


def _check_choice(name: str, chosen: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [c for c in chosen if c not in allowed]
    if wrong or not chosen:
        raise ValueError(f"{name} is {list(chosen)}; expected some of {', '.join(allowed)}")


def plan_batches(n: int, rows: int, groups: int, n_processes: int) -> list[slice]:
    """Slices covering range(n): at most ``rows`` long, as many as groups and processes need, of nearly equal length."""
    count = max(-(-n // rows), min(n_processes, n))
    count = min(n, -(-count // groups) * groups)
    edges = [i * n // count for i in range(count + 1)]
    return [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]


class _Fit:
    """One run of `fit_transport`."""

    def __init__(
        self, model: Model, tokens: Tokens, options: FitOptions, dictionaries: Sequence[Dictionary] | None
    ) -> None:
        self.model, self.tokens, self.options = model, tokens, options
        o, length = options, tokens.ids.shape[1]
        budget = Budget.plan(model, length, o.max_memory_gib, len(o.inside))
        rows = rows_for_energy(model, o.energy, budget, length)
        self.process = ranks.current()
        self.batches = plan_batches(len(tokens.ids), rows, o.inner_groups, self.process.size)
        if o.inner_groups > 1 and not bool(self._group_totals(len(self.batches))[0].all()):
            raise ValueError(f"groups is {o.groups}, but one of them would have no valid position: take fewer groups")
        self.sums = JacobianSums(model, o.sides, o.orders, budget.directions, o.inner_groups, o.inside)
        self.energies = EnergySums(
            model, list(self.sums.sums), o.energy, o.n_probes, o.seed, budget.directions, o.groups
        )
        self.agreement = None
        if o.until is not None:
            probed = probes(model, o.sides, dictionaries, o.seed)
            self.agreement = Agreement(model, probed, "full" if "full" in o.orders else "first_order", o.k)
        self.outcome: dict[str, str] = {}

    def run(self, progress: bool) -> Transport:
        """Add the batches stage by stage, and put the transport together."""
        steps = self.sums.steps_per_batch + self.energies.steps_per_batch
        show = progress and self.process.leads
        with tqdm(total=len(self.batches) * steps, desc="transport", unit="direction", disable=not show) as bar:
            done = 0
            for stage in self._stages():
                self._add(range(done, stage), bar)
                done = stage
                if self.agreement is not None and self._agrees(done, bar):
                    break
        for part in (self.sums.sums, self.sums.inside, self.energies.sums, self.energies.groups):
            for sums in part.values():
                self.process.sum_(sums)
        return self._finish(done)

    def _stages(self) -> Iterator[int]:
        """Numbers of batches after which to compare: whole rounds of the groups, ever more of them, then all."""
        n, each = len(self.batches), self.options.inner_groups
        rounds = 1
        while self.agreement is not None and rounds * each < n:
            yield rounds * each
            rounds = max(rounds + 1, int(rounds * GROWTH))
        yield n

    def _add(self, indices: range, bar: tqdm[Any]) -> None:
        for index in indices:
            if index % self.process.size != self.process.rank:
                continue
            lin = linearise(
                self.model, self.tokens, self.batches[index], self.options.submodule, self.options.through_norms
            )
            group = index % self.options.inner_groups
            for added in (self.sums.add(lin, group), self.energies.add(lin, group % self.options.groups)):
                for done in added:
                    bar.update(done * self.process.size)
                    self.process.check()

    def _agrees(self, n_batches: int, bar: tqdm[Any]) -> bool:
        """Whether the two halves of what was added agree; says so in the bar, the log and the metadata."""
        until, n = self.options.until, self.batches[n_batches - 1].stop
        assert self.agreement is not None and until is not None
        reached, smooth, worst = self.agreement(self.sums, *self._group_totals(n_batches))
        bar.set_postfix(jaccard=f"{reached:.3f}", until=until, sequences=n)
        self.outcome = {"until": str(until), "until_k": str(self.options.k), "jaccard": f"{reached:.4f}"}
        self.outcome["lowest_jaccard"] = worst
        say = logger if self.process.leads else logging.getLogger(f"{__name__}.other_processes")
        said = "top %d tokens of the median feature agree to Jaccard %.3f between halves of %d sequences (lowest: %s)"
        if reached >= until:
            say.info(said, self.options.k, reached, n, worst)
            return True
        if n_batches == len(self.batches):
            more = max(n + 1, sequences_needed(n, smooth, until))
            self.outcome["sequences_needed"] = str(more)
            said = f"{said}; for %g about %d sequences would be needed"
            say.warning(said, self.options.k, reached, n, worst, until, more)
        return False

    def _group_totals(self, n_batches: int) -> tuple[Tensor, Tensor]:
        """(valid positions [G], sums of their token embeddings [G, D]) of the groups, over all processes' batches."""
        counts, embedded = [], []
        for group in range(self.options.inner_groups):
            rows = self.batches[:n_batches][group :: self.options.inner_groups]
            ids = torch.cat([self.tokens.ids[r][self.tokens.valid_mask[r]] for r in rows])
            counts.append(len(ids))
            embedded.append(_embedding_sum(self.model, ids))
        return torch.tensor(counts), torch.stack(embedded)

    def _finish(self, n_batches: int) -> Transport:
        """The averages, with the metadata that says what they are averages of."""
        model, o = self.model, self.options
        tokens = self.tokens if n_batches == len(self.batches) else self.tokens.head(self.batches[n_batches - 1].stop)
        shares = {pair: sums.div_(tokens.n_valid) for pair, sums in self.sums.sums.items()}
        matrices = {pair: share[0] if len(share) == 1 else share.sum(0) for pair, share in shares.items()}
        for (side, order), matrix in matrices.items():
            if not torch.isfinite(matrix).all():
                raise ValueError(
                    f"the {side}/{order} transport of {model.name!r} overflowed {model.dtype}; use float32"
                )
        metadata = {**_metadata(model, tokens, o), **self.outcome}
        transport = Transport(matrices, mean_embedding(model, tokens), metadata, self.energies.means(tokens.n_valid))
        inside = {at: sums.div_(tokens.n_valid) for at, sums in self.sums.inside.items()}
        transport.inside = inside if o.groups > 1 else {at: kept.sum(0, keepdim=True) for at, kept in inside.items()}
        if o.groups > 1:
            counts, embedded = self._group_totals(n_batches)
            metadata |= {"groups": str(o.groups), "group_n_valid": ",".join(map(str, counts.tolist()))}
            energies = {pair: sums / tokens.n_valid for pair, sums in self.energies.groups.items()}
            if energies:  # results of earlier transports have no standard errors where these give some
                metadata["group_energies"] = ",".join("/".join(pair) for pair in energies)
            centres = embedded / tokens.n_valid
            transport = replace(transport, groups=shares, group_centres=centres, group_energies=energies)
        return transport if model.has_submodules else transport.without_mid_points()


def _metadata(model: Model, tokens: Tokens, options: FitOptions) -> dict[str, str]:
    probing = options.energy == "probes"
    return {
        "format": FORMAT,
        "model": model.name,
        **model.identity,
        "convention": model.convention,
        "linearisation": model.linearisation,
        "routing": "held fixed: experts and weights" if model.mixture_of_experts else "none",
        "dtype": str(model.dtype).removeprefix("torch."),
        "n_layers": str(model.n_layers),
        "d_model": str(model.d_model),
        "n_valid": str(tokens.n_valid),
        "n_sequences": str(len(tokens.ids)),
        "tokens": tokens.source,
        "tokens_digest": tokens.digest,
        "submodule": options.submodule,
        "through_norms": str(options.through_norms),
        "energy": options.energy,
        "n_probes": str(options.n_probes if probing else 0),
        **({"seed": str(options.seed)} if probing else {}),
        **versions("querylens_fast", "torch", "transformers"),
    }
