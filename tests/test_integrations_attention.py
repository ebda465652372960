"""Dictionaries at attn.hook_z and mlp.hook_post in dashboards: unit rows times W_O or W_out, and the heads' shares."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny_model
from torch import Tensor

import querylens_fast as ql
from querylens_fast.integrations.dashboard import Dashboard

N, ZERO = 9, 4
PLACE = {"model_id": "tiny", "source_set": "att"}
CARRIED = [("attn.hook_z", "attention", "W_O"), ("mlp.hook_post", "mlp", "W_out")]


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    """Gemma norms what its attention and MLP write, which SAEDashboard leaves out."""
    return ql.load_model(save_tiny_model(request.param, tmp_path_factory.mktemp("model")))


def at(folder: Path, weight: Tensor, place: str) -> tuple[ql.Dictionary, Tensor]:
    """A dictionary at a place of layer 1, and its decoder rows."""
    W_dec = torch.randn(N, weight.shape[1], generator=torch.Generator().manual_seed(0)) * 3
    W_dec[ZERO] = 0
    save_file({"W_dec": W_dec, "W_enc": W_dec.mT.contiguous()}, str(folder / "d.safetensors"))
    return ql.load_dictionary(folder / "d.safetensors", hook_name=f"blocks.1.{place}"), W_dec


def features_of(folder: Path) -> list[dict]:
    text = gzip.decompress((folder / "features" / "batch-0.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(("place", "part", "name"), CARRIED)
def test_values_are_divided_by_their_length_before_they_are_carried(model, tmp_path, place, part, name) -> None:
    module = getattr(model.blocks[1], part)
    weight = getattr(module, name)
    dictionary, W_dec = at(tmp_path, weight, place)
    wanted = (torch.nn.functional.normalize(W_dec, dim=1) @ weight.mT @ model.W_U.mT).topk(5, dim=1)
    alive = torch.arange(N) != ZERO
    for source in [dictionary, dictionary.on(model)] if module.adds_directly else [dictionary]:
        found = ql.signatures(source, model, preset="dashboard", k=5)
        (rows,) = Dashboard(source, model, k=5).blocks([torch.arange(N)])
        for side in (found, rows):
            assert torch.allclose(side.top_scores, wanted.values, atol=1e-5)
            assert torch.equal(side.top_ids[alive], wanted.indices[alive])
        assert rows.vectors is not None and torch.equal(rows.vectors, W_dec)
    plain = ql.signatures(dictionary, model, preset="dashboard", k=5, unit_norm=False)
    assert torch.allclose(plain.top_scores, (W_dec @ weight.mT @ model.W_U.mT).topk(5, dim=1).values, atol=1e-4)


def test_exports_hold_the_heads_shares(model, tmp_path, caplog) -> None:
    attention = model.blocks[1].attention
    dictionary, W_dec = at(tmp_path, attention.W_O, "attn.hook_z")
    lengths = W_dec.unflatten(1, (attention.n_heads, -1)).norm(dim=2)
    wanted = (lengths / lengths.sum(1, keepdim=True)).nan_to_num(0)
    folder = ql.export_neuronpedia(dictionary, model, tmp_path / "np", **PLACE)
    (batch,) = ql.export_saedashboard(dictionary, model, tmp_path / "sd", model_id="m", sae_set="s")
    found = ql.signatures(dictionary, model, preset="dashboard", k=5, out=tmp_path / "r.parquet", progress=False)
    of_result = ql.export_neuronpedia(found, model, tmp_path / "r", **PLACE, dictionary=dictionary)
    for lines in (features_of(folder), features_of(of_result), json.loads(batch.read_text())["features"]):
        shares = torch.tensor([line["decoder_weights_dist"] for line in lines])
        assert torch.allclose(shares, wanted, atol=1e-5)
    first, notes = features_of(folder)[0], json.loads((folder / "source.jsonl").read_text())["notes"]
    assert (first["hookName"], len(first["vector"])) == ("blocks.1.attn.hook_z", W_dec.shape[1])
    sourceset = json.loads((folder / "sourceset.jsonl").read_text())
    assert sourceset["showHeadAttribution"] is True, "pages show the shares only then"
    normed = not attention.adds_directly
    assert ("logits are without that norm" in caplog.text) == normed
    assert ("post_norm=left out" in notes) == (found.metadata().get("post_norm") == "left out") == normed


def test_others_have_no_shares(model, tmp_path) -> None:
    dictionary = ql.directions(torch.randn(N, model.d_model), layer=1)
    folder = ql.export_neuronpedia(dictionary, model, tmp_path, **PLACE)
    assert all(line["decoder_weights_dist"] == [] for line in features_of(folder))
