"""Output scores by prefix against a straightforward implementation, the gain of the adaptive preset, a whole report.

    python -m bench evaluation [--parts speed,adaptive,report] [--features 200] [--out FILE]

On the embedded model, 100 held-out prefixes of 7 tokens. Each part is written when it is done, beside the parts that
the file holds already, so that they may be run one at a time.

*speed*: ours is `promoted_tokens`: clean pass once, only the layers above the dictionary again, several features in a
batch, a secant in (log α, log KL), the ranks of the evaluation that reached the target. *Straightforward*: for each
feature the whole model is run for every KL evaluation, α by bisection on [1, 1000] to the same tolerance in KL, ranks
by two sorts. Both find the same tokens (compared before timing).

*adaptive*: output scores of the fixed transitions, of the adaptive preset and of the best fixed transition for each
feature (the oracle), on the two halves of a seeded sample. The adaptive rule was chosen on the first half, and is
reported on the second. ``share`` is the part of the oracle's gain over the best fixed transition that it takes.

*report*: seconds of `evaluation_report` with its defaults, in a new folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import querylens_fast as ql
from bench.machine import machine
from bench.record import RESULTS, save
from querylens_fast.demo import ASSETS
from querylens_fast.demo.showcase import FIT_SEQUENCES, Example, load_example
from querylens_fast.evaluation.output_score import KL_TARGETS, output_scores, promoted_tokens
from querylens_fast.evaluation.steering import KL_TOLERANCE
from querylens_fast.lens.splice import run_from, splice

DEFAULT_OUT = RESULTS / "cpu-evaluation.json"
N_PREFIXES, LENGTH = 100, 7
FIXED = ("logit_lens_value", "query_lens_value_approx", "query_lens_value")
ADAPTIVE = "query_lens_value_adaptive"
AT_LEAST_ALIKE = 0.9
"""Mean overlap of the two implementations' 25 tokens: each may stop at another α within the tolerance."""


def straightforward(model: ql.Model, dictionary: ql.Dictionary, prefixes: Tensor, feature: int) -> Tensor:
    """S of one feature, [25], by the plain way."""

    def logits(alpha: float | None) -> Tensor:
        spliced = splice(model, dictionary, prefixes, error_term=True)
        stream = spliced.clean() if alpha is None else spliced.changed(torch.tensor([feature]), alpha)
        return model.logits(run_from(model, stream, spliced.point, prefixes)[0, :, -1])

    def ranks(of: Tensor) -> Tensor:
        return of.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).double()

    clean = logits(None)
    delta = torch.zeros(model.vocab_size, dtype=torch.float64)
    for target in KL_TARGETS:
        low, high, kl, steered = 1.0, 1000.0, -1.0, clean
        while abs(kl - target) > KL_TOLERANCE and high - low > 1e-3:
            middle = (low + high) / 2
            steered = logits(middle)
            p = clean.log_softmax(-1)
            kl = float((p.exp() * (p - steered.log_softmax(-1))).sum(-1).mean())
            low, high = (low, middle) if kl > target else (middle, high)
        delta += (ranks(clean) - ranks(steered)).mean(0)
    return delta.argsort(descending=True, stable=True)[:25]


@torch.no_grad()
def speed(example: Example, n: int, n_plain: int) -> list[dict[str, Any]]:
    """Seconds a feature of both ways, for each dictionary."""
    model, prefixes = example.model, example.held_out.ids[:N_PREFIXES, :LENGTH]
    found = []
    for dictionary in example.dictionaries:
        features = torch.randperm(dictionary.n_features, generator=torch.Generator().manual_seed(0))[:n]
        promoted_tokens(dictionary, model, features[:8], prefixes=prefixes, progress=False)
        start = time.perf_counter()
        ours = promoted_tokens(dictionary, model, features, prefixes=prefixes, progress=False)
        ours_s = (time.perf_counter() - start) / n
        start = time.perf_counter()
        plain = [straightforward(model, dictionary, prefixes, int(f)) for f in features[:n_plain]]
        plain_s = (time.perf_counter() - start) / n_plain
        alike = [len(set(a.tolist()) & set(b[:25].tolist())) / 25 for a, b in zip(plain, ours.token_ids, strict=False)]
        if sum(alike) / len(alike) < AT_LEAST_ALIKE:
            raise SystemExit(f"the two implementations disagree: overlap {sum(alike) / len(alike):.3f}")
        found.append(
            {
                "dictionary": Path(dictionary.name).name,
                "ours_s_per_feature": ours_s,
                "straightforward_s_per_feature": plain_s,
                "ratio": plain_s / ours_s,
                "kl_evaluations_per_feature": float(ours.evaluations.double().mean()),
                "overlap": sum(alike) / len(alike),
            }
        )
        print(found[-1], flush=True)
    return found


