"""Features by name: the reference's feature lists, read without running what is in them.

A feature list says which features to analyse: model, layer, index, and the sae-lens release and id of the dictionary
(none for an MLP neuron), with the activations that dashboards show. The reference keeps it as a pickle of its data
classes. `load_features` reads such a pickle with an unpickler that imports nothing: the two data classes and plain
containers are rebuilt here, everything else is refused by name. The JSON form of the same list has no such risk;
`convert_features` makes one from the other.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from querylens_fast.dictionaries.pickles import PlainUnpickler, RefusedPickleError, check_expanded
from querylens_fast.runs.atomic_write import write_whole
from querylens_fast.runs.input_file import fits_memory, read_text

FORMAT = "querylens_fast.features/1"

TokenValue = tuple[str, float]


@dataclass
class Activation:
    """One text in which a feature was active: its tokens and the feature's activation at each (reference class)."""

    id: str
    token_values: list[TokenValue]
    max_value: float
    min_value: float
    max_value_token_index: int | None = None
    loss_values: list[float] | None = None

    def get_tokens(self) -> list[str]:
        """The tokens, in order."""
        return [token for token, _ in self.token_values]

    def get_values(self) -> list[float]:
        """The activation at each token."""
        return [value for _, value in self.token_values]

    def get_tokens_str(self) -> str:
        """The tokens joined."""
        return "".join(self.get_tokens())

    def get_max_token_values(self, w: int = 5) -> list[TokenValue]:
        """(token, value) from w before the strongest token to w − 1 after it."""
        return self.token_values[self._window(w)]

    def get_max_tokens_str(self, w: int = 5) -> str:
        """The tokens of `get_max_token_values`, joined."""
        return "".join(self.get_tokens()[self._window(w)])

    def _window(self, w: int) -> slice:
        if self.max_value_token_index is None:
            raise ValueError("this activation has no max_value_token_index")
        return slice(max(self.max_value_token_index - w, 0), self.max_value_token_index + w)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if self.max_value_token_index is not None:
            return f"Max={self.token_values[self.max_value_token_index]}, Sentence={self.get_max_token_values()}"
        return f"Tokens={self.get_tokens()}"

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass
class Feature:
    """A feature of a dictionary, or an MLP neuron where ``sae_release`` and ``sae_id`` are None (reference class)."""

    model_id: str
    feature: int
    layer: str | int
    type: str
    activations: list[Activation] | None = None
    sae_id: str | None = None
    sae_release: str | None = None
    size: str | int = ""
    steering_cache: dict[Any, Any] | None = None

    def get_pedia_dashboard_url(self, np_sae_id: str) -> str:
        """The feature's page on neuronpedia.org."""
        return f"https://www.neuronpedia.org/{self.model_id}/{np_sae_id}/{self.feature}"

    def get_size_int(self) -> int:
        """The dictionary's size as a number, 0 when it is not known."""
        return size_to_int(self.size)

    def get_max_activating_examples(self, k: int = 5) -> list[Activation]:
        """The k different activations with the largest maximum."""
        return sorted(set(self.activations or []), key=lambda a: a.max_value, reverse=True)[:k]

    def __str__(self) -> str:
        return f"Feature {self.type}-{self.size}/{self.layer}/{self.feature}"

    def __hash__(self) -> int:
        return hash(str(self))


def size_to_int(size: str | int) -> int:
    """The size "16k" as the power of two it stands for (16384); "" is 0, a number is itself.

    Raises:
        ValueError: The text is no number of thousands.
    """
    if isinstance(size, int):
        return size
    if size == "":
        return 0
    if not (size.endswith("k") and size[:-1].isdigit() and int(size[:-1]) > 0):
        raise ValueError(f"size is {size!r}; expected a form like '16k'")
    return 2 ** round(math.log2(int(size[:-1]) * 1024))


def sort_features_by_layer(all_features_sample: Iterable[Feature]) -> list[Feature]:
    """Features by layer number, then by index: the order that feature_index counts in."""
    return sorted(all_features_sample, key=lambda f: (int(f.layer), f.feature))


_MARKERS = {"\u2581": " ", "\u0120": " ", "\u010a": "\n"}


def normalize_token(tok: str | None) -> str | None:
    """A vocabulary entry with its whitespace markers (▁, Ġ, Ċ) as the characters they stand for; None stays None."""
    if tok is None:
        return None
    for marker, character in _MARKERS.items():
        tok = tok.replace(marker, character)
    return tok


def normalize_tokens(tokens: Iterable[str]) -> list[str | None]:
    """`normalize_token` of each."""
    return [normalize_token(token) for token in tokens]


# --- reading and writing -----------------------------------------------------------------------------------------


