"""Feature lists: the reference's pickles, read without running them, and their JSON form."""

from __future__ import annotations

import io
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from querylens_fast.dictionaries import feature_lists as ours
from querylens_fast.dictionaries.feature_lists import (
    Activation,
    Feature,
    convert_features,
    load_features,
    normalize_token,
    normalize_tokens,
    save_features_json,
    size_to_int,
    sort_features_by_layer,
)


def sample(activation: Any = Activation, feature: Any = Feature) -> list[Any]:
    texts = [activation("", [("▁a", 0.5), ("b", 2.0)], 2.0, 0.5, 1), activation("x", [("c", 1.0)], 1.0, 1.0)]
    return [
        feature("gpt2-small", 7, 3, "res", texts, "blocks.3.hook_resid_post", "some-release", "32k"),
        feature("gpt2-small", 2, "10", "mlp"),
        feature("gpt2-small", 1, "3", "res", [], size=96),
    ]


@pytest.mark.parametrize("module", ["util", "__main__", "feature_sampling"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reads_the_reference_pickles(tmp_path: Path, monkeypatch: Any, module: str, protocol: int) -> None:
    """Classes of any module count by their name, and that module is not imported."""
    stand_in = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, stand_in)
    classes = {}
    for source in (Activation, Feature):
        fields = {"__module__": module, "__annotations__": source.__dict__["__annotations__"]}
        defaults = {k: v for k, v in vars(source).items() if k in fields["__annotations__"]}
        classes[source.__name__] = dataclass(type(source.__name__, (), {**fields, **defaults}))
        setattr(stand_in, source.__name__, classes[source.__name__])
    path = tmp_path / "features.pkl"
    path.write_bytes(pickle.dumps(sample(classes["Activation"], classes["Feature"]), protocol))
    monkeypatch.delitem(sys.modules, module)
    assert load_features(path) == sample()
    assert module == "__main__" or module not in sys.modules


def test_reads_numpy_numbers(tmp_path: Path) -> None:
    path = tmp_path / "features.pkl"
    texts = [Activation("", [("a", np.float32(0.5))], np.float64(2.0), np.float32(0.25), np.int64(0))]  # type: ignore
    path.write_bytes(pickle.dumps([Feature("m", np.int64(5), np.int64(2), "res", texts)]))  # type: ignore[arg-type]
    (found,) = load_features(path)
    assert (found.feature, found.layer) == (5, 2) and type(found.feature) is int
    assert found.activations == [Activation("", [("a", 0.5)], 2.0, 0.25, 0)]


class Trap:
    """Unpickled by an ordinary unpickler, it makes a file."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize("where", ["alone", "in a list", "in a field"])
@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.getattr", "subprocess.run", "torch.load"])
def test_refuses_everything_else_and_runs_nothing(tmp_path: Path, where: str, name: str) -> None:
    import importlib

    module, function = name.split(".")
    made = tmp_path / "made"
    trap = Trap(getattr(importlib.import_module(module), function), f"touch {made}")
    feature = Feature("m", 1, 2, "res")
    feature.steering_cache = {"x": trap}
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"alone": trap, "in a list": [trap], "in a field": [feature]}[where]))
    with pytest.raises(ValueError, match=rf"evil.pkl.* asks for \S*{function}; only .* Feature and Activation"):
        load_features(path)
    assert not made.exists()


def test_a_pickle_cannot_change_the_classes(tmp_path: Path) -> None:
    """BUILD on the class itself reaches a stand-in that is dropped with the file."""
    stream = io.BytesIO()
    stream.write(b"\x80\x04cutil\nFeature\n(N}\x8c\x07__str__NstB\x86b.")
    path = tmp_path / "patch.pkl"
    path.write_bytes(stream.getvalue())
    before = Feature.__str__
    with pytest.raises(ValueError, match="patch.pkl"):
        load_features(path)
    assert Feature.__str__ is before
    assert str(Feature("m", 1, 2, "res")) == "Feature res-/2/1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, truncated"),
        (pickle.dumps(sample())[:-20], "damaged, truncated"),
        (b"PK\x03\x04 a zip file", "damaged, truncated"),
        (pickle.dumps([1, 2]), "a list of int; expected a list of Feature"),
        (pickle.dumps({3: []}), "a dict; expected a list of Feature"),
        (pickle.dumps([Activation("", [], 1.0, 0.0)]), "a list of Activation; expected a list of Feature"),
        (pickle.dumps([Feature("m", -1, 2, "res")]), "feature is -1; expected an index"),
        (pickle.dumps([Feature("m", 1, "two", "res")]), "layer is 'two'; expected a layer number"),
    ],
)
def test_wrong_contents_are_errors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "features.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_features(path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_features(tmp_path / "none.pkl")


def test_json_form_and_converter(tmp_path: Path) -> None:
    source, target = tmp_path / "f.pkl", tmp_path / "f.json"
    source.write_bytes(pickle.dumps(sample()))
    assert convert_features(source, target) == target
    assert load_features(target) == sample() == load_features(source)
    target.write_text(target.read_text()[:-30])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_features(target)
    target.write_text('{"format": "other", "features": []}')
    with pytest.raises(ValueError, match="expected the format"):
        load_features(target)
    target.write_text(f'{{"format": "{ours.FORMAT}", "features": [{{"layer": 1, "colour": 2}}]}}')
    with pytest.raises(ValueError, match="'colour'"):
        load_features(target)
    with pytest.raises(ValueError, match="no JSON form"):
        save_features_json([Feature("m", 1, 2, "res", steering_cache={"x": object()})], target)


def test_reference_helpers() -> None:
    """Strings, sizes, order and whitespace markers as in the reference."""
    first, neuron, other = sample()
    assert str(first) == "Feature res-32k/3/7"
    assert str(neuron) == "Feature mlp-/10/2"
    assert first.get_pedia_dashboard_url("3-res") == "https://www.neuronpedia.org/gpt2-small/3-res/7"
    assert (first.get_size_int(), neuron.get_size_int(), other.get_size_int()) == (32768, 0, 96)
    assert size_to_int("16k") == size_to_int("17k") == 16384
    with pytest.raises(ValueError, match="'16k'"):
        size_to_int("16m")
    assert sort_features_by_layer([first, neuron, other]) == [other, first, neuron]
    strongest, weaker = first.activations or []
    assert first.get_max_activating_examples(1) == [strongest]
    assert first.get_max_activating_examples() == [strongest, weaker]
    assert neuron.get_max_activating_examples() == []
    assert (strongest.get_tokens(), strongest.get_values()) == (["▁a", "b"], [0.5, 2.0])
    assert strongest.get_tokens_str() == strongest.get_max_tokens_str() == "▁ab"
    assert strongest.get_max_token_values(1) == [("▁a", 0.5), ("b", 2.0)]
    assert repr(strongest) == "Max=('b', 2.0), Sentence=[('▁a', 0.5), ('b', 2.0)]"
    assert str(weaker) == "Tokens=['c']"
    assert len({strongest, weaker, *sample()[0].activations}) == 2
    assert normalize_token("▁aĠbĊ") == " a b\n" and normalize_token(None) is None
    assert normalize_tokens(["Ġx", "y"]) == [" x", "y"]
