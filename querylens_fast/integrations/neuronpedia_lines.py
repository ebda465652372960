"""The lines of a Neuronpedia export: one JSON object a feature, an activation, an explanation, with the same keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from querylens_fast.integrations.activity import Activity, is_whole
from querylens_fast.integrations.columns import logit_fields, vector_fields, vector_lists
from querylens_fast.integrations.dashboard import Rows
from querylens_fast.integrations.neighbours import Lists, empty_lists
from querylens_fast.integrations.tokens import clean

STEER_STRENGTH = 10.0
"""Where no activation is known: the table's own default."""
TOP = -1.0
"""binMin and binContains of the strongest activations."""


@dataclass(frozen=True)
class Place:
    """Where lines belong: model, source (layer and set), and who made them."""

    model_id: str
    source_set: str
    source_id: str
    creator_id: str
    hook_name: str

    def key(self, feature: int) -> dict[str, Any]:
        """The columns that name a feature."""
        return {"modelId": self.model_id, "layer": self.source_id, "index": feature}

    def unique_id(self, feature: int, what: str) -> str:
        """A primary key that is the same every time: "ql" and 23 hexadecimal digits."""
        text = f"{self.model_id}/{self.source_id}/{feature}/{what}"
        return "ql" + hashlib.sha256(text.encode()).hexdigest()[:23]


def feature_lines(
    place: Place, rows: Rows, strings: Sequence[str], vectors: bool, neighbours: Lists, activity: Activity
) -> Iterator[dict[str, Any]]:
    """The lines of some features, in order."""
    features = rows.features.tolist()
    none: list[list[float]] = [[] for _ in features]
    written = none if rows.vectors is None or not vectors else vector_lists(rows.vectors)
    similar, cosines = neighbours if neighbours[0] else empty_lists(features)
    fields = zip(vector_fields(rows), logit_fields(rows, strings), strict=True)
    for i, (feature, (alignment, logits)) in enumerate(zip(features, fields, strict=True)):
        strongest = round(activity.max_of(feature), 5)
        has_vector = bool(written[i])
        yield {
            **place.key(feature),
            "sourceSetName": place.source_set,
            "creatorId": place.creator_id,
            "maxActApprox": strongest,
            "hasVector": has_vector,
            "vector": written[i],
            "vectorDefaultSteerStrength": strongest if has_vector and strongest > 0 else STEER_STRENGTH,
            "hookName": place.hook_name,
            "topkCosSimIndices": similar[i],
            "topkCosSimValues": cosines[i],
            **alignment,
            **logits,
            "frac_nonzero": activity.density_of(feature),
        }


def activation_lines(place: Place, features: Sequence[int], activity: Activity) -> Iterator[dict[str, Any]]:
    """The lines of every text of some features; texts that hold no tokens or a value that is no number are left out."""
    for feature in features:
        for number, text in enumerate(activity.texts.get(feature, [])):
            if not is_whole(text):
                continue
            values = [float(x) for x in text.get_values()]
            peak = max(range(len(values)), key=values.__getitem__)
            yield {
                "id": place.unique_id(feature, f"activation/{number}"),
                **place.key(feature),
                "tokens": [clean(token) for token in text.get_tokens()],
                "values": [round(x, 5) for x in values],
                "maxValue": round(values[peak], 5),
                "maxValueTokenIndex": peak,
                "minValue": round(min(values), 5),
                "creatorId": place.creator_id,
                "binMin": TOP,
                "binMax": round(activity.max_of(feature), 5),
                "binContains": TOP,
                "qualifyingTokenIndex": peak,
            }


def explanation_lines(place: Place, features: Sequence[int], texts: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    """The lines of the features that have an explanation."""
    for feature in features:
        if feature in texts:
            yield {
                "id": place.unique_id(feature, "explanation"),
                **place.key(feature),
                "description": clean(texts[feature]),
                "authorId": place.creator_id,
            }
