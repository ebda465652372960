"""Where a Neuronpedia export belongs, and its four one-line files: release, model, source set and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from querylens_fast.integrations.dashboard import heads_of
from querylens_fast.integrations.neuronpedia_lines import Place
from querylens_fast.integrations.neuronpedia_tables import SOURCE, SOURCE_EXTRAS
from querylens_fast.integrations.sources import Source
from querylens_fast.integrations.tokens import clean
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.model import Model
from querylens_fast.runs.arguments import whole_number

_NOTED = ("preset", "unit_norm", "unembedding", "dictionary", "final_norm", "post_norm")
"""What of a source's identity is said on its page."""


@dataclass(frozen=True)
class Names:
    """What the files say beside the place.

    Raises:
        ValueError: source_fields names a column that a source does not have, or a value is not of its type.
    """

    release: str
    creator_name: str
    description: str | None
    urls: Sequence[str]
    source_fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.source_fields) - set(SOURCE_EXTRAS))
        if unknown:
            raise ValueError(f"source_fields has {', '.join(unknown)}; a source has {', '.join(SOURCE_EXTRAS)}")
        for name, value in self.source_fields.items():
            kind = int if SOURCE[name] == "integer" else str
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"source_fields has {name}={value!r}; expected {kind.__name__}")
        if isinstance(self.urls, str) or not all(isinstance(url, str) for url in self.urls):
            raise ValueError(f"urls is {self.urls!r}; expected a list of texts")


def place_of(
    source: Source,
    model_id: str,
    source_set: str,
    layer: int,
    suffix: str | None,
    creator_id: str,
    hook_name: str | None,
) -> Place:
    """The place of an export.

    Raises:
        ValueError: A name that cannot be a folder's or an id.
    """
    whole_number("layer", layer, 0)
    for name, value in (("model_id", model_id), ("source_set", source_set), ("suffix", suffix or "x")):
        if not value or any(c in value for c in "/\\\0'\"\n") or value in (".", ".."):
            raise ValueError(f"{name} is {value!r}; expected a name without slashes, quotes or line breaks")
    if not creator_id or "\n" in creator_id:
        raise ValueError(f"creator_id is {creator_id!r}; expected the id of a user")
    source_id = f"{layer}-{source_set}" + (f"__{suffix}" if suffix else "")
    known = "" if source.dictionary is None else source.dictionary.hook_name_out or source.dictionary.hook_name
    return Place(model_id, source_set, source_id, creator_id, hook_name or known or f"blocks.{layer}.hook_resid_post")


def metadata_lines(place: Place, names: Names, source: Source, model: Model) -> dict[str, dict[str, Any]]:
    """The line of each file: only columns that the tables have, nothing that is null, text that Postgres takes."""
    said = names.description or f"{place.source_set}: {source.preset} tokens by querylens_fast"
    made = {"creatorName": names.creator_name, "creatorId": place.creator_id}
    public = {"urls": list(names.urls), "visibility": "PUBLIC"}
    notes = ", ".join(f"{k}={v}" for k, v in source.identity.items() if k in _NOTED)
    return _cleaned(
        {
            "release": {"name": names.release, "description": said, **made, **public},
            "model": {
                "id": place.model_id,
                "layers": model.n_layers,
                "neuronsPerLayer": _neurons(model),
                "owner": names.creator_name,
                "creatorId": place.creator_id,
                "displayName": place.model_id,
                "displayNameShort": place.model_id,
                "visibility": "PUBLIC",
            },
            "sourceset": {
                "modelId": place.model_id,
                "name": place.source_set,
                "description": said,
                **made,
                "releaseName": names.release,
                **public,
                # Without it pages leave decoder_weights_dist out.
                **({"showHeadAttribution": True} if source.dictionary and heads_of(source.dictionary, model) else {}),
            },
            "source": {
                "id": place.source_id,
                "modelId": place.model_id,
                "setName": place.source_set,
                "creatorId": place.creator_id,
                "visibility": "PUBLIC",
                "notes": f"querylens_fast: {notes}",
                **{name: value for name, value in names.source_fields.items() if value is not None},
            },
        }
    )


def _cleaned(value: Any) -> Any:
    """The value with every text in it as Postgres takes it."""
    if isinstance(value, dict):
        return {name: _cleaned(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value


def _neurons(model: Model) -> int:
    """Width of the MLPs, 0 where they are not known by name, as in a model that is read without its layers."""
    try:
        W_out = getattr(model.blocks[0].mlp, "W_out", None) if model.blocks else None
    except UnsupportedModelError:
        return 0
    return int(W_out.shape[-1]) if isinstance(W_out, Tensor) and W_out.ndim == 2 else 0
