"""The pipeline: vectors → transition → readout → streamed top-k, for one block of features at a time.

`plan` checks everything a run needs and puts a `Pipeline` together; a `Pipeline` turns feature ids into `Signatures`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.ablations import ablate
from querylens_fast.lens.presets import Preset, find_preset
from querylens_fast.lens.readouts import Scorer, find_readout
from querylens_fast.lens.results import LayerTerm, Signatures
from querylens_fast.lens.transitions import ADAPTIVE_CHOICES, Adaptive, TunedLens, load_tuned_lens
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.topk.api import TopK
from querylens_fast.transport.fit import fit_transport, mean_embedding
from querylens_fast.transport.jacobians import Order
from querylens_fast.transport.per_feature import Walked, walk_features
from querylens_fast.transport.transport import Transport, load_transport

Stats = Literal["auto", "none", "rel_var", "exact"]
ENERGY_EPS = 1e-12


@dataclass
class Pipeline:
    """Everything a block of features passes through. Built by `plan`, which checks it."""

    model: Model
    dictionary: Dictionary
    preset: Preset
    k: int
    scorer: Scorer
    transport: Transport | None = None
    tokens: Tokens | None = None
    tuned_lens: TunedLens | None = None
    adaptive: Adaptive | None = None
    stats: Stats = "auto"
    layers: bool = False
    token_change_value: float = 10.0
    backend: str = "auto"
    max_memory_gib: float = 2.0
    keep_vectors: bool = False

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Signatures:
        """The signatures of features [n] (ids, int64)."""
        moved = self._move(features)
        found = self._read_out(moved.vectors)
        stats = self._stats(features, moved)
        return Signatures(
            self,
            features,
            **found.to("cpu").sides(),
            stats={name: column.cpu() for name, column in stats.items()},
            choices=moved.choices,
            layer_terms=self._layer_terms(features, moved) if self.layers else None,
            vectors=moved.vectors.cpu() if self.keep_vectors else None,
        )

    @torch.no_grad()
    def scores_at(self, features: Any, token_ids: Tensor | Sequence[int]) -> Tensor:
        """Scores of given tokens for given features, [n, m]; token_ids [m] or [n, m].

        Raises:
            ValueError: A feature or token id out of range.
        """
        ids = torch.as_tensor(token_ids).long()
        bad = ids[(ids < 0) | (ids >= self.model.vocab_size)]
        if bad.numel():
            raise ValueError(f"token id {int(bad.flatten()[0])} is outside the vocabulary of {self.model.vocab_size}")
        vectors = self._move(self.dictionary.select(features)).vectors
        if self._is_logits(vectors):
            return vectors.gather(1, ids.to(vectors.device).expand(len(vectors), -1)).cpu()
        return self.scorer.scores_at(vectors, ids).cpu()

    def vectors(self, features: Any = None) -> Tensor:
        """What is read out for each feature: transported vectors [n, D]."""
        return self._move(self.dictionary.select(features)).vectors

    def identity(self, features: Tensor) -> dict[str, Any]:
        """What makes two runs the same run, for resuming and for the result's metadata."""
        transport = None if self.transport is None else self.transport.metadata
        return {
            "preset": self.preset.name,
            **self.preset.as_dict(),
            "k": self.k,
            "dictionary": self.dictionary.name,
            "kind": self.dictionary.kind,
            "layer": self.dictionary.layer,
            "features": hashlib.sha256(features.numpy().tobytes()).hexdigest()[:16],
            "n_features": len(features),
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "convention": self.model.convention,
            "final_norm": self.scorer.final_norm,
            "transport": transport,
            "tokens_digest": None if self.tokens is None else self.tokens.digest,
            "tuned_lens": None if self.tuned_lens is None else self.tuned_lens.identity,
            "adaptive_threshold": None if self.adaptive is None else self.adaptive.threshold,
            "token_change_value": self.token_change_value if self.preset.is_ablation else None,
            "stats": self.stats,
            "layers": self.layers,
        }

    def _move(self, features: Tensor) -> _Moved:
        preset, model, side = self.preset, self.model, self.preset.feature_vector
        if preset.is_ablation:
            zero = preset.stream_transition == "zero_out"
            value = 0.0 if zero else self.token_change_value
            assert self.tokens is not None
            changed = ablate(model, self.tokens, self.dictionary, features, value, zero, self.max_memory_gib)
            return _Moved(changed)
        vectors = self.dictionary.vectors(side, features).to(model.device, model.dtype)
        if preset.stream_transition == "identity":
            return _Moved(vectors)
        if self.tuned_lens is not None:
            return _Moved(self.tuned_lens(vectors, self.dictionary.layer, model.n_layers))
        point = self.dictionary.point(side)
        if self.adaptive is not None and self.transport is not None:
            moved, choice = self.adaptive(self.transport, vectors, side, point)
            return _Moved(moved, [ADAPTIVE_CHOICES[c] for c in choice.tolist()])
        if self.transport is not None:
            return _Moved(self.transport.apply(vectors, side, self._order, point))
        walked = self._walk(vectors, point)
        return _Moved(walked.mean, walked=walked)

    def _walk(self, vectors: Tensor, point: int) -> Walked:
        assert self.tokens is not None
        fitted = {} if self.transport is None else self.transport.metadata
        return walk_features(
            self.model,
            self.tokens,
            vectors,
            point,
            self.preset.feature_vector,
            self._order,
            layer=self.dictionary.layer,
            submodule=fitted.get("submodule", "both"),  # type: ignore[arg-type]
            through_norms=fitted.get("through_norms", "True") == "True",
            max_memory_gib=self.max_memory_gib,
        )

    @property
    def _order(self) -> Order:
        return "first_order" if self.preset.stream_transition == "first_order" else "full"

    def _is_logits(self, vectors: Tensor) -> bool:
        """Do the ablated vectors hold logits already (a model with a logit soft cap)?"""
        return (
            self.preset.is_ablation and self.model.logit_softcap is not None and vectors.shape[1] != self.model.d_model
        )

    def _read_out(self, vectors: Tensor) -> TopK:
        if self._is_logits(vectors):
            top = vectors.sort(dim=1, descending=True, stable=True)
            bottom = vectors.sort(dim=1, stable=True)
            k = self.k
            return TopK(top.values[:, :k], top.indices[:, :k], bottom.values[:, :k], bottom.indices[:, :k])
        return self.scorer.topk(vectors, self.k, self.backend)

    def _stats(self, features: Tensor, moved: _Moved) -> dict[str, Tensor]:
        side = self.preset.feature_vector
        if self.stats == "none" or not self.preset.needs_transport:
            return {}
        if moved.walked is not None:
            return moved.walked.stats
        vectors = self.dictionary.vectors(side, features).to(self.model.device, self.model.dtype)
        point = self.dictionary.point(side)
        if self.stats == "exact":
            return self._walk(vectors, point).stats
        if self.transport is not None and (side, self._order) in self.transport.energies:
            spread, error = self.transport.rel_var(vectors, side, self._order, point)
            return {"rel_var": spread, "rel_var_se": error}
        return {}

    def _layer_terms(self, features: Tensor, moved: _Moved) -> list[LayerTerm]:
        if moved.walked is not None:
            means = moved.walked.layer_means
        else:
            assert self.transport is not None
            side, point = self.preset.feature_vector, self.dictionary.point(self.preset.feature_vector)
            vectors = self.dictionary.vectors(side, features).to(self.model.device, self.model.dtype).to(moved.vectors)
            terms = self.transport.layer_terms(side, point, self.dictionary.layer)
            means = [(layer, vectors if m is None else vectors @ m.mT) for layer, m in terms]
        total = at_least_float32(moved.vectors)
        norm2 = total.square().sum(-1).clamp_min(ENERGY_EPS)
        return [
            LayerTerm(
                layer,
                self.scorer.topk(mean, self.k, self.backend).to("cpu"),
                ((at_least_float32(mean) * total).sum(-1) / norm2).cpu(),
            )
            for layer, mean in means
        ]


