"""Are the standard errors right? Many disjoint samples of the embedded model's held-out text, each with its intervals.

    python -m bench reliability [--sequences 8,16,32] [--features 64] [--shuffles 3] [--out FILE]

The transport is fitted once with a group for every sequence of the pool; any sample of 8 groups is then a sum of
shares, exactly the transport that fitting those sequences gives. The pool is dealt out into disjoint samples several
times. For every sample: the top tokens of some features of every dictionary, their jackknife standard errors, and the
95 % interval ± t₇ · se. Counted is how often it holds the score that the whole pool gives (the sample is part of it,
hence the factor √(1 − n/N) on the error), for the pool's own top tokens and for those that the sample chose, which are
chosen for being high and so lie too high. The same samples say how well `stable_k` tells tokens that another sample
confirms, and how well the extrapolation of ``until=`` foretells the size at which halves agree.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import querylens_fast as ql
from bench.machine import machine
from bench.record import save
from bench.timing import seconds
from querylens_fast.demo.showcase import load_example
from querylens_fast.lens.reliability import Jackknife
from querylens_fast.transport.growth import jaccard, middle, sequences_needed

GROUPS = 8
T_975 = 2.3646
"""Student's t of 7 degrees of freedom."""
PRESETS = ("query_lens_key", "query_lens_value")
K = 25
TARGET = 0.85


def pool(example: Any) -> ql.Tokens:
    """All held-out sequences of the demo."""
    ids = torch.cat([example.fit_tokens.ids, example.held_out.ids])
    return ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), "demo, held out")


def of_groups(transport: ql.Transport, chosen: Tensor, n_groups: int) -> ql.Transport:
    """The transport of the chosen groups alone, joined to ``n_groups`` groups of its own."""
    sizes = torch.tensor(transport.group_sizes)[chosen].view(n_groups, -1).sum(1)
    scale = transport.n_valid / int(sizes.sum())

    def joined(kept: Tensor) -> Tensor:
        return kept[chosen].unflatten(0, (n_groups, -1)).sum(1) * scale

    groups = {pair: joined(kept) for pair, kept in transport.groups.items()}
    if transport.group_centres is None:
        raise ValueError("the transport has no centres of its groups")
    centres = joined(transport.group_centres)
    metadata = {**transport.metadata, "n_valid": str(int(sizes.sum()))}
    metadata["group_n_valid"] = ",".join(map(str, sizes.tolist()))
    return ql.Transport({p: g.sum(0) for p, g in groups.items()}, centres.sum(0), metadata, {}, groups, centres)


class Subject:
    """Some features of one dictionary under one preset, read out under any transport."""

    def __init__(self, model: ql.Model, dictionary: ql.Dictionary, preset: str, n_features: int) -> None:
        self.model, self.dictionary, self.preset = model, dictionary, ql.find_preset(preset)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randperm(dictionary.n_features, generator=generator)[:n_features].sort().values
        self.side = self.preset.feature_vector
        self.vectors = dictionary.vectors(self.side, self.ids)

    def top(self, transport: ql.Transport) -> Any:
        """Signatures under a transport."""
        options = {"preset": self.preset, "transport": transport, "k": K, "features": self.ids, "stats": "none"}
        return ql.signatures(self.dictionary, self.model, **options)

    def scores(self, transport: ql.Transport, token_ids: Tensor) -> Tensor:
        """The scores of given tokens [n, k] under a transport."""
        return ql.scores_at(self.dictionary, self.model, self.ids, token_ids, preset=self.preset, transport=transport)

    def figures(self, whole: ql.Transport, samples: list[ql.Transport]) -> dict[str, float | None]:
        """Coverage, calibration and what stable_k is worth, over all samples; None where nothing varies."""
        truth = self.top(whole)
        rest = (1 - samples[0].n_valid / whole.n_valid) ** 0.5
        held: dict[str, list[Tensor]] = {"pool": [], "own": []}
        errors, claimed, lists, stable = [], [], [], []
        for sample in samples:
            jackknife = Jackknife(self.model, sample, self.preset, self.dictionary.point(self.side))
            own = self.top(sample)
            for which, ids in (("pool", truth.top_ids), ("own", own.top_ids)):
                score = self.scores(sample, ids)
                error, stays = jackknife(self.vectors, ids, score)
                off = score - self.scores(whole, ids)
                held[which].append(off.abs() <= T_975 * rest * error)
                if which == "pool":
                    errors.append(off.square())
                    claimed.append((rest * error).square())
                else:
                    lists.append(own.top_ids)
                    stable.append(stays)
        kept = torch.stack([self._confirmed(a, lists) for a in lists])
        share = torch.stack(stable).double() / K
        return {
            "coverage": float(torch.stack(held["pool"]).double().mean()),
            "coverage_of_own_top": float(torch.stack(held["own"]).double().mean()),
            "claimed_over_real_error": _finite((torch.stack(claimed).mean() / torch.stack(errors).mean()).sqrt()),
            "stable_share": float(share.mean()),
            "confirmed_share": float(kept.mean()),
            "correlation": _finite(torch.corrcoef(torch.stack([share.flatten(), kept.flatten()]))[0, 1]),
            "jaccard": float(torch.stack([jaccard(a, b).mean() for a, b in combinations(lists, 2)]).mean()),
        }

    @staticmethod
    def _confirmed(ids: Tensor, lists: list[Tensor]) -> Tensor:
        """[n] mean share of a sample's top tokens that another sample's list has, over all others."""
        others = [other for other in lists if other is not ids]
        shared = torch.stack([(ids[:, :, None] == other[:, None]).any(2).double().mean(1) for other in others])
        return shared.mean(0)


