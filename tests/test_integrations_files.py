"""circuit-tracer and SAEDashboard: the files are read as those tools read them."""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo import ASSETS
from querylens_fast.dictionaries.feature_lists import Activation
from querylens_fast.integrations.circuit_tracer import cantor, uncantor
from querylens_fast.integrations.delphi import write_explanations
from querylens_fast.integrations.saedashboard_tables import tick_values


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


def frontend_record(folder: Path, number: int) -> dict:
    """A feature as circuit-tracer's frontend loads it: unpair, range with one byte too many, length, inflate."""
    w = int(((8 * number + 1) ** 0.5 - 1) / 2)
    feature = number - w * (w + 1) // 2
    layer = w - feature
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    offsets, name = index[layer]["offsets"], index[layer]["filename"]
    data = (folder / name).read_bytes()[offsets[feature] : offsets[feature + 1] + 1]
    length = int.from_bytes(data[:4], "little")
    return json.loads(zlib.decompress(data[4 : 4 + length]))


def test_cantor_numbers_are_exact_for_large_features() -> None:
    for layer, feature in [(0, 0), (25, 1 << 20), (61, (1 << 24) - 1), (3, 16383)]:
        assert uncantor(cantor(layer, feature)) == (layer, feature)


def test_every_feature_of_circuit_tracers_files_is_read_by_its_frontend(model, dictionaries, tmp_path) -> None:
    folder = ql.export_circuit_tracer(dictionaries, tmp_path / "features", transcoder_id="set", model=model, k=5)
    for layer, dictionary in enumerate(dictionaries):
        found = ql.signatures(dictionary, model, preset=("value", "identity", "unembed"), final_norm=False, k=5)
        for feature in range(dictionary.n_features):
            record = frontend_record(folder, cantor(layer, feature))
            assert record["index"] == cantor(layer, feature)
            assert record["top_logits"] == found.top_tokens[feature]
            assert record["bottom_logits"] == found.bottom_tokens[feature]
            assert record["examples_quantiles"] == [] and record["act_max"] > record["act_min"]
            assert record["transcoder_id"] == "set"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    ql.export_circuit_tracer(dictionaries, folder, transcoder_id="set", model=model, k=5)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match="transcoder_id"):
        ql.export_circuit_tracer(dictionaries, folder, transcoder_id="other", model=model, k=5)


def test_circuit_tracers_records_hold_activations_where_they_are_known(model, dictionaries, tmp_path, caplog) -> None:
    whole = Activation("a", [("x\ud800", 0.0), (" y", 2.5)], 2.5, 0.0)
    broken = Activation("b", [("z", float("nan"))], 1.0, 0.0)
    listed = [ql.Feature("m", 3, 1, "sae", [whole, broken])]
    sample = SimpleNamespace(density=torch.full((9,), 0.25), maximum=torch.arange(9.0))
    known = {"activations": listed, "samples": {0: sample}}
    folder = ql.export_circuit_tracer(dictionaries, tmp_path / "f", transcoder_id="set", model=model, k=5, **known)
    record = frontend_record(folder, cantor(1, 3))
    (quantile,) = record["examples_quantiles"]
    assert quantile["examples"] == [
        {"tokens_acts_list": [0.0, 2.5], "train_token_ind": 1, "is_repeated_datapoint": False, "tokens": ["x�", " y"]}
    ]
    assert record["act_max"] == 2.5 and "activation_frequency" not in record
    record = frontend_record(folder, cantor(0, 8))
    assert (record["act_min"], record["act_max"], record["activation_frequency"]) == (0, 8, 0.25)
    assert "no activations=" not in caplog.text and "one of activations" in caplog.text
    with pytest.raises(FileExistsError, match="activity"):
        ql.export_circuit_tracer(dictionaries, folder, transcoder_id="set", model=model, k=5)
    mistakes = (({"activations": [ql.Feature("m", 3, 7, "sae")]}, "none of which"), ({"samples": {5: 1}}, "layer 5"))
    for wrong, message in mistakes:
        with pytest.raises(ValueError, match=message):
            ql.export_circuit_tracer(dictionaries, tmp_path / "o", transcoder_id="set", model=model, **wrong)


