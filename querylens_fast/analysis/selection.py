"""Which features a run is about: a list, each feature with its own dictionary, or ids of one dictionary a layer."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from querylens_fast.analysis.configuration import plain
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.feature_lists import Feature, load_features, sort_features_by_layer
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.dictionaries.matrices import neuron_dictionary
from querylens_fast.dictionaries.rows import FeatureIds, MemoryRows, Rows
from querylens_fast.lens.presets import Preset
from querylens_fast.models.model import Model
from querylens_fast.runs.input_file import read_text

LIST_FILES = (".json", ".pkl", ".pickle")
NEURONS = "neurons"


@dataclass
class Selected:
    """Features of one dictionary that follow each other: ids [n], and their names (None: by the dictionary).

    The dictionary may hold the rows of these features alone; ``fingerprint`` is of the whole one.
    """

    dictionary: Dictionary
    fingerprint: str
    ids: Tensor
    names: list[str] | None


@dataclass(frozen=True)
class PickedRows:
    """Some rows of a matrix, without the rest of it: ids [m] ascending, matrix [m, D]."""

    ids: Tensor
    matrix: Tensor
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.matrix.shape[1]

    def read(self, ids: FeatureIds) -> Tensor:
        wanted = torch.arange(self.n)[ids] if isinstance(ids, slice) else ids.cpu()
        return self.matrix[torch.searchsorted(self.ids, wanted)]


@dataclass(frozen=True)
class Selection:
    """The features of a run. ``listed``: named one by one, as the reference's are, so that all statistics are due."""

    name: str
    listed: bool
    features: list[Feature] = field(default_factory=list)
    ids: Any = None
    dictionary: str = ""
    sae_id: str | None = None
    layers: list[int] | None = None

    def selected(self, model: Model, preset: Preset) -> list[Selected]:
        """Every dictionary loaded, every feature found in it, in the order of the result.

        Raises:
            FileNotFoundError: A dictionary that cannot be loaded.
            ValueError: A dictionary of another layer, a feature it does not have, or no feature at all.
        """
        found = self._of_list(model, preset) if self.features else self._of_dictionaries(model)
        if not any(len(some.ids) for some in found):
            raise ValueError(f"{self.name!r} selects no features")
        return found

    def _of_dictionaries(self, model: Model) -> list[Selected]:
        templated = "{layer}" in self.dictionary + (self.sae_id or "")
        layers: list[int | None] = list(self.layers or [None])
        if self.layers is None and (templated or self.dictionary == NEURONS):
            layers = list(range(model.n_layers))
        found = []
        for layer in layers:
            source, sae_id = (x and x.replace("{layer}", str(layer)) for x in (self.dictionary, self.sae_id))
            if source == NEURONS and layer is not None:
                dictionary = neuron_dictionary(model, layer)
            else:
                dictionary = load_dictionary(source, sae_id, layer).on(model)
            found.append(Selected(dictionary, dictionary.fingerprint, dictionary.select(self.ids), None))
        return found

    def _of_list(self, model: Model, preset: Preset) -> list[Selected]:
        keys = [(f.sae_release, f.sae_id, int(f.layer)) for f in self.features]
        dictionaries = {key: _named_dictionary(model, *key) for key in dict.fromkeys(keys)}
        fingerprints = {key: dictionary.fingerprint for key, dictionary in dictionaries.items()}
        for key, dictionary in dictionaries.items():
            members = [f for f, k in zip(self.features, keys, strict=True) if k == key]
            for f in members:
                if isinstance(f.size, int) and f.size not in (0, dictionary.n_features):
                    raise ValueError(f"{f} is of size {f.size}, but {dictionary.name!r} has {dictionary.n_features}")
            ids = dictionary.select(sorted({f.feature for f in members}))
            if not preset.is_ablation:
                dictionaries[key] = _with_rows_only(dictionary, preset.feature_vector, ids)
        found: list[Selected] = []
        for key, several in groupby(zip(keys, self.features, strict=True), key=lambda pair: pair[0]):
            members = [f for _, f in several]
            ids = torch.tensor([f.feature for f in members])
            found.append(Selected(dictionaries[key], fingerprints[key], ids, [str(f) for f in members]))
        return found


