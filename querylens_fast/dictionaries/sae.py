"""Coders: what a sparse dictionary does to an activation.

Only the ablations (token_change, zero_out) and the evaluation need a dictionary to run; signatures read its vectors.
The rules are those of sae-lens, architecture by architecture, so a file it wrote runs here without it installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (
    "standard",
    "jumprelu",
    "topk",
    "gated",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
LAYER_NORM_EPS = 1e-5


@dataclass
class Coder:
    """Encoder and decoder of one dictionary; ``weights`` are sae-lens's tensors, W_enc [D, n] and W_dec [n, D]."""

    architecture: str
    weights: dict[str, Tensor]
    k: int | None = None
    normalisation: str = "none"
    apply_b_dec_to_input: bool = False
    rescale_by_decoder_norm: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> Coder:
        """A copy on device, in dtype."""
        moved = {name: w.to(device=device, dtype=dtype) for name, w in self.weights.items()}
        return Coder(
            self.architecture,
            moved,
            self.k,
            self.normalisation,
            self.apply_b_dec_to_input,
            self.rescale_by_decoder_norm,
        )

    @property
    def is_transcoder(self) -> bool:
        return "transcoder" in self.architecture

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., n] of inputs x [..., D]."""
        w = self.weights
        x, _, _ = self._normalise(x)
        if self.apply_b_dec_to_input:
            x = x - w["b_dec"]
        if self.architecture == "gated":
            return self._encode_gated(x)
        pre = x @ w["W_enc"] + w["b_enc"]
        if self.rescale_by_decoder_norm:
            pre = pre * w["W_dec"].norm(dim=-1)
        if self.architecture == "topk":
            kept = pre.topk(self.k or 0, dim=-1)
            return torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu())
        if "jumprelu" in self.architecture:
            return pre.relu() * (pre > w["threshold"])
        return pre.relu()

    def decoder_rows(self, features: Tensor) -> Tensor:
        """What one unit of each feature's activation writes, before output rescaling, [n, D]."""
        rows = self.weights["W_dec"][features]
        return rows / rows.norm(dim=-1, keepdim=True) if self.rescale_by_decoder_norm else rows

    def decode(self, acts: Tensor, x: Tensor, skip: bool = True) -> Tensor:
        """The output [..., D] for activations [..., n]; x is the coder's input, for rescaling and (``skip``) W_skip."""
        w = self.weights
        if self.rescale_by_decoder_norm:
            acts = acts / w["W_dec"].norm(dim=-1)
        scale, shift = self.output_scale(x)
        y = (acts @ w["W_dec"] + w["b_dec"]) * scale + shift
        return y + x @ w["W_skip"].mT if skip and "W_skip" in w else y

    def output_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift) [..., 1] that the decoder applies to its output at inputs x [..., D]."""
        if self.is_transcoder:
            return x.new_ones(1), x.new_zeros(1)
        _, scale, shift = self._normalise(x)
        return scale, shift

    def _encode_gated(self, x: Tensor) -> Tensor:
        w = self.weights
        projected = x @ w["W_enc"]
        magnitude = projected * w["r_mag"].exp() + w["b_mag"]
        return magnitude.relu() * (projected + w["b_gate"] > 0)

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normalised x, scale and shift that undo it)."""
        if self.normalisation == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            std = (x - shift).std(-1, keepdim=True)
            return (x - shift) / (std + LAYER_NORM_EPS), std, shift
        if self.normalisation == "constant_norm_rescale":
            factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * factor, 1 / factor, x.new_zeros(1)
        return x, x.new_ones(1), x.new_zeros(1)


def coder_from(cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Coder:
    """The coder of a sae-lens config and its tensors.

    Raises:
        ValueError: An architecture or activation normalisation that is not supported, by name.
    """
    architecture = str(cfg.get("architecture", "standard"))
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"dictionary architecture {architecture!r} cannot be run here (its vectors can still be read); "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    normalisation = str(cfg.get("normalize_activations") or "none")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalize_activations={normalisation!r} is not supported; fold it into the weights first")
    needed = {"W_enc", "W_dec", "b_dec", *(("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",))}
    needed |= {"threshold"} if "jumprelu" in architecture else set()
    missing = needed - weights.keys()
    if missing:
        raise ValueError(f"dictionary of architecture {architecture!r} lacks the tensors {sorted(missing)}")
    return Coder(
        architecture=architecture,
        weights=dict(weights),
        k=int(cfg["k"]) if architecture == "topk" else None,
        normalisation=normalisation,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", False)),
        rescale_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
    )