def test_circuit_tracer_refuses_what_its_index_cannot_hold(model, dictionaries, tmp_path) -> None:
    with pytest.raises(ValueError, match="layers \\[1\\]"):
        ql.export_circuit_tracer({1: dictionaries[1]}, tmp_path / "a", transcoder_id="x", model=model)
    with pytest.raises(ValueError, match="is of layer 1"):
        ql.export_circuit_tracer({0: dictionaries[1]}, tmp_path / "a", transcoder_id="x", model=model)
    some = ql.signatures(dictionaries[0], model, preset="logit_lens_value", features=[3, 1])
    with pytest.raises(ValueError, match="features='all'"):
        ql.export_circuit_tracer({0: some}, tmp_path / "a", transcoder_id="x", model=model)
    assert not (tmp_path / "a").exists()


def graph_of(places: list[tuple[int, int]]) -> dict:
    nodes = [
        {
            "node_id": f"{layer}_{feature}_4",
            "feature": cantor(layer, feature),
            "layer": str(layer),
            "ctx_idx": 4,
            "feature_type": "cross layer transcoder",
            "clerp": "",
        }
        for layer, feature in places
    ]
    nodes.append({"node_id": "E_5_0", "feature": 0, "layer": "E", "ctx_idx": 0, "feature_type": "embedding"})
    nodes.append({"node_id": "0_1_3", "feature": -1, "layer": "1", "feature_type": "mlp reconstruction error"})
    return {
        "metadata": {"slug": "s", "scan": "x", "prompt_tokens": ["\ud800"]},
        "qParams": {},
        "nodes": nodes,
        "links": [],
    }


def test_a_graphs_feature_nodes_get_labels_outputs_and_inputs(model, dictionaries, tmp_path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph_of([(0, 2), (1, 9), (1, 5000)])))
    out = {}
    for side, preset in (("value", "logit_lens_value"), ("key", "logit_lens_key")):
        out[side] = {
            layer: ql.signatures(
                d, model, preset=preset, k=4, out=tmp_path / f"{side}{layer}.parquet", progress=False
            ).path
            for layer, d in enumerate(dictionaries)
        }
    done = ql.annotate_graph(path, values=out["value"], keys=out["key"], model=model, k=4)
    assert (done.labelled, done.unknown) == (2, 1)
    nodes = json.loads(path.read_text())["nodes"]
    shown = ql.show(out["value"][1], 9)[0]
    assert nodes[1]["top_logit_effects"] == shown["top_tokens"]
    assert nodes[1]["bottom_logit_effects"] == shown["bottom_tokens"]
    assert nodes[1]["top_embedding_effects"] == ql.show(out["key"][1], 9)[0]["top_tokens"]
    assert nodes[1]["clerp"].split(" · ")[0] in {shown["top_tokens"][0].strip(), repr(shown["top_tokens"][0])[1:-1]}
    for node in nodes[2:]:
        assert "top_logit_effects" not in node and not node.get("clerp")


def test_results_are_shown_by_their_own_token_strings(model, dictionaries, tmp_path) -> None:
    held = [ql.signatures(d, model, preset="logit_lens_value", k=3) for d in dictionaries]
    jsonl, parquet = (
        ql.signatures(d, model, preset="logit_lens_value", k=3, out=tmp_path / name, progress=False).path
        for d, name in zip(dictionaries, ("a.jsonl", "b.parquet"), strict=True)
    )
    folders = [
        ql.export_circuit_tracer(results, tmp_path / name, transcoder_id="set", **given)
        for name, results, given in (
            ("1", held, {}),
            ("2", [jsonl, parquet], {}),
            ("3", held, {"model": model}),
        )
    ]
    files = [[(f / f"layer_{layer}.bin").read_bytes() for layer in range(2)] for f in folders]
    assert files[0] == files[1] == files[2]
    (tmp_path / "graph.json").write_text(json.dumps(graph_of([(1, 9)])))
    ql.annotate_graph(tmp_path / "graph.json", values={1: parquet})
    node = json.loads((tmp_path / "graph.json").read_text())["nodes"][0]
    assert node["bottom_logit_effects"] == held[1].bottom_tokens[9]
    with pytest.raises(ValueError, match="pass model="):
        ql.export_circuit_tracer(dictionaries, tmp_path / "4", transcoder_id="set")


