"""The lens of one preset for one dictionary: feature vector → stream transition → readout → top and bottom tokens.

`planning.plan` checks that everything belongs together and builds a `Pipeline`, which is then called with one block of
feature ids and vectors at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dashboard_values import norm_left_out
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.rows import unit_rows
from querylens_fast.lens.options import LensOptions
from querylens_fast.lens.presets import Preset
from querylens_fast.lens.readouts import Readout, Scorer
from querylens_fast.lens.reliability import Jackknife
from querylens_fast.lens.results import LayerTerm, Signatures, Source
from querylens_fast.lens.transitions import Adaptive, Moved, Transition, Transported
from querylens_fast.lens.tuned_lens import TunedLens
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.tokens import Tokens
from querylens_fast.topk.api import TopK
from querylens_fast.transport.transport import Transport

ENERGY_EPS = 1e-12


@dataclass(frozen=True)
class Pipeline:
    """A checked lens. Built by `plan`."""

    model: Model
    dictionary: Dictionary
    preset: Preset
    options: LensOptions
    transition: Transition
    readout: Readout
    transport: Transport | None
    tokens: Tokens | None
    tuned_lens: TunedLens | None

    @property
    def backend(self) -> str:
        """Of the streamed top-k."""
        return self.options.backend

    @cached_property
    def jackknife(self) -> Jackknife | None:
        """Standard errors of top scores, where the transport keeps groups of sequences and what the preset needs."""
        transport, stats = self.transport, self.options.stats
        if transport is None or len(transport.group_sizes) < 2 or stats == "none":
            return None
        mixed = isinstance(self.transition, Adaptive) and self.transition.threshold is None
        if not (isinstance(self.transition, Transported) or mixed and transport.group_energies):
            return None
        point, final_norm = self.dictionary.point(self.preset.feature_vector), self.options.final_norm
        return Jackknife(self.model, transport, self.preset, point, final_norm)

    @property
    def scorer(self) -> Scorer:
        """The readout as a matrix product.

        Raises:
            ValueError: It is none: an ablation of a model with a logit soft cap ends in logits.
        """
        if not isinstance(self.readout, Scorer):
            raise ValueError(f"preset {self.preset.name!r} ends in logits: it has no product with an unembedding")
        return self.readout

    @torch.no_grad()
    def __call__(self, ids: Tensor, vectors: Tensor) -> Signatures:
        """The signatures of features ids [n] with vectors [n, D] (`read` has them)."""
        vectors = self._placed(vectors)
        moved = self.transition(ids, vectors)
        found = self._topk(moved.vectors)
        sides: dict[str, Any] = found.sides()
        self._check_finite(ids, sides)
        stats = {} if self.options.stats == "none" else dict(moved.stats)
        top_se = None
        if self.jackknife is not None:
            top_se, stats["stable_k"] = self.jackknife(vectors, sides["top_ids"], sides["top_scores"], self.backend)
        return Signatures(
            self.source,
            ids,
            **sides,
            stats={name: column.cpu() for name, column in stats.items()},
            top_se=None if top_se is None else top_se.cpu(),
            choices=moved.choices,
            histogram=None if found.statistics is None else found.statistics.histogram,
            layer_terms=self._layer_terms(moved) if self.options.layers else None,
            vectors=moved.vectors.cpu() if self.options.vectors else None,
            handle=self,
        )

    def read(self, features: Any = None) -> tuple[Tensor, Tensor]:
        """(ids [n], vectors [n, D]) of features, as the pipeline is called with; vectors are empty where not needed."""
        ids = self.dictionary.select(features)
        if not self.transition.reads_vectors:
            return ids, torch.empty(len(ids), 0)
        return ids, self.dictionary.vectors(self.preset.feature_vector, ids)

    @torch.no_grad()
    def vectors(self, features: Any = None) -> Tensor:
        """What is read out for each feature: transported vectors [n, D]."""
        ids, vectors = self.read(features)
        return self.transition(ids, self._placed(vectors)).vectors

    def scores_at(self, features: Any, token_ids: Tensor | Sequence[int]) -> Tensor:
        """Scores of given tokens for given features, [n, m]; token_ids [m] or [n, m].

        Raises:
            ValueError: A feature or token id out of range.
        """
        try:
            ids = torch.as_tensor(token_ids)
        except (RuntimeError, TypeError, ValueError):
            ids = torch.empty(0)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"token_ids is {str(token_ids)[:80]!r}; expected integer token ids [m] or [n, m]")
        ids = ids.long()
        bad = ids[(ids < 0) | (ids >= self.model.vocab_size)]
        if bad.numel():
            raise ValueError(f"token id {int(bad.flatten()[0])} is outside the vocabulary of {self.model.vocab_size}")
        return self.readout.scores_at(self.vectors(features), ids).cpu()

    def str_tokens(self, ids: Iterable[int]) -> list[str]:
        """Token strings of ids."""
        return self.model.str_tokens(ids)

    @property
    def source(self) -> Source:
        """What its signatures are of."""
        dictionary = self.dictionary
        return Source(self.preset, dictionary.name, dictionary.kind, dictionary.layer, dictionary.n_features)

    def identity(self, features: Tensor) -> dict[str, Any]:
        """What makes two runs the same run, for resuming and for the result's metadata.

        The keys are those of files written before; options that have come since are added where they were given.
        """
        options, transition = self.options, self.preset.stream_transition
        given = {"submodule": options.submodule, "through_norms": options.through_norms}
        given["unit_norm"] = options.at_unit_length or None
        given["histogram"] = options.histogram or None
        read, written = self.dictionary.hook_name, self.dictionary.hook_name_out
        given |= {"hook_name": read or None, "hook_name_out": written if written not in ("", read) else None}
        if self.preset.is_dashboard:
            left_out = norm_left_out(self.dictionary, self.model)
            given |= {"unembedding": options.unembedding, "post_norm": "left out" if left_out else None}
        return {
            "preset": self.preset.name,
            **self.preset.as_dict(),
            "k": options.k,
            "dictionary": self.dictionary.name,
            "kind": self.dictionary.kind,
            "layer": self.dictionary.layer,
            "features": hashlib.sha256(features.numpy().tobytes()).hexdigest()[:16],
            "n_features": len(features),
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "convention": self.model.convention,
            "final_norm": self.readout.final_norm,
            "transport": None if self.transport is None else self.transport.metadata,
            "tokens_digest": None if self.tokens is None else self.tokens.digest,
            "tuned_lens": None if self.tuned_lens is None else self.tuned_lens.identity,
            "adaptive_threshold": options.adaptive_threshold if transition == "adaptive" else None,
            "token_change_value": options.token_change_value if self.preset.is_ablation else None,
            "stats": options.stats,
            "layers": options.layers,
            **{name: value for name, value in given.items() if value is not None},
        }

    def _topk(self, vectors: Tensor) -> TopK:
        k, bins = self.options.k, self.options.histogram
        if bins:
            return self.scorer.topk(vectors, k, self.backend, histogram=bins).to("cpu")
        return self.readout.topk(vectors, k, self.backend).to("cpu")

    def _placed(self, vectors: Tensor) -> Tensor:
        # Those that dashboards carry were divided by their length before.
        divided = self.preset.is_dashboard and self.dictionary.carried
        if self.options.at_unit_length and self.transition.reads_vectors and not divided:
            vectors = unit_rows(vectors)
        return vectors.to(self.model.device, self.model.dtype)

    def _check_finite(self, ids: Tensor, sides: dict[str, Tensor]) -> None:
        """Raise ValueError where a signature's first score is NaN or infinite: numbers overflowed on the way to it."""
        firsts = torch.stack([sides["top_scores"][:, 0], sides["bottom_scores"][:, 0]], 1)
        bad = ~torch.isfinite(firsts).all(1)
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            raise ValueError(
                f"dictionary {self.dictionary.name!r}, feature {int(ids[place])}: its {self.preset.name} scores are "
                f"not finite ({firsts[place].tolist()}), nor are those of {int(bad.sum()) - 1} others at hand; the "
                f"weights overflow {self.model.dtype}: mend them, or load the model with dtype='float64'"
            )

    def _layer_terms(self, moved: Moved) -> list[LayerTerm]:
        total = at_least_float32(moved.vectors)
        norm2 = total.square().sum(-1).clamp_min(ENERGY_EPS)
        return [
            LayerTerm(
                layer,
                self.readout.topk(mean, self.options.k, self.backend).to("cpu"),
                ((at_least_float32(mean) * total).sum(-1) / norm2).cpu(),
            )
            for layer, mean in moved.layer_means
        ]
