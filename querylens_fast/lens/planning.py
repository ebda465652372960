"""From options to a lens: check that model, dictionary, transport and sample belong together, and choose its parts.

What is decided here (which transition, whether a transport is fitted, which centering vector) is not decided again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dashboard_values import as_dashboards
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.options import LensOptions
from querylens_fast.lens.pipeline import Pipeline
from querylens_fast.lens.presets import Preset
from querylens_fast.lens.readouts import Scorer, find_readout
from querylens_fast.lens.transitions import (
    Ablated,
    Adaptive,
    ExactStatistics,
    Identity,
    Transition,
    Transported,
    Tuned,
    Walked,
)
from querylens_fast.lens.tuned_lens import TunedLens, load_tuned_lens
from querylens_fast.models.inside import output_weight
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.transport.fit import fit_transport, mean_embedding
from querylens_fast.transport.jacobians import Order
from querylens_fast.transport.per_feature import Total, alone
from querylens_fast.transport.published import find_transport
from querylens_fast.transport.transport import Transport


def plan(
    dictionary: Any,
    model: Any,
    options: LensOptions | None = None,
    *,
    n_features: int | None = None,
    total: Total = alone,
    **keywords: Any,
) -> Pipeline:
    """Check everything a run needs and put it together.

    Args:
        dictionary: As in `signatures`.
        model: As in `signatures`.
        options: The lens.
        n_features: How many features will be asked for, which decides whether a transport is fitted; None: all.
        total: Sums a tensor over the processes that hold the other parts of the tokens.
        **keywords: The fields of `LensOptions`, instead of ``options``.

    Raises:
        ValueError: As `signatures`.
        FileNotFoundError: As `signatures`.
    """
    given = LensOptions.of(keywords) if options is None else options
    preset, model = given.lens, as_model(model)
    dictionary = load_dictionary(dictionary)
    if preset.is_dashboard:
        dictionary = as_dashboards(dictionary, model, given.at_unit_length)
    else:
        dictionary = dictionary.on(model)
    if not preset.is_ablation and not inside_names([dictionary], preset):
        dictionary.check_direction(preset.feature_vector)
    if given.k > model.vocab_size:
        raise ValueError(f"k is {given.k}; expected 1 to the vocabulary's {model.vocab_size}")
    module = dictionary.key_module if preset.feature_vector == "key" and preset.needs_transport else None
    if module is not None:
        dictionary = _reading_module(dictionary, module, model, given)
    if preset.needs_transport or preset.stream_transition == "tuned_lens":
        dictionary.point(preset.feature_vector)
    if preset.is_ablation and dictionary.kind != "neurons":
        _ = dictionary.coder
    tokens = None if given.tokens is None else as_tokens(given.tokens, model)
    transport, tuned_lens = None, given.tuned_lens
    if preset.needs_transport:
        n = dictionary.n_features if n_features is None else n_features
        inside = inside_names([dictionary], preset)
        transport = open_transport(model, given) or fit_if_cheaper(model, given, tokens, n, module is not None, inside)
        if module is not None and transport is not None:
            transport = transport.reading(module, bool(inside))
    if tuned_lens is not None and not isinstance(tuned_lens, TunedLens):
        tuned_lens = load_tuned_lens(tuned_lens)
    planned = _Plan(model, dictionary, preset, given, transport, tokens, tuned_lens, total)
    readout = find_readout(model, preset, planned.centre(), given.final_norm, given.unembedding)
    if given.histogram and not isinstance(readout, Scorer):
        raise ValueError(f"histogram={given.histogram}: preset {preset.name!r} of this model has none; leave it out")
    return Pipeline(model, dictionary, preset, given, planned.transition(), readout, transport, tokens, tuned_lens)


def inside_names(dictionaries: Sequence[Dictionary], preset: Preset) -> list[str]:
    """The hook names of keys that a transported preset reads inside modules, for `fit_transport`."""
    if preset.feature_vector != "key" or not preset.needs_transport:
        return []
    return [d.hook_name for d in dictionaries if d.key_module is not None and d.reads.site.reads_inside]


def _reading_module(dictionary: Dictionary, module: int, model: Model, options: LensOptions) -> Dictionary:
    """The dictionary with its keys at the point after the module that they read, for `Transport.reading`.

    Raises:
        ValueError: Statistics were asked for that need each key's own walk, keys read the output of a module of a model
            whose layers are linearised whole, or they have another width than what they read.
    """
    inside = dictionary.reads.site.reads_inside
    where = f"dictionary {dictionary.name!r}: its keys read {dictionary.hook_name!r}, "
    if options.stats in ("exact", "rel_var"):
        raise ValueError(
            f"{where}a module's inside or output, and are carried through that module without relative variances; "
            f"stats={options.stats!r} is not supported"
        )
    if not inside and not model.has_submodules:
        raise ValueError(
            f"{where}the output of a module, but the layers of model {model.name!r} are linearised whole: not supported"
        )
    assert dictionary.key_rows is not None
    width = output_weight(model, module).shape[1] if inside else model.d_model
    if dictionary.key_rows.shape[1] != width:
        raise ValueError(
            f"{where}{dictionary.key_rows.shape[1]} numbers wide, but {model.name!r} has {width} there: is this "
            "dictionary from another model?"
        )
    return replace(dictionary, key_point=module + 1)


def open_transport(model: Model, options: LensOptions) -> Transport | None:
    """The transport that was given, on the model's device, or None.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is of another model, or was fitted with another submodule or through_norms than the options say.
    """
    transport = options.transport
    if transport is None:
        return None
    if isinstance(transport, (str, Path)):
        transport = find_transport(transport, model)
    transport.check_model(model)
    for name in ("submodule", "through_norms"):
        wanted, fitted = getattr(options, name), transport.metadata.get(name)
        if wanted is not None and fitted != str(wanted):
            raise ValueError(
                f"transport was fitted with {name}={fitted}, but this call has {name}={wanted}; fit it again, or give "
                "the call what the transport was fitted with"
            )
    return transport.to(model.device)


def fit_if_cheaper(
    model: Model,
    options: LensOptions,
    tokens: Tokens | None,
    n_features: int,
    always: bool = False,
    inside: Sequence[str] = (),
    seed: int = 0,
) -> Transport | None:
    """A transport for n_features features where that costs fewer passes than carrying each feature, or is needed.

    The adaptive preset and stats="rel_var" need one, as do others that say ``always``; stats="exact" carries each
    feature anyway. ``inside`` names where keys are read inside modules (`inside_names`).
    """
    preset = options.lens
    adaptive = preset.stream_transition == "adaptive"
    needed = adaptive or options.stats == "rel_var"
    if tokens is None or not (needed or always or (options.stats != "exact" and n_features >= model.d_model)):
        return None
    return fit_transport(
        model,
        tokens,
        sides=(preset.feature_vector,),
        orders=_orders(preset, options.adaptive_threshold),
        energy="probes" if needed else "none",
        seed=seed,
        submodule=options.submodule or "both",
        through_norms=options.through_norms is not False,
        max_memory_gib=options.max_memory_gib,
        inside=inside,
        progress=bool(options.out if options.progress is None else options.progress),
    )


def _orders(preset: Preset, threshold: float | None) -> tuple[Order, ...]:
    """The orders a preset's transport has to hold."""
    if preset.stream_transition == "adaptive" and threshold is not None:
        return ("first_order", "full")
    return ("first_order",) if preset.stream_transition == "first_order" else ("full",)