def test_a_graph_that_is_none_is_left_alone(model, dictionaries, tmp_path) -> None:
    path = tmp_path / "graph.json"
    for text, message in (("[1]", "no attribution graph"), ("{", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            ql.annotate_graph(path, values={0: dictionaries[0]}, model=model)
        assert path.read_text() == text
    path.write_text(json.dumps(graph_of([(1, 5000)])))
    with pytest.raises(ValueError, match="none of the 1 feature nodes"):
        ql.annotate_graph(path, values={0: dictionaries[0]}, model=model)


def sae_dashboard(model: ql.Model, vectors: torch.Tensor, bins: int = 50) -> dict[str, torch.Tensor]:
    """SAEDashboard's numbers for decoder rows, by its formula."""
    logits = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-8) @ model.W_U.T
    edges = torch.stack([torch.linspace(x.min().item(), x.max().item(), bins + 1) for x in logits])
    return {
        "top": logits.topk(10, dim=1),
        "bottom": logits.topk(10, dim=1, largest=False),
        "heights": torch.stack([torch.histc(x, bins=bins) for x in logits]),
        "values": edges[:, :-1] + (edges[:, 1:] - edges[:, :-1]) / 2,
    }


def test_new_batches_are_saedashboards_numbers(model, dictionaries, tmp_path) -> None:
    paths = ql.export_saedashboard(
        dictionaries[0], model, tmp_path / "out", model_id="m", sae_set="s", sae_id_suffix=None, rows_per_file=4
    )
    assert [p.name for p in paths] == ["batch-0.json", "batch-1.json", "batch-2.json"]
    wanted = sae_dashboard(model, dictionaries[0].values(slice(None)))
    batches = [json.loads(p.read_text()) for p in paths]
    assert {k: batches[0][k] for k in ("model_id", "layer", "sae_set", "sae_id_suffix")} == {
        "model_id": "m", "layer": 0, "sae_set": "s", "sae_id_suffix": None
    }  # fmt: skip
    vocabulary = {i: piece for piece, i in model.tokenizer.get_vocab().items()}
    for i, feature in enumerate(f for b in batches for f in b["features"]):
        assert feature["feature_index"] == i
        for sign, side in (("pos", "top"), ("neg", "bottom")):
            found = wanted[side]
            assert torch.allclose(torch.tensor(feature[f"{sign}_values"]), found.values[i], atol=1e-5)
            pieces = [
                vocabulary[t].replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t") for t in found.indices[i].tolist()
            ]
            assert feature[f"{sign}_str"] == pieces
        heights = torch.tensor(feature["logits_hist_data_bar_heights"]).float()
        assert int(heights.sum()) == model.vocab_size and (heights - wanted["heights"][i]).abs().sum() <= 4
        values = torch.tensor(feature["logits_hist_data_bar_values"])
        assert torch.allclose(values, wanted["values"][i], atol=1.5e-5)
        assert feature["activations"] == [] and feature["frac_nonzero"] == 0


def test_what_is_missing_is_said_before_anything_is_written(model, dictionaries, tmp_path, caplog) -> None:
    nameless = ql.load_model(ASSETS / "model")
    nameless.tokenizer = None
    exports = {
        "model_id= and sae_set=": lambda m: ql.export_saedashboard(dictionaries[0], m, tmp_path / "s"),
        "activations and densities are not known": lambda m: ql.export_saedashboard(
            dictionaries[0], m, tmp_path / "c", into="columnar"
        ),
        "no examples": lambda m: ql.export_circuit_tracer(dictionaries, tmp_path / "f", transcoder_id="x", model=m),
        "": lambda m: write_explanations(dictionaries[0], tmp_path / "e", "layers.0", model=m),
    }
    for said, export in exports.items():
        with pytest.raises(ValueError, match="no tokenizer"):
            export(nameless)
        assert not list(tmp_path.iterdir())
        export(model)
        assert said in caplog.text
        for path in tmp_path.iterdir():
            shutil.rmtree(path)


def test_existing_batches_keep_everything_but_logits(model, dictionaries, tmp_path) -> None:
    features = [
        {"feature_index": i, "pos_str": ["old"], "pos_values": [9.0], "neg_str": [], "neg_values": [], "own": i,
         "activations": [{"tokens": ["\ud800"]}], "logits_hist_data_bar_heights": [1],
         "logits_hist_data_bar_values": [0.0]}
        for i in (7, 2, 3)
    ]  # fmt: skip
    path = tmp_path / "batch-4.json"
    path.write_text(json.dumps({"model_id": "m", "layer": 0, "features": features}))
    assert ql.export_saedashboard(dictionaries[0], model, tmp_path) == [path]
    batch = json.loads(path.read_text())
    wanted = sae_dashboard(model, dictionaries[0].values(slice(None)))
    for feature, i in zip(batch["features"], (7, 2, 3), strict=True):
        assert feature["own"] == i and feature["activations"] == [{"tokens": ["\ud800"]}]
        assert torch.allclose(torch.tensor(feature["pos_values"]), wanted["top"].values[i], atol=1e-5)
        assert len(feature["logits_hist_data_bar_heights"]) == 50
    assert not list(tmp_path.glob("*.partial"))
    found = ql.signatures(dictionaries[0], model, preset="logit_lens_value", k=4)
    found.top_scores[2] = float("nan")
    ql.export_saedashboard(found, model, tmp_path)
    kept = json.loads(path.read_text())["features"][1]
    assert kept["pos_str"] == kept["pos_values"] == [], "no token of before"
    assert len(kept["logits_hist_data_bar_heights"]) == 50, "a result without a histogram leaves it"
    path.write_text(json.dumps({"features": [{"feature_index": 99}]}))
    with pytest.raises(ValueError, match="feature 99"):
        ql.export_saedashboard(dictionaries[0], model, tmp_path)


def as_the_columnar_importer(folder: Path) -> dict[str, list[dict]]:
    """The rows of every table, found as the importer of SAEDashboard's columnar form finds them."""
    root = json.loads((folder / "manifest.json").read_text())
    assert root["dashboard_output_format"] == "columnar"
    rows: dict[str, list[dict]] = {}
    for i, batch in enumerate(root["batches"]):
        manifest = json.loads((folder / batch["artifact_dir"] / "manifest.json").read_text())
        assert batch["feature_batch_index"] == manifest["feature_batch_index"] == i
        needed = {"activation_histograms", "feature_statistics", "feature_tables", "logits_histograms", "logits_tables"}
        assert set(manifest["tables"]) == set(manifest["row_counts"]) == needed
        for name, file in manifest["tables"].items():
            table = pq.read_table(folder / batch["artifact_dir"] / file)
            assert table["feature_index"].to_pylist() == batch["feature_indices"]
            assert manifest["row_counts"][name] == len(table)
            rows.setdefault(name, []).extend(table.to_pylist())
    return rows


def test_columnar_tables(model, dictionaries, tmp_path) -> None:
    paths = ql.export_saedashboard(dictionaries[0], model, tmp_path / "c", into="columnar", rows_per_file=5)
    assert [f"{p.parent.name}/{p.name}" for p in paths[:2]] == [
        "feature_batch_0/logits_tables.parquet",
        "feature_batch_0/logits_histograms.parquet",
    ]
    tables, bars = (pq.read_table(p) for p in paths[:2])
    assert tables.column_names == ["feature_index", "bottom_token_ids", "bottom_logits", "top_token_ids", "top_logits"]
    assert bars.column_names == ["feature_index", "bar_heights", "bar_values", "tick_vals", "title"]
    rows = as_the_columnar_importer(tmp_path / "c")
    wanted = sae_dashboard(model, dictionaries[0].values(slice(None)))
    assert [row["feature_index"] for row in rows["logits_tables"]] == list(range(9))
    assert [row["top_token_ids"] for row in rows["logits_tables"]] == wanted["top"].indices.tolist()
    assert all(sum(row["bar_heights"]) == model.vocab_size for row in rows["logits_histograms"])
    assert all(len(row["neuron_alignment_values"]) == 3 for row in rows["feature_tables"])


def test_columnar_tables_hold_no_token_without_a_score(model, dictionaries, tmp_path) -> None:
    found = ql.signatures(dictionaries[0], model, preset="logit_lens_value", k=4)
    found.top_scores[2, 1] = float("nan")
    ql.export_saedashboard(found, model, tmp_path / "c", into="columnar")
    row = as_the_columnar_importer(tmp_path / "c")["logits_tables"][2]
    assert row["top_token_ids"] == found.top_ids[2, [0, 2, 3]].tolist() and len(row["top_logits"]) == 3


def test_ticks_are_multiples_of_a_tenth() -> None:
    assert tick_values(-0.5, 1.0) == [-0.3, 0.0, 0.3, 0.6, 0.9]
    assert tick_values(-1.0, 0.5) == [-0.9, -0.6, -0.3, 0.0, 0.3]
    assert tick_values(-0.15, 0.29) == [-0.1, 0.0, 0.1, 0.2, 0.3]
