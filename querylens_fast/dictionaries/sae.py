"""Coders: what a sparse dictionary does to an activation.

Only the ablations (token_change, zero_out) and the evaluation run a dictionary; signatures read its vectors. Each
architecture follows the library that trains it (sae-lens, sparsify, dictionary_learning), so that its files run here
without the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.pursuit import matching_pursuit
from querylens_fast.dictionaries.temporal import predicted_codes

ACTIVATIONS = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "abstopk": "abstopk",
    "groupmax": "groupmax",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "matching_pursuit": "pursuit",
    "temporal": "temporal",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "topk_transcoder": "topk",
    "groupmax_transcoder": "groupmax",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""The activation function of each architecture. Checkpoints of batch-top-k training run with their learned threshold,
as sae-lens saves them for inference."""
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale", "constant_scalar_rescale", "expected_average_only_in")
LAYER_NORM_EPS = 1e-5


@dataclass(eq=False)
class Coder:
    """Encoder and decoder of one dictionary.

    Attributes:
        architecture: A key of `ACTIVATIONS`.
        weights: Under sae-lens's names: W_enc [D, n], W_dec [n, D], b_enc [n], b_dec [D], ….
        k: Active features for each position, of topk, abstopk and groupmax.
        normalisation: One of `NORMALISATIONS`, applied to inputs and undone on outputs.
        apply_b_dec_to_input: Subtract b_dec before encoding.
        rescale_by_decoder_norm: Compare activations in units of their decoder row's length.
        options: Settings of matching pursuit and temporal dictionaries.
    """

    architecture: str
    weights: dict[str, Tensor]
    k: int | None = None
    normalisation: str = "none"
    apply_b_dec_to_input: bool = False
    rescale_by_decoder_norm: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> Coder:
        """A copy on device, in dtype."""
        return replace(self, weights={name: w.to(device=device, dtype=dtype) for name, w in self.weights.items()})

    @property
    def is_transcoder(self) -> bool:
        return "transcoder" in self.architecture

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., n] of inputs x [..., D]; a temporal dictionary takes [B, S, D]."""
        w, activation = self.weights, ACTIVATIONS[self.architecture]
        x = self._centered(x)
        if activation == "gated":
            projected = x @ w["W_enc"]
            magnitude = projected * w["r_mag"].exp() + w["b_mag"]
            return magnitude.relu() * (projected + w["b_gate"] > 0)
        if activation == "pursuit":
            return matching_pursuit(x, w["W_dec"], **self.options)
        if activation == "temporal":
            x, _ = predicted_codes(x, w, **self._prediction)
            pre = (x / (4 * x.shape[-1])) @ w["W_enc"]
            return pre.relu() if self.k is None else _largest(pre.relu(), self.k)
        pre = x @ w["W_enc"] + w["b_enc"]
        if self.rescale_by_decoder_norm:
            pre = pre * w["W_dec"].norm(dim=-1)
        if activation == "topk":
            return _largest(pre, self.k or 0).relu()
        if activation == "abstopk":
            return torch.zeros_like(pre).scatter(-1, *_chosen(pre, pre.abs().topk(self.k or 0, dim=-1).indices))
        if activation == "groupmax":
            groups = pre.relu().unflatten(-1, (self.k or 1, -1))
            return torch.zeros_like(groups).scatter(-1, *_chosen(groups, groups.argmax(-1, keepdim=True))).flatten(-2)
        if activation == "jumprelu":
            return pre.relu() * (pre > w["threshold"])
        return pre.relu()

    def decoder_rows(self, features: Tensor) -> Tensor:
        """What one unit of each feature's activation writes, before output rescaling, [n, D]."""
        rows = self.weights["W_dec"][features]
        return rows / rows.norm(dim=-1, keepdim=True) if self.rescale_by_decoder_norm else rows

    def decode(self, acts: Tensor, x: Tensor, skip: bool = True) -> Tensor:
        """The output [..., D] for activations [..., n] of the input x.

        x gives the output's scale, the skip path W_skip (``skip``), and what a temporal dictionary predicts.
        """
        w = self.weights
        if self.rescale_by_decoder_norm:
            acts = acts / w["W_dec"].norm(dim=-1)
        if self.architecture == "temporal":
            acts = acts + predicted_codes(self._centered(x), w, **self._prediction)[1]
        scale, shift = self.output_scale(x)
        y = acts @ w["W_dec"]
        # Tied dictionaries add b_dec only where they subtract it.
        tied = self.architecture == "matching_pursuit" or self.options.get("tied_weights", False)
        y = (y if tied and not self.apply_b_dec_to_input else y + w["b_dec"]) * scale + shift
        return y + x @ w["W_skip"].mT if skip and "W_skip" in w else y

    def output_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift) [..., 1] that the decoder applies to its output at inputs x [..., D]."""
        if self.is_transcoder:
            return x.new_ones(1), x.new_zeros(1)
        _, scale, shift = self._normalise(x)
        return scale, shift

    @property
    def _prediction(self) -> dict[str, int]:
        return {name: self.options[name] for name in ("n_heads", "n_attn_layers")}

    def _centered(self, x: Tensor) -> Tensor:
        """The input as the encoder's weights see it: normalised, b_dec subtracted where it is."""
        x, _, _ = self._normalise(x)
        return x - self.weights["b_dec"] if self.apply_b_dec_to_input else x

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normalised x, scale and shift that undo it)."""
        if self.normalisation == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            std = (x - shift).std(-1, keepdim=True)
            return (x - shift) / (std + LAYER_NORM_EPS), std, shift
        if self.normalisation == "constant_norm_rescale":
            factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * factor, 1 / factor, x.new_zeros(1)
        if self.normalisation == "constant_scalar_rescale":
            factor = x.new_tensor([self.options["activation_normalization_factor"]])
            return x * factor, 1 / factor, x.new_zeros(1)
        return x, x.new_ones(1), x.new_zeros(1)


def _chosen(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return indices, x.gather(-1, indices)


def _largest(x: Tensor, k: int) -> Tensor:
    """x with all but the k largest of its last axis set to zero."""
    return torch.zeros_like(x).scatter(-1, *_chosen(x, x.topk(k, dim=-1).indices))


_OPTIONS: dict[str, dict[str, Any]] = {
    "matching_pursuit": {"residual_threshold": 1e-2, "max_iterations": None, "stop_on_duplicate_support": True},
    "temporal": {
        "n_heads": 8,
        "n_attn_layers": 1,
        "tied_weights": True,
        "activation_normalization_factor": 1.0,
    },
}
"""Further settings of architectures and their defaults, by sae-lens's names."""


