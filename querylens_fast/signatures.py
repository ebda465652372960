"""Signatures: the tokens of every feature, block by block from the dictionary's file to the writer.

`signatures` is the package's main job. It plans a `Pipeline` (every check happens there, before anything is computed
or written), then streams blocks of features through it: vectors → transition → readout → streamed top-k. In memory
the result is one `Signatures`; with ``out=`` blocks go to a Parquet or JSONL file and a killed run resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.ablations import ablate
from querylens_fast.blocks import at_least_float32
from querylens_fast.dictionaries import Dictionary, load_dictionary
from querylens_fast.linearity import Walked, walk_features
from querylens_fast.models import Model, as_model
from querylens_fast.ops import TopK
from querylens_fast.presets import Preset, find_preset
from querylens_fast.readouts import Scorer, find_readout
from querylens_fast.tokens import Tokens, as_tokens
from querylens_fast.transitions import ADAPTIVE_CHOICES, Adaptive, TunedLens, load_tuned_lens
from querylens_fast.transport import Transport, fit_transport, load_transport
from querylens_fast.walks import Order, batches

Stats = Literal["auto", "none", "rel_var", "exact"]
BLOCK_ROWS = 2048
ENERGY_EPS = 1e-12


@dataclass(frozen=True)
class LayerTerm:
    """One layer's share of a first-order result: its own tokens and its energy ⟨m_l, m⟩/‖m‖², [n]."""

    layer: int
    topk: TopK
    energy: Tensor


@dataclass
class Signatures:
    """Token signatures of n features of one layer under one preset.

    Attributes:
        features: Feature ids, [n] int64.
        top_scores: [n, k], descending, in raw units of the readout (logits for unembed; no softmax).
        top_ids: [n, k] int64 token ids; equal scores by the lower id.
        bottom_scores: [n, k], ascending.
        bottom_ids: [n, k] int64.
        stats: Columns by name, [n] each: rel_var and rel_var_se from a transport, or all the reference's statistics.
        choices: What the adaptive preset took for each feature, or None.
        layer_terms: The first order's layers, in the reference's order, when asked for.
        vectors: The vectors that were read out, [n, D], when asked for.
    """

    pipeline: Pipeline
    features: Tensor
    top_scores: Tensor
    top_ids: Tensor
    bottom_scores: Tensor
    bottom_ids: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    choices: list[str] | None = None
    layer_terms: list[LayerTerm] | None = None
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def layer(self) -> int:
        return self.pipeline.dictionary.layer

    @property
    def preset(self) -> str:
        return self.pipeline.preset.name

    @property
    def top_tokens(self) -> list[list[str]]:
        """Token strings of top_ids, n lists of k."""
        return self._strings(self.top_ids)

    @property
    def bottom_tokens(self) -> list[list[str]]:
        """Token strings of bottom_ids, n lists of k."""
        return self._strings(self.bottom_ids)

    def scores_at(self, features: Any, token_ids: Tensor | Sequence[int]) -> Tensor:
        """Scores of given tokens for given features, [n, m]; token_ids [m] or [n, m]."""
        return self.pipeline.scores_at(features, token_ids)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The results in the reference's row format, one dictionary a feature (without feature_index)."""
        top, bottom = self.top_tokens, self.bottom_tokens
        for i, feature in enumerate(self.features.tolist()):
            row: dict[str, Any] = {
                **self.pipeline.preset.as_dict(),
                "layer": self.layer,
                "feature": feature,
                "top_tokens": top[i],
                "bottom_tokens": bottom[i],
                "top_ids": self.top_ids[i].tolist(),
                "bottom_ids": self.bottom_ids[i].tolist(),
                "top_scores": self.top_scores[i].tolist(),
                "bottom_scores": self.bottom_scores[i].tolist(),
            }
            if self.stats:
                row["stats"] = {name: float(column[i]) for name, column in self.stats.items()}
            if self.choices is not None:
                row["transition"] = self.choices[i]
            if self.layer_terms is not None:
                row |= self._layer_row(i)
            yield row

    def _layer_row(self, i: int) -> dict[str, Any]:
        terms = self.layer_terms or []
        top = [_ids(t.topk.top_ids)[i].tolist() for t in terms]
        bottom = [_ids(t.topk.bottom_ids)[i].tolist() for t in terms]
        str_tokens = self.pipeline.model.str_tokens
        return {
            "layer_indices": [t.layer for t in terms],
            "layer_top_tokens": [str_tokens(ids) for ids in top],
            "layer_bottom_tokens": [str_tokens(ids) for ids in bottom],
            "layer_top_ids": top,
            "layer_bottom_ids": bottom,
            "layer_energy_scores": [float(t.energy[i]) for t in terms],
        }

    def _strings(self, ids: Tensor) -> list[list[str]]:
        flat = self.pipeline.model.str_tokens(ids.flatten().tolist())
        k = ids.shape[1]
        return [flat[i : i + k] for i in range(0, len(flat), k)]


