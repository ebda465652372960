"""The golden cases: tiny models with the reference's own answers, and the rule by which two answers agree.

Each folder of ``tests/goldens`` holds a model, a dictionary for some layers, a token sample, tuned-lens parameters and
what the reference computed for them in float64 from float32 weights: ``expected.jsonl`` has its rows,
``expected.safetensors`` its vectors [n, D] and scores [n, k] as ``{baseline}.layer{l}.vector | top_scores |
bottom_scores``, and ``mean_embed``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
RTOL = 1e-5
RATIOS = ("EV_mu", "perp_EV", "rel_var")
LISTS = (("top_ids", "top_scores"), ("bottom_ids", "bottom_scores"))


@dataclass(frozen=True)
class GoldenCase:
    """One folder of goldens."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """case.json: layers, features, baselines, k, shapes."""
        return json.loads((self.folder / "case.json").read_text(encoding="utf-8"))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The reference's rows, each with baseline, layer and feature."""
        text = (self.folder / "expected.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(str(self.folder / "expected.safetensors"))

    @property
    def model_path(self) -> Path:
        return self.folder / "model"

    @property
    def tokens_path(self) -> Path:
        return self.folder / "tokens.safetensors"

    @property
    def tuned_lens_path(self) -> Path:
        return self.folder / "tuned_lens_params.pt"

    @property
    def layers(self) -> list[int]:
        return self.config["layers"]

    @property
    def features(self) -> list[int]:
        return self.config["features"]

    @property
    def baselines(self) -> list[str]:
        return self.config["baselines"]

    @property
    def k(self) -> int:
        return self.config["k"]

    def sae_path(self, layer: int) -> Path:
        return self.folder / f"sae_layer{layer}"

    def row(self, baseline: str, layer: int, feature: int) -> dict[str, Any]:
        """The reference's row for one feature."""
        wanted = (baseline, layer, feature)
        return next(r for r in self.rows if (r["baseline"], r["layer"], r["feature"]) == wanted)

    def expected(self, baseline: str, layer: int, what: str) -> Tensor:
        """``vector``, ``top_scores`` or ``bottom_scores`` of all features of a layer, in the order of `features`.

        The ablations (token_change, zero_out) have rows but none of these.
        """
        return self.tensors[f"{baseline}.layer{layer}.{what}"]


@cache
def golden(name: str) -> GoldenCase:
    """A case by its folder's name."""
    return GoldenCase(GOLDENS / name)


CASES = sorted(path.parent.name for path in GOLDENS.glob("*/case.json"))


def assert_close(found: Any, expected: Any, what: str = "value", rtol: float = RTOL) -> None:
    """Raise AssertionError unless the two agree within rtol of the largest expected magnitude."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (found, expected))
    assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    if expected.numel():
        error = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
        assert error <= rtol, f"{what}: relative error {error:.2e} exceeds {rtol:.0e}"


def assert_same_tokens(
    ids: Sequence[int],
    expected_ids: Sequence[int],
    expected_scores: Sequence[float] | Tensor,
    scores: Sequence[float] | Tensor | None = None,
    what: str = "tokens",
    rtol: float = RTOL,
) -> None:
    """Two token lists agree: scores first, then the ids up to ties.

    Scores (where given) agree within rtol of the largest. The sets of ids agree except for tokens whose score ties
    with the k-th within the tolerance, and an id may sit at another rank only among equal scores.
    """
    ids, expected_ids = [int(i) for i in ids], [int(i) for i in expected_ids]
    reference = torch.as_tensor(expected_scores, dtype=torch.float64).cpu()
    assert len(ids) == len(expected_ids) == len(reference), f"{what}: {len(ids)} ids, expected {len(expected_ids)}"
    assert len(set(ids)) == len(ids), f"{what}: an id is listed twice: {ids}"
    if scores is not None:
        assert_close(scores, reference, f"{what}: scores", rtol)
    slack = 2 * rtol * max(float(reference.abs().max()), 1e-30)
    by_id = {i: float(s) for i, s in zip(expected_ids, reference, strict=True)}
    last = float(reference[-1])
    for rank, i in enumerate(ids):
        score = by_id.get(i, last)
        there = float(reference[rank])
        assert abs(score - there) <= slack, f"{what}: id {i} at rank {rank} scores {score}, the reference has {there}"
    for i in set(expected_ids) - set(ids):
        assert abs(by_id[i] - last) <= slack, f"{what}: id {i} is missing and does not tie with the last"


def assert_same_row(
    found: dict[str, Any], case: GoldenCase, baseline: str, layer: int, feature: int, rtol: float = RTOL
) -> None:
    """A result row agrees with the reference's: tokens up to ties, statistics and layer energies within rtol."""
    expected, at = case.row(baseline, layer, feature), case.features.index(feature)
    what = f"{case.name} {baseline} layer {layer} feature {feature}"
    assert found["layer"] == layer, f"{what}: layer {found['layer']}"
    for ids, scores in LISTS:
        if f"{baseline}.layer{layer}.{scores}" in case.tensors:
            wanted = case.expected(baseline, layer, scores)[at]
            assert_same_tokens(found[ids], expected[ids], wanted, found.get(scores), f"{what} {ids}", rtol)
        elif expected["top_ids"] == expected["bottom_ids"]:  # a feature that changes nothing: every token ties
            assert found["top_ids"] == found["bottom_ids"], f"{what}: {found[ids]}, expected no change"
        else:
            assert found[ids] == expected[ids], f"{what}: {ids} {found[ids]}, expected {expected[ids]}"
        strings = ids.replace("ids", "tokens")
        assert_strings_follow_ids(found[ids], found[strings], expected[ids], expected[strings], f"{what} {strings}")
    assert ("stats" in expected) == (found.get("stats") is not None), f"{what}: stats"
    for key, value in expected.get("stats", {}).items():
        if key in RATIOS:  # shares of one; perp_EV of the identity is rounding alone
            assert abs(found["stats"][key] - value) <= rtol, f"{what} stats.{key}"
        else:
            assert_close(found["stats"][key], value, f"{what} stats.{key}", rtol)
    assert ("layer_indices" in expected) == (found.get("layer_indices") is not None), f"{what}: layer_indices"
    if "layer_indices" in expected:
        assert found["layer_indices"] == expected["layer_indices"], f"{what}: {found['layer_indices']}"
        assert_close(found["layer_energy_scores"], expected["layer_energy_scores"], f"{what} energies", rtol)
        for ids in ("layer_top_ids", "layer_bottom_ids"):
            assert [len(x) for x in found[ids]] == [len(x) for x in expected[ids]], f"{what}: {ids}"
            for ours, theirs in zip(found[ids], expected[ids], strict=True):
                assert len(set(ours) & set(theirs)) >= len(theirs) - 1, f"{what}: {ids} {ours}, expected {theirs}"


def assert_strings_follow_ids(
    ids: Sequence[int], strings: Sequence[str], expected_ids: Sequence[int], expected_strings: Sequence[str], what: str
) -> None:
    """Every id that both rows list has the same string in both."""
    known = dict(zip(expected_ids, expected_strings, strict=True))
    for i, text in zip(ids, strings, strict=True):
        assert known.get(i, text) == text, f"{what}: id {i} is {text!r}, expected {known[i]!r}"
