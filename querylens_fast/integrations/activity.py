"""Where features were active: texts with activations, and each feature's density and maximum, for exporters.

Texts come as the reference's `Feature` lists. Density and maximum come from a feature sample: an object, or a Parquet
file, with ``density`` and ``maximum`` of every feature.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.feature_lists import Activation, Feature, load_features
from querylens_fast.runs.sealed_parquet import read_checked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Activity:
    """Activity by feature id.

    Attributes:
        texts: The texts of each feature that has any, strongest first.
        maximum: Largest activation of every feature of the dictionary, [n], or None.
        density: Share of positions at which it is active, [n], or None.
    """

    texts: dict[int, list[Activation]] = field(default_factory=dict)
    maximum: Tensor | None = None
    density: Tensor | None = None

    def whole_texts(self, feature: int) -> list[Activation]:
        """A feature's texts that hold tokens, and a number for each."""
        return list(filter(is_whole, self.texts.get(feature, [])))

    def broken(self) -> int:
        """How many texts are no such."""
        return sum(not is_whole(text) for texts in self.texts.values() for text in texts)

    def max_of(self, feature: int) -> float:
        """The largest activation known, 0 where none is."""
        known = [a.max_value for a in self.texts.get(feature, [])]
        if self.maximum is not None:
            known.append(float(self.maximum[feature]))
        return max((float(x) for x in known if math.isfinite(x)), default=0.0)

    def density_of(self, feature: int) -> float:
        """The share of positions, 0 where it is not known."""
        found = 0.0 if self.density is None else float(self.density[feature])
        return found if math.isfinite(found) else 0.0


def is_whole(text: Activation) -> bool:
    """Whether a text holds tokens, and a number for each."""
    return bool(text.token_values) and all(map(math.isfinite, text.get_values()))


def open_activity(activations: Any, sample: Any, features: Tensor, layer: int, n_features: int) -> Activity:
    """Activity of the features [n] of one layer.

    Args:
        activations: A feature list: a .json or .pkl path, or a sequence of `Feature`; or None.
        sample: An object with ``density`` and ``maximum`` [n_features], or a .parquet path with these columns and
            ``feature``; or None.
        features: Which features are exported.
        layer: Their layer; texts of other layers are left out and counted in the log.
        n_features: Of the dictionary.

    Raises:
        ValueError: None of the texts is of these features, or a sample of another dictionary's size.
    """
    texts = {} if activations is None else _texts(activations, features, layer)
    if sample is None:
        return Activity(texts)
    maximum, density = _sampled(sample, n_features)
    return Activity(texts, maximum, density)


def _texts(activations: Any, features: Tensor, layer: int) -> dict[int, list[Activation]]:
    listed: Sequence[Feature] = load_features(activations) if isinstance(activations, (str, Path)) else activations
    wanted, texts, others = set(features.tolist()), {}, 0
    for feature in listed:
        if int(feature.layer) != layer or feature.feature not in wanted:
            others += 1
            continue
        texts.setdefault(feature.feature, []).extend(feature.activations or [])
    if not texts:
        raise ValueError(
            f"activations lists {len(listed)} features, none of which is exported (layer {layer}); pass the list of "
            "this dictionary"
        )
    if others:
        logger.warning("%d features of the list are of another layer or not exported: left out", others)
    return {i: sorted(found, key=lambda a: -a.max_value) for i, found in texts.items()}


def _sampled(sample: Any, n_features: int) -> tuple[Tensor, Tensor]:
    if isinstance(sample, (str, Path)):
        if not Path(sample).is_file():
            raise FileNotFoundError(f"feature sample {str(sample)!r} does not exist")
        table = read_checked(Path(sample)).table()
        if missing := {"feature", "maximum", "density"} - set(table.column_names):
            raise ValueError(f"{str(sample)!r} is no feature sample: it has no {', '.join(sorted(missing))}")
        ids = torch.from_numpy(table["feature"].to_numpy().copy()).long()
        found = {name: torch.from_numpy(table[name].to_numpy().copy()) for name in ("maximum", "density")}
        if len(ids) != n_features or not torch.equal(ids, torch.arange(n_features)):
            raise ValueError(f"feature sample {str(sample)!r} holds {len(ids)} features; expected all {n_features}")
        return found["maximum"], found["density"]
    maximum, density = torch.as_tensor(sample.maximum), torch.as_tensor(sample.density)
    if maximum.shape != (n_features,) or density.shape != (n_features,):
        raise ValueError(f"the feature sample is of {len(maximum)} features; expected {n_features}")
    return maximum, density