def _ids(ids: Tensor | None) -> Tensor:
    if ids is None:
        raise ValueError("this side was not computed")
    return ids


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
            *(x.cpu() for x in found if x is not None),
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
            "convention": self.model.convention,
            "final_norm": self.scorer.final_norm,
            "transport": transport,
            "tokens_digest": None if self.tokens is None else self.tokens.digest,
            "tuned_lens": None if self.tuned_lens is None else self.tuned_lens.path,
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
                TopK(*(x if x is None else x.cpu() for x in self.scorer.topk(mean, self.k, self.backend))),
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
    dictionary = load_dictionary(dictionary)
    dictionary.check_model(model)
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
        _check_transport(transport, lens, stats)
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
        valid = tokens.valid_mask.to(model.device)
        centre = at_least_float32(model.embed(tokens.ids)[valid]).mean(0)
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


def _check_transport(transport: Transport, lens: Preset, stats: Stats) -> None:
    needed: tuple[Order, ...] = {"first_order": ("first_order",), "full": ("full",)}.get(
        lens.stream_transition, ("first_order", "full")
    )  # type: ignore[assignment]
    for order in needed:
        transport.matrix(lens.feature_vector, order, 0)
        wants_energy = stats == "rel_var" or lens.stream_transition == "adaptive"
        if wants_energy and (lens.feature_vector, order) not in transport.energies:
            raise ValueError(
                f"preset {lens.name!r} with stats={stats!r} needs energies for {lens.feature_vector}/{order}: "
                "fit the transport with energy='probes' or energy='exact'"
            )


