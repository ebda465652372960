"""Output score O(T): which tokens rise when a feature is steered, and how many of them a signature holds (paper §5.2).

For prefixes P and activations α that reach KL targets, with r the rank of a token in the next-token distribution,

    Δ(t) = mean over α and P of (r_clean(t) − r_steered(t)) / V,    S = the n tokens with the largest Δ,
    O(T) = |S ∩ T| / |S|,    ties in Δ and in ranks by the lower id.

S belongs to the feature alone, so it is computed and stored once (`promoted_tokens`); the score of any signature,
preset or k is then a set intersection (`output_scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.ranking import POSITIONS, Positions, Ranking, generated_ranking, prefix_ranking
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.relations.tables import Block, digest_of, identity_of, read_table, tabulate
from querylens_fast.runs.arguments import finite_number, whole_number
from querylens_fast.transport.jacobians import batches

if TYPE_CHECKING:
    import pyarrow as pa

KL_TARGETS = (0.25, 0.5)
"""The paper's."""
N_PROMOTED = 100
"""Tokens of S that are stored; a score of a signature of k tokens uses the first k."""
START_ALPHA = 5.0
"""First guess of a block's first features' α, in units of activation."""
FEATURES_A_BLOCK = 128
"""Features computed and written together."""


@dataclass(frozen=True)
class Promoted:
    """The tokens that rise most under steering.

    Attributes:
        features: [n] ids.
        token_ids: S, [n, m] int64, by descending Δ.
        delta: Their Δ, [n, m] float32, as a share of the vocabulary.
        alphas: Activation for each KL target, [n, targets].
        kl: KL reached, [n, targets] nats.
        evaluations: KL evaluations spent on each feature, [n].
    """

    features: Tensor
    token_ids: Tensor
    delta: Tensor
    alphas: Tensor
    kl: Tensor
    evaluations: Tensor

    def at(self, places: Tensor) -> Promoted:
        """The rows at some places."""
        return Promoted(*(getattr(self, f.name)[places] for f in fields(self)))

    def table(self) -> pa.Table:
        """One row per feature; `read_promoted` reads it back."""
        import pyarrow as pa

        def lists(values: Tensor) -> pa.Array:
            flat = pa.array(values.flatten().numpy())
            return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return pa.table({n: lists(v) if v.ndim == 2 else pa.array(v.numpy()) for n, v in columns.items()})

    @classmethod
    def of(cls, table: pa.Table) -> Promoted:
        """From `table`'s columns."""
        columns = {}
        for f in fields(cls):
            column = table[f.name].combine_chunks()
            width = getattr(column.type, "list_size", None)
            values = column if width is None else column.flatten()
            tensor = torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
            columns[f.name] = tensor if width is None else tensor.view(-1, width)
        return cls(**columns)


def neutral_prefixes() -> list[str]:
    """The 100 neutral English prefixes that come with the package."""
    text = files("querylens_fast.evaluation").joinpath("prefixes.txt").read_text(encoding="utf-8")
    return text.splitlines()


def prefix_ids(model: Model, prefixes: Sequence[str] | Tensor | None) -> list[Tensor]:
    """Prefixes as token ids, those of one length together: tensors [B, S] without padding.

    Args:
        model: With a tokenizer, unless ids are given.
        prefixes: Strings, ids [B, S], or None for `neutral_prefixes`.

    Raises:
        ValueError: No tokenizer, no prefix, or a prefix without a token.
    """
    if isinstance(prefixes, Tensor):
        if prefixes.ndim != 2 or not prefixes.numel():
            raise ValueError(f"prefixes are {list(prefixes.shape)}; expected token ids [B, S]")
        if prefixes.is_floating_point() or not 0 <= int(prefixes.min()) <= int(prefixes.max()) < model.vocab_size:
            raise ValueError(
                f"prefixes hold other numbers than token ids of {model.name!r}, 0 to {model.vocab_size - 1}"
            )
        return _within_positions(model, [prefixes.long()])
    if model.tokenizer is None:
        raise ValueError(f"model {model.name!r} has no tokenizer for the prefixes: pass token ids [B, S]")
    texts = neutral_prefixes() if prefixes is None else list(prefixes)
    by_length: dict[int, list[list[int]]] = {}
    for text in texts:
        ids = model.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError(f"prefix {text!r} has no tokens")
        by_length.setdefault(len(ids), []).append(ids)
    if not by_length:
        raise ValueError("prefixes is an empty list; expected at least one")
    return _within_positions(model, [torch.tensor(ids) for _, ids in sorted(by_length.items())])


def _within_positions(model: Model, prefixes: list[Tensor]) -> list[Tensor]:
    """The prefixes; raises ValueError for one that is longer than the model's positions."""
    longest, positions = max(ids.shape[1] for ids in prefixes), model.max_positions
    if positions is not None and longest > positions:
        raise ValueError(
            f"a prefix has {longest} tokens, but model {model.name!r} has {positions} positions; shorten it"
        )
    return prefixes


