"""One feature at a time: a call of the reference becomes a pipeline of `lens`, and its result the reference's keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from querylens_fast.analysis.processes import local_tokens, total
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.dictionaries.matrices import neuron_dictionary
from querylens_fast.lens.planning import plan
from querylens_fast.lens.presets import Preset, find_preset
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens
from querylens_fast.transport.per_feature import alone
from querylens_fast.transport.transport import Transport

RESULT_KEYS = (
    "layer",
    "top_tokens",
    "bottom_tokens",
    "top_ids",
    "bottom_ids",
    "stats",
    "layer_indices",
    "layer_top_tokens",
    "layer_bottom_tokens",
    "layer_top_ids",
    "layer_bottom_ids",
    "layer_energy_scores",
)


def dictionary_of(model: Model, f: Any, sae: Any = None) -> Dictionary:
    """The dictionary a feature belongs to: the SAE's, or the MLP neurons of its layer where there is none.

    Raises:
        ValueError: The SAE's hook is of another layer than the feature says.
    """
    layer = int(f.layer)
    if sae is None:
        return neuron_dictionary(model, layer)
    dictionary = sae if isinstance(sae, Dictionary) else load_dictionary(sae, layer=layer)
    if dictionary.layer != layer:
        raise ValueError(f"{f} is of layer {layer}, but its dictionary {dictionary.name!r} of layer {dictionary.layer}")
    return dictionary


def preset_of(feature_vector: str, stream_transition: str, readout: str | None, name: str | None = None) -> Preset:
    """The preset of three components, named as the reference's results name it."""
    preset = find_preset((feature_vector, stream_transition, readout))
    return preset if name is None else dataclasses.replace(preset, name=name)


def check_sample(transport: Transport, tokens: Tokens) -> None:
    """Raise ValueError where a transport was fitted over another sample than this.

    A Jacobian lens, which says how it averaged, has a sample of its own.
    """
    fitted = transport.metadata.get("tokens_digest")
    if "averaging" not in transport.metadata and fitted != tokens.digest:
        raise ValueError(
            f"transport was fitted with tokens_digest={fitted}, but this call has tokens_digest={tokens.digest}; fit "
            "it again, or give the call the sample that it was fitted on"
        )


def analyze(
    model: Any,
    f: Any,
    sae: Any,
    preset: Preset,
    sample: Any = None,
    rank: int = 0,
    world_size: int = 1,
    *,
    resid_cache: Any = None,
    transport: Transport | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The reference's result for one feature.

    Args:
        model: What `as_model` takes.
        f: The feature: its layer and index are read.
        sae: Its dictionary, or None for an MLP neuron.
        preset: The lens.
        sample: Token ids [B, S] of the whole sample, where the preset needs one.
        rank: Of this process.
        world_size: Number of processes; each carries the feature through its share of the sample.
        resid_cache: Says what is padding, and may hold a transport.
        transport: A transport over the same sample; by default the cache's.
        **options: As in `signatures`.

    Returns:
        The row's values under `RESULT_KEYS`.
    """
    engine = as_model(model)
    dictionary = dictionary_of(engine, f, sae)
    tokens = None if sample is None else local_tokens(engine, sample, rank, world_size, resid_cache)
    if preset.needs_transport:
        transport = getattr(resid_cache, "transport", None) if transport is None else transport
        options |= {"transport": transport, "stats": "exact", "layers": preset.stream_transition == "first_order"}
        options["submodule"] = options["submodule"].lower()
        if transport is not None and tokens is not None and world_size == 1:
            check_sample(transport, tokens)
    summed = alone if world_size == 1 else total
    lens = plan(dictionary, engine, preset=preset, tokens=tokens, n_features=0, total=summed, **options)
    (row,) = lens(*lens.read([int(f.feature)])).rows()
    return {key: row[key] for key in RESULT_KEYS if key in row}