def signatures(
    dictionary: Any,
    model: Any,
    *,
    preset: str | Preset | Sequence[str | None] = "query_lens_value",
    transport: Transport | str | Path | None = None,
    k: int = 25,
    features: Any = None,
    out: str | Path | None = None,
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
    format: str | None = None,
    token_strings: bool = True,
    block_rows: int = BLOCK_ROWS,
    resume: bool = True,
    progress: bool | None = None,
) -> Any:
    """Token signatures of a dictionary's features.

    Args:
        dictionary: From `load_dictionary`, `directions` or `neuron_dictionary` (or what `load_dictionary` takes).
        model: From `load_model` (or what `as_model` takes).
        preset: A name in `PRESETS`, or (feature_vector, stream_transition, readout).
        transport: From `fit_transport` or `load_transport`, or a file. Without one, give ``tokens``: few features are
            then walked one by one, more than d_model features through a transport fitted for the call.
        k: Tokens on each side.
        features: None or "all", a slice, "a:b", or feature ids.
        out: A ``.parquet`` or ``.jsonl`` file to stream to; the run resumes when it was killed.
        tokens: The sample, for token_change, zero_out, ``stats="exact"``, or in place of a transport.
        tuned_lens: The params file, for tuned_lens.
        stats: "auto" gives what comes for free; "rel_var" wants the transport's energies; "exact" all of the
            reference's statistics, by walking each feature; "none".
        layers: For first order: each layer's own tokens and energy too.
        token_change_value: The activation token_change sets.
        adaptive_threshold: See `Adaptive`.
        final_norm: Apply the final norm before W_U (reference ``use_unembed_layer_norm``).
        backend: Of the streamed top-k.
        max_memory_gib: Bound on the working memory of walks.
        vectors: Keep the vectors that are read out in the result.
        format: "parquet" or "jsonl", by default from out's ending.
        token_strings: Write token strings beside ids (needs a tokenizer).
        block_rows: Features a block.
        resume: Go on from what an earlier, killed run wrote to out; False: refuse to touch it.
        progress: Show a progress bar; by default with ``out``.

    Returns:
        `Signatures`, or with ``out`` a `StoredSignatures`.

    Raises:
        ValueError: Anything that does not fit together, by name; nothing has been written then.
        FileNotFoundError: A missing file.
        FileExistsError: ``out`` holds the result of another run.
        OSError: The disk is full; what was written stays and the run resumes.
    """
    dictionary = load_dictionary(dictionary)
    chosen = dictionary.select(features)
    show = out is not None if progress is None else progress
    pipeline = plan(
        dictionary,
        model,
        preset=preset,
        transport=transport,
        k=k,
        tokens=tokens,
        tuned_lens=tuned_lens,
        stats=stats,
        layers=layers,
        token_change_value=token_change_value,
        adaptive_threshold=adaptive_threshold,
        final_norm=final_norm,
        backend=backend,
        max_memory_gib=max_memory_gib,
        vectors=vectors,
        n_features=len(chosen),
        progress=show,
    )
    if block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}; expected at least 1")
    label = f"{pipeline.preset.name} layer {dictionary.layer}"
    if out is None:
        with tqdm(total=len(chosen), desc=label, unit="feature", disable=not show) as bar:
            parts = []
            for block in batches(len(chosen), block_rows):
                parts.append(pipeline(chosen[block]))
                bar.update(len(parts[-1]))
        return concatenate(parts) if parts else pipeline(chosen)
    from querylens_fast.store import open_sink

    identity = {**pipeline.identity(chosen), "block_rows": block_rows}
    with open_sink(out, format, identity, resume=resume, token_strings=token_strings, model=pipeline.model) as sink:
        if pipeline.tokens is not None:
            pipeline.tokens.save(Path(f"{out}.tokens.safetensors"))
        with tqdm(total=len(chosen), desc=label, unit="feature", disable=not show) as bar:
            for block in batches(len(chosen), block_rows):
                pending = sink.pending(block)
                if pending:
                    sink.write(pipeline(chosen[pending]), pending)
                bar.update(block.stop - block.start)
        return sink.finish(len(chosen))


def concatenate(parts: Sequence[Signatures]) -> Signatures:
    """One `Signatures` from blocks of the same pipeline."""

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(p, name) for p in parts])

    first = parts[0]
    terms = None
    if first.layer_terms is not None:
        terms = []
        for i, term in enumerate(first.layer_terms):
            columns = zip(*((p.layer_terms or [])[i].topk for p in parts), strict=True)
            energy = torch.cat([(p.layer_terms or [])[i].energy for p in parts])
            terms.append(LayerTerm(term.layer, TopK(*(torch.cat(c) for c in columns)), energy))
    return Signatures(
        first.pipeline,
        cat("features"),
        cat("top_scores"),
        cat("top_ids"),
        cat("bottom_scores"),
        cat("bottom_ids"),
        stats={name: torch.cat([p.stats[name] for p in parts]) for name in first.stats},
        choices=None if first.choices is None else [c for p in parts for c in p.choices or []],
        layer_terms=terms,
        vectors=None if first.vectors is None else cat("vectors"),
    )


def scores_at(dictionary: Any, model: Any, features: Any, token_ids: Tensor | Sequence[int], **options: Any) -> Tensor:
    """Scores of given tokens for given features, [n, m], beside the top-k that `signatures` gives.

    Args:
        dictionary: As in `signatures`.
        model: As in `signatures`.
        features: As in `signatures`.
        token_ids: [m], or [n, m] for other tokens for each feature.
        **options: preset, transport, tokens, tuned_lens, … as in `signatures`.
    """
    dictionary = load_dictionary(dictionary)
    chosen = dictionary.select(features)
    return plan(dictionary, model, n_features=len(chosen), **options).scores_at(chosen, token_ids)