def _named_dictionary(model: Model, release: str | None, sae_id: str | None, layer: int) -> Dictionary:
    """The dictionary a `Feature` names: a release and id, a local folder, or the layer's MLP neurons."""
    if release is None and sae_id is None:
        return neuron_dictionary(model, layer)
    if release is None:
        raise ValueError(f"a feature has sae_id {sae_id!r} but no sae_release; neurons have neither")
    if sae_id is not None and (Path(release) / sae_id).exists():
        return load_dictionary(Path(release) / sae_id, layer=layer).on(model)
    return load_dictionary(release, sae_id, layer).on(model)


def _with_rows_only(dictionary: Dictionary, side: str, ids: Tensor) -> Dictionary:
    """The dictionary with only these rows of one side in memory; one that reads from its file stays as it is."""
    name = "value_rows" if side == "value" else "key_rows"
    if dictionary.kind == NEURONS or not isinstance(getattr(dictionary, name), MemoryRows):
        return dictionary
    rows: Rows = PickedRows(ids, dictionary.vectors(side, ids).clone(), dictionary.n_features)
    return dataclasses.replace(dictionary, **{"value_rows": None, "key_rows": None, name: rows, "load_coder": None})


def select_features(cfg: DictConfig) -> Selection:
    """The features a configuration asks for; feature lists are read here.

    Raises:
        ValueError: Nothing is asked for, or ids without a dictionary.
        FileNotFoundError: A missing feature list.
    """
    wanted = plain(cfg.features)
    if wanted is None:
        if cfg.features_pkl is None:
            raise ValueError("no features: pass features_pkl=list.pkl, or features=all (or ids) with dictionary=")
        return _from_list(Path(cfg.features_pkl))
    if isinstance(wanted, str) and Path(wanted).suffix in LIST_FILES:
        ids = _ids_in(Path(wanted))
        if ids is None:
            return _from_list(Path(wanted))
        wanted = ids
    if cfg.dictionary is None:
        raise ValueError(
            f"features={wanted!r} are ids, so dictionary= must say of what: a folder, a file, a sae-lens release with "
            "sae_id=, or 'neurons'"
        )
    layers = plain(cfg.layer)
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(type(x) is int for x in layers) and layers):
        raise ValueError(f"layer is {layers!r}; expected a layer number or a list of them")
    if layers is not None and len(layers) > 1 and "{layer}" not in cfg.dictionary + (cfg.sae_id or ""):
        if cfg.dictionary != NEURONS:
            raise ValueError(f"layer={layers} needs a dictionary or sae_id with '{{layer}}' in it")
    listed = not (isinstance(wanted, str) and (wanted == "all" or ":" in wanted))
    return Selection(
        name=_folder_name(cfg, layers),
        listed=listed,
        ids=wanted,
        dictionary=cfg.dictionary,
        sae_id=cfg.sae_id,
        layers=layers,
    )


def _from_list(path: Path) -> Selection:
    features = sort_features_by_layer(load_features(path))
    if not features:
        raise ValueError(f"features file {str(path)!r} lists no features")
    return Selection(name=path.stem, listed=True, features=features)


def _ids_in(path: Path) -> list[int] | None:
    """The ids of a JSON list of numbers; None for a list of features."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return None  # load_features says what is wrong with it
    return found if isinstance(found, list) and all(type(x) is int for x in found) else None


def _folder_name(cfg: DictConfig, layers: list[int] | None) -> str:
    """The result folder of a run over dictionaries."""
    parts = [Path(cfg.dictionary).name, *([cfg.sae_id] if cfg.sae_id else [])]
    if layers is not None:
        parts.append("layer" + ",".join(map(str, layers)))
    return re.sub(r"[^\w.,+-]+", "-", "-".join(parts).replace("{layer}", "layers")).strip("-")