def _finite(value: Tensor) -> float | None:
    """A number for JSON, None for NaN and infinity."""
    return float(value) if bool(value.isfinite()) else None


def shuffles(n: int, count: int) -> list[Tensor]:
    """Some orders of n sequences."""
    return [torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def extrapolation(subjects: list[Subject], transport: ql.Transport, n_shuffles: int) -> list[dict[str, Any]]:
    """Agreement of two halves as they grow, and what each size foretells for `TARGET`, for every shuffle."""
    found, each = [], 4
    while 2 * each <= transport.n_groups:
        lowest, smooth = [], []
        for order in shuffles(transport.n_groups, n_shuffles):
            halves = [of_groups(transport, order[start : start + each], 1) for start in (0, each)]
            sides = []
            for preset in PRESETS:
                lists = [[s.top(half).top_ids for half in halves] for s in subjects if s.preset.name == preset]
                sides.append(torch.cat([jaccard(a, b) for a, b in lists]))
            lowest.append(min(float(side.median()) for side in sides))
            smooth.append(min(map(middle, sides)))
        foretold = [sequences_needed(2 * each, reached, TARGET) for reached in smooth]
        found.append({"sequences": 2 * each, "jaccard": lowest, "smooth": smooth, "foretold": foretold})
        each *= 2
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sequences", default="8,16,32", help="sizes of a sample, multiples of 8 groups; empty: until alone"
    )
    parser.add_argument("--pool", type=int, default=1 << 30, help="sequences of the pool that are used")
    parser.add_argument("--features", type=int, default=64, help="features of each dictionary")
    parser.add_argument("--shuffles", type=int, default=3, help="how often the pool is dealt out")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    sizes = [int(n) for n in options.sequences.split(",") if n]
    example = load_example()
    tokens = pool(example).head(options.pool)
    n = len(tokens.ids)
    fitted: list[ql.Transport] = []
    spent = seconds(
        lambda: fitted.append(ql.fit_transport(example.model, tokens, orders=("full",), groups=n, progress=False)),
        torch.device("cpu"),
    )
    transport = fitted[0]
    subjects = [Subject(example.model, d, p, options.features) for d in example.dictionaries for p in PRESETS]
    record: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "command": f"python -m bench reliability {' '.join(arguments or [])}".strip(),
        "sequences": n,
        "tokens": tokens.n_valid,
        "groups": GROUPS,
        "k": K,
        "fit_s": spent,
        "samples": [],
    }
    for size in sizes:
        samples = [
            of_groups(transport, order[start : start + size], GROUPS)
            for order in shuffles(n, options.shuffles)
            for start in range(0, n - size + 1, size)
        ]
        for subject in subjects:
            found = subject.figures(transport, samples)
            about = {"dictionary": Path(subject.dictionary.name).name, "preset": subject.preset.name}
            record["samples"].append({"sequences": size, "n_samples": len(samples), **about, **found})
            print(size, *about.values(), *(f"{name} {value}" for name, value in found.items()))
    record["until"] = extrapolation(subjects, transport, 10)
    for row in record["until"]:
        print(row)
    if options.out:
        save(options.out, record)
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