def load_features(path: str | Path) -> list[Feature]:
    """Read a feature list: a pickle of the reference, or the JSON form (``.json``).

    A pickle may hold only the classes named Feature and Activation (of whatever module), plain containers, text,
    numbers and numpy scalars. Nothing in it is imported or run.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged or truncated, no list of features, or a pickle that asks for anything else (named).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features file {str(path)!r} does not exist")
    if path.suffix == ".json":
        return _read_json(path)
    found = _unpickle(path)
    if isinstance(found, _Record):
        found = [found]
    if not isinstance(found, (list, tuple)) or not all(isinstance(f, _Record) and f.name == "Feature" for f in found):
        raise ValueError(f"features file {str(path)!r} holds {_describe(found)}; expected a list of Feature objects")
    return [_as_feature(f.state, str(path), i) for i, f in enumerate(found)]


def save_features_json(features: Sequence[Feature], path: str | Path) -> Path:
    """Write the JSON form that `load_features` reads, whole or not at all. Returns the path.

    Raises:
        ValueError: A field that has no JSON form, such as a steering_cache of objects.
    """
    path = Path(path)
    data = {"format": FORMAT, "features": [dataclasses.asdict(f) for f in features]}
    try:
        text = json.dumps(data, ensure_ascii=False, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"these features have no JSON form: {error}") from error
    write_whole(path, text)
    return path


def convert_features(pkl: str | Path, json: str | Path) -> Path:
    """Read a reference pickle and write the same list as JSON. Returns the JSON file's path."""
    return save_features_json(load_features(pkl), json)


def _read_json(path: Path) -> list[Feature]:
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"features file {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("features"), list):
        raise ValueError(f"features file {str(path)!r} holds {_describe(data)}; expected the format {FORMAT!r}")
    return [_as_feature(state, str(path), i) for i, state in enumerate(data["features"])]


def _as_feature(state: Any, source: str, index: int) -> Feature:
    """A `Feature` from its fields, checked."""
    feature = _build(Feature, state, f"{source!r}, feature {index}")
    if isinstance(feature.feature, bool) or not isinstance(feature.feature, int) or feature.feature < 0:
        raise ValueError(f"{source!r}, feature {index}: feature is {brief(feature.feature)}; expected an index from 0")
    if not isinstance(feature.layer, (str, int)) or not str(feature.layer).isdigit():
        raise ValueError(f"{source!r}, feature {index}: layer is {brief(feature.layer)}; expected a layer number")
    if feature.activations is not None:
        if not isinstance(feature.activations, (list, tuple)):
            raise ValueError(
                f"{source!r}, feature {index}: activations are {brief(feature.activations)}; expected a list"
            )
        feature.activations = [_as_activation(a, f"{source!r}, feature {index}") for a in feature.activations]
    return feature


def _as_activation(state: Any, where: str) -> Activation:
    activation = _build(Activation, state.state if isinstance(state, _Record) else state, f"{where}, an activation")
    try:
        activation.token_values = [(token, value) for token, value in activation.token_values]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: token_values of an activation are no (token, value) pairs") from None
    return activation


def _build(kind: Any, state: Any, where: str) -> Any:
    fields = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(state, dict) or not state.keys() <= fields:
        unknown = sorted(map(str, state.keys() - fields)) if isinstance(state, dict) else _describe(state)
        raise ValueError(f"{where}: {unknown} does not belong to a {kind.__name__}; it has {', '.join(sorted(fields))}")
    try:
        return kind(**state)
    except TypeError as error:
        raise ValueError(f"{where}: incomplete ({error})") from None


def _describe(found: Any) -> str:
    """What a file holds, in a few words."""
    if isinstance(found, _Record):
        return f"one {found.name}"
    if isinstance(found, (list, tuple)):
        kinds = sorted({x.name if isinstance(x, _Record) else type(x).__name__ for x in found})
        return f"a {type(found).__name__} of {', '.join(kinds) or 'nothing'}"
    return f"a {type(found).__name__}"


# --- the unpickler -----------------------------------------------------------------------------------------------


class _Record:
    """Stands for a pickled data class while its file is read; nothing a pickle does to it reaches the real class."""

    name = ""

    def __init__(self, *values: Any) -> None:
        kind = Feature if self.name == "Feature" else Activation
        self.state = dict(zip((f.name for f in dataclasses.fields(kind)), values, strict=False))

    def __new__(cls, *_: Any) -> _Record:
        record = super().__new__(cls)
        record.state = {}
        return record

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"the state of a {self.name} is a {type(state).__name__}")
        self.state = state


class _Dtype:
    """Stands for a numpy dtype: only its code is kept."""

    def __init__(self, code: str, *_: Any) -> None:
        if not (isinstance(code, str) and code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "b1")):
            raise pickle.UnpicklingError(f"a numpy scalar of type {code!r} is not admitted")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _numpy_scalar(dtype: Any, data: bytes) -> Any:
    """The Python number of a pickled numpy scalar."""
    import numpy as np

    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar without number type or bytes")
    return np.frombuffer(data, np.dtype(dtype.code).newbyteorder("<"))[0].item()


_RECORDS = {name: type(name, (_Record,), {"name": name}) for name in ("Feature", "Activation")}


def _admitted(module: str, name: str) -> Any:
    if name in _RECORDS:
        return _RECORDS[name]
    if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
        return _numpy_scalar
    if (module, name) == ("numpy", "dtype"):
        return _Dtype
    raise RefusedPickleError(
        f"asks for {module}.{name}; only the data classes Feature and Activation, plain containers and numbers are "
        "admitted, and nothing was run"
    )


def _unpickle(path: Path) -> Any:
    with fits_memory(path):
        data = path.read_bytes()
    try:
        found = PlainUnpickler(io.BytesIO(data), _admitted).load()
        check_expanded(found, len(data))
        return found
    except RefusedPickleError as error:
        raise RefusedPickleError(f"features file {str(path)!r} {error}") from None
    except Exception as error:
        # A damaged pickle can raise nearly anything: it is a program, and this one is broken.
        raise ValueError(
            f"features file {str(path)!r} is damaged, truncated or no pickle of features "
            f"({type(error).__name__}: {error})"
        ) from error