def coder_from(cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Coder:
    """The coder of a sae-lens config and its tensors.

    Raises:
        ValueError: An architecture or activation normalisation that is not supported, by name; missing tensors or
            tensors of the wrong shape; a k that no top-k can have.
    """
    architecture = str(cfg.get("architecture", "standard"))
    if architecture not in ACTIVATIONS:
        raise ValueError(
            f"dictionary architecture {architecture!r} cannot be run here (its vectors can still be read); "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    normalisation = str(cfg.get("normalize_activations") or "none")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalize_activations={normalisation!r} is not supported; fold it into the weights first")
    options = {name: cfg.get(name, default) for name, default in _OPTIONS.get(architecture, {}).items()}
    weights = _complete(architecture, weights, tied=options.get("tied_weights", architecture == "matching_pursuit"))
    k = cfg.get("kval_topk") if architecture == "temporal" and cfg.get("sae_diff_type", "topk") == "topk" else None
    if ACTIVATIONS[architecture] in ("topk", "abstopk", "groupmax"):
        k, n = cfg.get("k"), len(weights["W_dec"])
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not 1 <= k <= n or k != int(k):
            raise ValueError(f"dictionary of architecture {architecture!r} has k={k!r}; expected 1 to its {n} features")
    return Coder(
        architecture=architecture,
        weights=weights,
        k=None if k is None else int(k),
        normalisation=normalisation,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", False)),
        rescale_by_decoder_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
        options=options,
    )


def _complete(architecture: str, given: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The tensors under the names the coder uses; ValueError for those that are missing or of another shape."""
    weights = dict(given)
    if tied and "W_dec" in weights:
        weights["W_enc"] = weights["W_dec"].mT
    for name in ("log_threshold", "log_jumprelu_threshold"):
        if name in weights:
            weights["threshold"] = weights[name].exp()
    if "topk_threshold" in weights:
        weights["threshold"] = weights["topk_threshold"]
    biases = {"gated": ("b_gate", "b_mag", "r_mag"), "matching_pursuit": (), "temporal": ()}.get(
        architecture, ("b_enc",)
    )
    thresholds = ("threshold",) if ACTIVATIONS[architecture] == "jumprelu" else ()
    missing = {"W_enc", "W_dec", "b_dec", *biases, *thresholds} - weights.keys()
    if missing:
        raise ValueError(f"dictionary of architecture {architecture!r} lacks the tensors {sorted(missing)}")
    n, d = weights["W_dec"].shape
    expected = dict.fromkeys(biases, [[n]]) | dict.fromkeys(thresholds, [[n], [1], []]) | {"b_dec": [[d]]}
    for name, shapes in expected.items():
        if list(weights[name].shape) not in shapes:
            raise ValueError(
                f"dictionary of architecture {architecture!r} with W_dec [{n}, {d}] has {name} "
                f"{list(weights[name].shape)}; expected {shapes[0]}"
            )
    return weights