@torch.no_grad()
def adaptive(example: Example, n: int) -> dict[str, Any]:
    """Output scores of the transitions on the two halves of n features of each dictionary."""
    model, prefixes = example.model, example.held_out.ids[:N_PREFIXES, :LENGTH]
    transport = ql.fit_transport(model, example.fit_tokens, sides=("value",), energy="probes", progress=False)
    found = []
    for dictionary in example.dictionaries:
        features = torch.randperm(dictionary.n_features, generator=torch.Generator().manual_seed(0))[:n]
        promoted = promoted_tokens(dictionary, model, features, prefixes=prefixes, progress=False)
        scores = {}
        for preset in (*FIXED, ADAPTIVE):
            given = None if preset.startswith("logit") else transport
            ids = ql.signatures(dictionary, model, preset=preset, transport=given, features=features).top_ids
            scores[preset] = output_scores(promoted, ids)
        scores["oracle"] = torch.stack([scores[name] for name in FIXED]).amax(0)
        halves = {"chosen on": slice(0, n // 2), "reported on": slice(n // 2, None)}
        for half, places in halves.items():
            means = {name: float(values[places].mean()) for name, values in scores.items()}
            found.append({"dictionary": Path(dictionary.name).name, "half": half, "n": n // 2, **means})
            print(found[-1], flush=True)
    means = {
        name: sum(r[name] for r in found if r["half"] == "reported on") / len(example.dictionaries) for name in scores
    }
    best = max(means[name] for name in FIXED)
    means["share"] = (means[ADAPTIVE] - best) / (means["oracle"] - best)
    print(means)
    return {"by dictionary": found, "mean of the reported half": means}


def report(example: Example) -> dict[str, Any]:
    """Seconds of a report on the embedded model and dictionaries, and its rows."""
    tokens = ql.load_tokens(ASSETS / "tokens.safetensors", model=example.model)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        options = {"fit_sequences": FIT_SEQUENCES, "progress": False}
        found = ql.evaluation_report(example.model, example.dictionaries, tokens, folder, **options)
        spent = time.perf_counter() - start
        means = [m.as_dict() for m in found.means if m.k == 25]
        gains = [{**g._asdict(), "gained": len(g.gained), "lost": len(g.lost)} for g in found.gains]
        stability = [row.__dict__ for row in found.stability]
        print(f"report: {spent:.0f} s, {len(found.scores)} rows")
        return {"seconds": spent, "rows": len(found.scores), "means": means, "gains": gains, "stability": stability}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=200, help="features a dictionary, ours (%(default)s)")
    parser.add_argument("--plain", type=int, default=12, help="features a dictionary, straightforward (%(default)s)")
    parser.add_argument("--adaptive", type=int, default=400, help="features a dictionary, part adaptive (%(default)s)")
    parser.add_argument("--parts", default="speed,adaptive,report", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="(%(default)s)")
    options = parser.parse_args(arguments)
    example, on = load_example(), {"machine": machine(torch.device("cpu"))}
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(example, options.features, options.plain),
        "adaptive": lambda: adaptive(example, options.adaptive),
        "report": lambda: report(example),
    }
    for name in options.parts.split(","):
        done = {
            **on,
            "command": f"python -m bench evaluation {' '.join(arguments or [])}".strip(),
            "found": parts[name](),
        }
        record = (
            json.loads(options.out.read_text()) if options.out.exists() else {"prefixes": N_PREFIXES, "tokens": LENGTH}
        )
        save(options.out, {**record, name: done})
    print(options.out)


if __name__ == "__main__":
    main()