@dataclass(frozen=True)
class _Plan:
    """What `plan` has checked, and how it becomes a transition and a centering vector."""

    model: Model
    dictionary: Dictionary
    preset: Preset
    options: LensOptions
    transport: Transport | None
    tokens: Tokens | None
    tuned_lens: TunedLens | None
    total: Total

    def transition(self) -> Transition:
        kind, options = self.preset.stream_transition, self.options
        if kind == "tuned_lens" and self.tuned_lens is not None:
            return Tuned.of(self.tuned_lens, self.dictionary, self.model.n_layers)
        if self.preset.is_ablation and self.tokens is not None:
            value = options.token_change_value if kind == "token_change" else None
            sample = self.tokens, self.dictionary, value, options.max_memory_gib, self.total
            return Ablated(self.model, *sample)
        if not self.preset.needs_transport:
            return Identity()
        if self.transport is None:
            return self._walk()
        self._check_transport(self.transport)
        if options.stats == "exact":
            return ExactStatistics(self._transported(self.transport), self._walk())
        return self._transported(self.transport)

    def centre(self) -> Tensor | None:
        """The sample's mean embedding, for a transported key's cosine; None: the vocabulary's."""
        if not self.preset.needs_transport or self.preset.readout != "embed_cosine_centered":
            return None
        if self.transport is not None:
            if self.transport.centre is None:
                raise ValueError(
                    f"preset {self.preset.name!r} centers on the sample's mean embedding, which the transport of "
                    f"{self.transport.metadata['tokens']} does not know; fit one with fit_transport"
                )
            return self.transport.centre
        assert self.tokens is not None  # LensOptions requires a transport or tokens
        mean = mean_embedding(self.model, self.tokens)
        n = torch.tensor(float(self.tokens.n_valid), dtype=mean.dtype, device=mean.device)
        return self.total(mean * (n / self.total(n)))

    def _transported(self, transport: Transport) -> Transition:
        side, point = self.preset.feature_vector, self.dictionary.point(self.preset.feature_vector)
        order = _orders(self.preset, self.options.adaptive_threshold)[-1]
        rel_var = self.options.stats in ("auto", "rel_var") and (side, order) in transport.energies
        if self.preset.stream_transition == "adaptive":
            return Adaptive(transport, point, self.options.adaptive_threshold, rel_var)
        layer = self.dictionary.layer if self.options.layers else None
        return Transported(transport, side, order, point, rel_var, layer)

    def _walk(self) -> Walked:
        assert self.tokens is not None  # LensOptions requires a transport or tokens
        options, fitted = self.options, {} if self.transport is None else self.transport.metadata
        through_norms = options.through_norms
        if through_norms is None:
            through_norms = fitted.get("through_norms", "True") == "True"
        return Walked(
            self.model,
            self.tokens,
            self.preset.feature_vector,
            _orders(self.preset, self.options.adaptive_threshold)[-1],
            self.dictionary.point(self.preset.feature_vector),
            layer=self.dictionary.layer if options.layers and self.transport is None else None,
            submodule=options.submodule or fitted.get("submodule", "both"),  # type: ignore[arg-type]
            through_norms=through_norms,
            max_memory_gib=options.max_memory_gib,
            total=self.total,
        )

    def _check_transport(self, transport: Transport) -> None:
        side = self.preset.feature_vector
        needed = _orders(self.preset, self.options.adaptive_threshold)
        for order in needed:
            transport.matrix(side, order, self.dictionary.point(side))
            wants_energy = self.options.stats == "rel_var" or self.preset.stream_transition == "adaptive"
            if wants_energy and (side, order) not in transport.energies:
                raise ValueError(
                    f"preset {self.preset.name!r} with stats={self.options.stats!r} needs energies for {side}/{order}: "
                    "fit the transport with energy='probes' or energy='exact'"
                )
