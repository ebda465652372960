"""delphi: neighbours and explanations are in the form that its loader reads."""

from __future__ import annotations

import json

import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo import ASSETS
from querylens_fast.integrations.delphi import write_explanations, write_neighbours


@pytest.fixture(scope="module")
def model() -> ql.Model:
    return ql.load_model(ASSETS / "model")


@pytest.fixture(scope="module")
def dictionaries() -> list[ql.Dictionary]:
    generator = torch.Generator().manual_seed(0)
    return [
        ql.directions(torch.randn(9 + layer, 160, generator=generator), layer=layer, name=f"layer {layer}")
        for layer in range(2)
    ]


def test_delphi_neighbours_are_the_cosines_without_the_feature_itself(dictionaries, tmp_path) -> None:
    path = write_neighbours(dictionaries[0], tmp_path, "layers.0", "decoder_similarity", k=4)
    assert path.name == "layers.0-decoder_similarity.json"
    rows = torch.nn.functional.normalize(dictionaries[0].values(slice(None)), dim=1)
    found = (rows @ rows.T).topk(5, dim=1)
    lists = json.loads(path.read_text())
    assert list(lists) == [str(i) for i in range(9)]
    for i in range(9):
        assert [index for _, index in lists[str(i)]] == found.indices[i, 1:].tolist()
        assert torch.allclose(torch.tensor([s for s, _ in lists[str(i)]]), found.values[i, 1:], atol=1e-6)
    with pytest.raises(ValueError, match="method is 'co-occurrence'"):
        write_neighbours(dictionaries[0], tmp_path, "layers.0", "co-occurrence")


def test_delphi_explanations_are_json_strings(model, dictionaries, tmp_path) -> None:
    paths = write_explanations(
        dictionaries[0], tmp_path, "layers.0", "Promotes {tokens}.", model=model, k=2, features=[3]
    )
    assert [p.name for p in paths] == ["layers.0_latent3.txt"]
    assert json.loads(paths[0].read_text()).startswith('Promotes "')
    given = write_explanations(dictionaries[0], tmp_path, "layers.0", model=model, features=[3, 4], texts={4: "four"})
    assert [json.loads(path.read_text())[:4] for path in given] == ["The ", "four"]
    with pytest.raises(ValueError, match="texts has feature 5"):
        write_explanations(dictionaries[0], tmp_path / "x", "layers.0", model=model, features=[3], texts={5: "five"})
    with pytest.raises(ValueError, match="template"):
        write_explanations(dictionaries[0], tmp_path / "x", "layers.0", "{token}", model=model)
    assert not (tmp_path / "x").exists()