@torch.no_grad()
def promoted_tokens(
    dictionary: Any,
    model: Any,
    features: Any,
    *,
    prefixes: Sequence[str] | Tensor | None = None,
    kl_targets: Sequence[float] = KL_TARGETS,
    n_tokens: int = N_PROMOTED,
    positions: Positions = "prefix",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> Promoted:
    """The tokens whose rank rises most when each feature is steered to the KL targets.

    Args:
        dictionary: As in `signatures`; one that can be run.
        model: As in `signatures`.
        features: Feature ids, as in `signatures`.
        prefixes: What the model reads before the token that is ranked; see `prefix_ids`.
        kl_targets: In nats.
        n_tokens: Size of S.
        positions: Where tokens are ranked: "prefix" (the next token of each prefix, as the paper), "forced" (along a
            clean continuation of each prefix) or "generate" (along sampled text, as the reference's code); `ranking`.
        seed: Of the sampling of "forced" and "generate".
        out: A ``.parquet`` file to stream to, one row per feature; a killed run resumes. `read_promoted` reads it.
        resume: As in `signatures`.
        progress: As in `signatures`.

    Cost: for each feature some two KL evaluations per target, each a pass of the prefixes through the layers above
    the dictionary, and one ranking per target. The clean pass runs once a block of features.

    Raises:
        ValueError: A dictionary that cannot be run, no features, n_tokens outside the vocabulary, unknown positions, or
            KL targets that are not positive.
    """
    model, dictionary = as_model(model), load_dictionary(dictionary)
    dictionary.check_model(model)
    chosen = dictionary.select(features)
    if not len(chosen):
        raise ValueError(f"features={features!r} chooses none of {dictionary.n_features}")
    n_tokens, seed = whole_number("n_tokens", n_tokens), whole_number("seed", seed, least=0)
    if n_tokens > model.vocab_size:
        raise ValueError(f"n_tokens is {n_tokens}; expected 1 to the vocabulary's {model.vocab_size}")
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; expected one of {', '.join(POSITIONS)}")
    kl_targets = [finite_number("a KL target in nats", target, above=0) for target in kl_targets]
    if not kl_targets:
        raise ValueError("kl_targets is empty; expected positive numbers of nats")
    groups = prefix_ids(model, prefixes)
    metadata = identity_of(
        model,
        what="promoted tokens",
        dictionary=dictionary.name,
        dictionary_fingerprint=dictionary.fingerprint,
        layer=dictionary.layer,
        features=digest_of(chosen),
        n_features=len(chosen),
        prefixes=digest_of(torch.cat([ids.flatten() for ids in groups])),
        n_prefixes=sum(map(len, groups)),
        kl_targets=list(kl_targets),
        n_tokens=n_tokens,
        positions=positions,
        seed=None if positions == "prefix" else seed,
    )
    ranking = generated_ranking if positions == "generate" else partial(prefix_ranking, forced=positions == "forced")
    search = _Search(partial(ranking, model, dictionary, groups, seed), kl_targets, n_tokens)
    blocks = [Block(len(ids), partial(search.rows, ids)) for ids in chosen.split(FEATURES_A_BLOCK)]
    return Promoted.of(tabulate(blocks, metadata, out=out, resume=resume, progress=progress).table())


def read_promoted(path: str | Path) -> Promoted:
    """What `promoted_tokens` wrote.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It holds something else.
    """
    found = read_table(path)
    if found.metadata.get("what") != "promoted tokens":
        raise ValueError(f"{str(path)!r} holds {found.metadata.get('what')!r}; expected promoted tokens")
    return Promoted.of(found.table())


class _Search:
    """The promoted tokens of a block of features. The first guess of α is the same for every block, so that a result
    does not depend on where a run was interrupted."""

    def __init__(self, ranking: Callable[[Tensor], Ranking], targets: Sequence[float], n_tokens: int) -> None:
        self.ranking, self.targets, self.n_tokens = ranking, targets, n_tokens

    @torch.no_grad()
    def rows(self, features: Tensor) -> pa.Table:
        """One row for each of the features [n]."""
        ranking = self.ranking(features)
        guess = torch.full((len(self.targets),), START_ALPHA).double()
        found = []
        for part in batches(len(features), ranking.features_at_once):
            index = torch.arange(part.start, part.stop)
            delta, calibrated = ranking.rise(index, self.targets, guess)
            guess = torch.stack([c.alphas.log().median().exp() for c in calibrated])
            order = delta.argsort(dim=1, descending=True, stable=True)[:, : self.n_tokens]
            found.append(
                Promoted(
                    features[index],
                    order,
                    delta.gather(1, order).float(),
                    torch.stack([c.alphas for c in calibrated], 1),
                    torch.stack([c.kl for c in calibrated], 1),
                    torch.stack([c.evaluations for c in calibrated]).sum(0),
                )
            )
        return Promoted(*(torch.cat([getattr(p, f.name) for p in found]) for f in fields(Promoted))).table()


def output_scores(promoted: Promoted, signature_ids: Tensor) -> Tensor:
    """O(T) of each feature, [n], for signature token ids [n, k]: |S ∩ T| / |S| with the k first tokens of S.

    Raises:
        ValueError: Other features' signatures, or k larger than the stored S.
    """
    n, k = signature_ids.shape
    if n != len(promoted.features):
        raise ValueError(f"signature_ids are of {n} features, but promoted is of {len(promoted.features)}")
    if k > promoted.token_ids.shape[1]:
        raise ValueError(
            f"k is {k}, but only {promoted.token_ids.shape[1]} promoted tokens are stored; use n_tokens={k}"
        )
    chosen = promoted.token_ids[:, :k]
    return (chosen[:, :, None] == signature_ids.cpu()[:, None, :]).any(-1).float().mean(1)
