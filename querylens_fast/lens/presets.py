"""Presets: the three components of a lens, by the reference's names.

feature vector (value | key) → stream transition → readout, then the top and bottom tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from querylens_fast.transport.jacobians import Side

FEATURE_VECTORS = ("value", "key")
STREAM_TRANSITIONS = ("identity", "first_order", "full", "adaptive", "token_change", "zero_out", "tuned_lens")
READOUTS = ("unembed", "embed", "embed_cosine_centered")
ABLATIONS = ("token_change", "zero_out")
TRANSPORTED = ("first_order", "full", "adaptive")


@dataclass(frozen=True)
class Preset:
    """One lens. ``readout`` is None for the ablations, which end in logits by themselves."""

    name: str
    feature_vector: Side
    stream_transition: str
    readout: str | None

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("feature_vector", self.feature_vector, FEATURE_VECTORS),
            ("stream_transition", self.stream_transition, STREAM_TRANSITIONS),
            ("readout", self.readout, (*READOUTS, None)),
        ):
            if value not in allowed:
                raise ValueError(f"{field} is {value!r}; expected one of {', '.join(str(a) for a in allowed)}")
        needs_value = (*ABLATIONS, "tuned_lens", "adaptive")
        if self.stream_transition in needs_value and self.feature_vector != "value":
            raise ValueError(f"stream_transition={self.stream_transition!r} is for feature_vector='value' only")
        if self.readout is not None and self.stream_transition in ABLATIONS:
            raise ValueError(f"stream_transition={self.stream_transition!r} ends in logits: its readout must be None")
        if self.readout is None and self.stream_transition not in ABLATIONS:
            raise ValueError(f"stream_transition={self.stream_transition!r} needs a readout: {', '.join(READOUTS)}")

    @property
    def needs_transport(self) -> bool:
        return self.stream_transition in TRANSPORTED

    @property
    def is_ablation(self) -> bool:
        return self.stream_transition in ABLATIONS

    @property
    def is_dashboard(self) -> bool:
        """Decoder rows at unit length times W_U alone, without final norm and b_U, as dashboards show them."""
        return self.name == "dashboard"

    def as_dict(self) -> dict[str, str | None]:
        """The keys the reference writes in every row."""
        return {
            "feature_vector": self.feature_vector,
            "stream_transition": self.stream_transition,
            "readout": self.readout,
            "baseline": self.name,
        }


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("logit_lens_value", "value", "identity", "unembed"),
        Preset("logit_lens_key", "key", "identity", "embed"),
        Preset("query_lens_value_approx", "value", "first_order", "unembed"),
        Preset("query_lens_key_approx", "key", "first_order", "embed_cosine_centered"),
        Preset("query_lens_value", "value", "full", "unembed"),
        Preset("query_lens_key", "key", "full", "embed_cosine_centered"),
        Preset("token_change", "value", "token_change", None),
        Preset("zero_out", "value", "zero_out", None),
        Preset("tuned_lens", "value", "tuned_lens", "unembed"),
        Preset("query_lens_value_adaptive", "value", "adaptive", "unembed"),
        Preset("dashboard", "value", "identity", "unembed"),
    )
}


_COMPOSED = re.compile(f"^({'|'.join(FEATURE_VECTORS)})_({'|'.join(STREAM_TRANSITIONS)})_({'|'.join(READOUTS)})$")


def find_preset(preset: str | Preset | Sequence[str | None]) -> Preset:
    """A preset by name, or from its three components: (feature_vector, stream_transition, readout), or joined by "_".

    Raises:
        ValueError: An unknown name or component (the message lists those known).
    """
    if isinstance(preset, Preset):
        return preset
    if isinstance(preset, str):
        if preset in PRESETS:
            return PRESETS[preset]
        parts = _COMPOSED.match(preset)
        if parts is None:
            raise ValueError(
                f"unknown preset {preset!r}; known are {', '.join(PRESETS)}, and components joined like "
                "'key_identity_embed_cosine_centered'"
            )
        preset = parts.groups()
    if len(preset) != 3:
        raise ValueError(f"preset is {preset!r}; expected a name or (feature_vector, stream_transition, readout)")
    vector, transition, readout = preset
    name = f"{vector}_{transition}_{readout}"
    # The ablations end in logits by themselves; as in the reference, a readout given with them does nothing.
    return Preset(name, vector, str(transition), None if transition in ABLATIONS else readout)  # type: ignore[arg-type]