@dataclass(frozen=True)
class _Moved:
    vectors: Tensor
    choices: list[str] | None = None
    walked: Walked | None = None


def plan(
    dictionary: Any,
    model: Any,
    *,
    preset: str | Preset | Sequence[str | None] = "query_lens_value",
    transport: Transport | str | Path | None = None,
    k: int = 25,
    tokens: Tokens | Tensor | str | Path | None = None,
    tuned_lens: str | Path | None = None,
    stats: Stats = "auto",
    layers: bool = False,
    token_change_value: float = 10.0,
    adaptive_threshold: float = 0.5,
    final_norm: bool = True,
    backend: str = "auto",
    max_memory_gib: float = 2.0,
    vectors: bool = False,
    n_features: int | None = None,
    progress: bool = False,
) -> Pipeline:
    """Check everything a run needs and put it together. Arguments and errors as in `signatures`."""
    model, lens = as_model(model), find_preset(preset)
    dictionary = load_dictionary(dictionary).on(model)
    if not lens.is_ablation:
        dictionary.check_direction(lens.feature_vector)
    if not 1 <= k <= model.vocab_size:
        raise ValueError(f"k is {k}; expected 1 to the vocabulary's {model.vocab_size}")
    if stats not in ("auto", "none", "rel_var", "exact"):
        raise ValueError(f"stats is {stats!r}; expected auto, none, rel_var or exact")
    tokens = None if tokens is None else as_tokens(tokens, model)
    moves = lens.needs_transport
    if isinstance(transport, (str, Path)):
        transport = load_transport(transport)
    if moves or lens.stream_transition == "tuned_lens":
        dictionary.point(lens.feature_vector)
    if moves and transport is None:
        transport = _fit_if_cheaper(model, dictionary, lens, tokens, stats, n_features, max_memory_gib, progress)
    if moves and transport is not None:
        transport.check_model(model)
        transport = transport.to(model.device)
        _check_transport(transport, lens, stats, dictionary.point(lens.feature_vector))
    if stats == "exact" and moves and tokens is None:
        raise ValueError("stats='exact' walks the chosen features through the model: pass tokens=")
    if lens.is_ablation:
        if tokens is None:
            raise ValueError(f"preset {lens.name!r} runs the model on a sample: pass tokens=")
        if dictionary.kind != "neurons":
            _ = dictionary.coder
    if (tuned_lens is not None) != (lens.stream_transition == "tuned_lens"):
        raise ValueError(
            f"preset {lens.name!r} needs tuned_lens='params.pt'" if tuned_lens is None
            else f"tuned_lens is given, but preset {lens.name!r} does not use one"
        )  # fmt: skip
    if layers and lens.stream_transition != "first_order":
        raise ValueError(f"layers=True is for first-order presets; {lens.name!r} has no terms by layer")
    centre = None
    if moves and transport is not None:
        centre = transport.centre
    elif moves and tokens is not None:
        centre = mean_embedding(model, tokens)
    return Pipeline(
        model=model,
        dictionary=dictionary,
        preset=lens,
        k=k,
        scorer=find_readout(model, lens.readout, centre, final_norm),
        transport=transport if moves else None,
        tokens=tokens,
        tuned_lens=None if tuned_lens is None else load_tuned_lens(tuned_lens),
        adaptive=Adaptive(adaptive_threshold) if lens.stream_transition == "adaptive" else None,
        stats=stats,
        layers=layers,
        token_change_value=token_change_value,
        backend=backend,
        max_memory_gib=max_memory_gib,
        keep_vectors=vectors,
    )


def _fit_if_cheaper(
    model: Model,
    dictionary: Dictionary,
    lens: Preset,
    tokens: Tokens | None,
    stats: Stats,
    n_features: int | None,
    max_memory_gib: float,
    progress: bool,
) -> Transport | None:
    """A transport for this run when it costs fewer walks than the features do; None: walk the features themselves."""
    if tokens is None:
        raise ValueError(
            f"preset {lens.name!r} needs transport= (from fit_transport or load_transport), or tokens= to walk features"
        )
    adaptive = lens.stream_transition == "adaptive"
    n = dictionary.n_features if n_features is None else n_features
    if not adaptive and stats != "rel_var" and n < model.d_model:
        return None
    orders: tuple[Order, ...] = ("first_order",) if lens.stream_transition == "first_order" else ("full",)
    return fit_transport(
        model,
        tokens,
        sides=(lens.feature_vector,),
        orders=("first_order", "full") if adaptive else orders,
        energy="probes" if adaptive or stats == "rel_var" else "none",
        max_memory_gib=max_memory_gib,
        progress=progress,
    )


def _check_transport(transport: Transport, lens: Preset, stats: Stats, point: int) -> None:
    needed: tuple[Order, ...] = {"first_order": ("first_order",), "full": ("full",)}.get(
        lens.stream_transition, ("first_order", "full")
    )  # type: ignore[assignment]
    if transport.centre is None and lens.readout == "embed_cosine_centered":
        raise ValueError(
            f"preset {lens.name!r} centres on the sample's mean embedding, which the transport of "
            f"{transport.metadata['tokens']} does not know; fit one with fit_transport"
        )
    for order in needed:
        transport.matrix(lens.feature_vector, order, point)
        wants_energy = stats == "rel_var" or lens.stream_transition == "adaptive"
        if wants_energy and (lens.feature_vector, order) not in transport.energies:
            raise ValueError(
                f"preset {lens.name!r} with stats={stats!r} needs energies for {lens.feature_vector}/{order}: "
                "fit the transport with energy='probes' or energy='exact'"
            )
