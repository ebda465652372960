"""WeightLens against brute force: products in float64 and runs of the transformers model itself."""

from pathlib import Path

import pandas
import pytest
import relations_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_relations_flow import Largest
from tiny_models import LAYERS, VOCAB, save_tiny_model

import querylens_fast as ql
from querylens_fast.relations import weight_lens as lens_module
from querylens_fast.relations.outliers import outliers

BOS = 1
LOW = ql.WeightLensThresholds(token_z=1.0, top_tokens=12, feature_z=1.0, top_features=8)


@pytest.fixture(scope="module", params=("gpt2", "gemma3", "qwen3"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return ql.load_model(folder, dtype="float64")


@pytest.fixture(scope="module")
def neurons(model: ql.Model) -> list[ql.Dictionary]:
    return [ql.neuron_dictionary(model, layer) for layer in range(LAYERS)]


@torch.no_grad()
def activations(model: ql.Model, layer: int) -> torch.Tensor:
    """[V, n]: each neuron's activation at every token behind BOS, from the checkpoint's own forward pass."""
    source = model.source
    block = (source.transformer.h if source.config.model_type == "gpt2" else source.model.layers)[layer]
    seen = []
    down = block.mlp.c_proj if source.config.model_type == "gpt2" else block.mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    source(torch.stack([torch.full((VOCAB,), BOS), torch.arange(VOCAB)], 1))
    handle.remove()
    return seen[0][:, 1]


def standing_out(scores: torch.Tensor, limit: int, threshold: float) -> list[list[int]]:
    """The outliers among the largest of every row, strongest first."""
    found = []
    for row in scores:
        largest = row.sort(descending=True)
        values = largest.values[:limit]
        z = (values - values.sum() / len(values)) / values.var().sqrt()
        found.append([i for i, score in zip(largest.indices.tolist(), z.tolist(), strict=False) if score > threshold])
    return found


@torch.no_grad()
def brute_force(model: ql.Model, neurons: list[ql.Dictionary]) -> dict[tuple[int, int, str], dict[int, bool]]:
    """(layer, feature, relation) → what was found, and whether it was accepted."""
    embedded = oracle.embeddings(model.source)
    found: dict[tuple[int, int, str], dict[int, bool]] = {}
    accepted: list[list[list[int]]] = []
    for layer, dictionary in enumerate(neurons):
        keys, values = dictionary.keys(slice(None)), dictionary.values(slice(None))
        active = activations(model, layer) > 0
        inputs = standing_out(keys @ embedded.T, LOW.top_tokens, LOW.token_z)
        outputs = standing_out(oracle.final_logits(model.source, values), LOW.top_tokens, LOW.token_z)
        read = [
            standing_out(keys @ neurons[i].values(slice(None)).T, LOW.top_features, LOW.feature_z) for i in range(layer)
        ]
        own = []
        for f in range(dictionary.n_features):
            handed = {t for i in range(layer) for g in read[i][f] for t in accepted[i][g]} - set(inputs[f])
            found[layer, f, "input token"] = {t: bool(active[t, f]) for t in inputs[f]}
            found[layer, f, "inherited token"] = {t: bool(active[t, f]) for t in handed}
            found[layer, f, "output token"] = dict.fromkeys(outputs[f], True)
            for i in range(layer):
                found[layer, f, f"earlier feature {i}"] = dict.fromkeys(read[i][f], True)
            own.append([t for t in [*inputs[f], *handed] if active[t, f]])
        accepted.append(own)
    return {key: value for key, value in found.items() if value}


def as_sets(frame: pandas.DataFrame) -> dict[tuple[int, int, str], dict[int, bool]]:
    found: dict[tuple[int, int, str], dict[int, bool]] = {}
    for row in frame.itertuples():
        relation = f"earlier feature {int(row.target_layer)}" if row.relation == "earlier feature" else row.relation
        found.setdefault((row.source_layer, row.source_id, relation), {})[row.target_id] = row.accepted
    return found


def test_by_brute_force(model: ql.Model, neurons: list[ql.Dictionary], tmp_path: Path) -> None:
    frame = ql.weight_lens(
        neurons, model, thresholds=LOW, bos_token_id=BOS, out=tmp_path / "w.parquet", progress=False
    ).pandas()
    expected = brute_force(model, neurons)
    assert as_sets(frame) == expected
    assert {key[2] for key in expected} >= {"input token", "inherited token", "earlier feature 0", "output token"}
    for _, group in frame.groupby(["source_layer", "source_id", "relation", "target"], observed=True):
        assert list(group["rank"]) == list(range(len(group))) and group.score.is_monotonic_decreasing
    runs = frame[frame.relation.isin(["input token", "inherited token"])]
    for layer in range(LAYERS):
        own, active = runs[runs.source_layer == layer], activations(model, layer)
        mine = torch.tensor(own.activation.to_numpy())
        theirs = active[own.target_id.tolist(), own.source_id.tolist()]
        assert torch.allclose(mine.double(), theirs.double(), atol=1e-5)
    assert frame[~frame.index.isin(runs.index)].activation.isna().all()
    tokens = frame[frame.relation != "earlier feature"]
    assert list(tokens.token) == model.str_tokens(tokens.target_id.tolist())


def test_z_scores_of_every_relation(model: ql.Model, neurons: list[ql.Dictionary]) -> None:
    frame = ql.weight_lens(neurons[2], model, earlier=neurons[:2], thresholds=LOW, bos_token_id=BOS).pandas()
    embedded, keys = oracle.embeddings(model.source), neurons[2].keys(slice(None))
    for row in frame[frame.relation.isin(["input token", "inherited token"])].itertuples():
        scores = keys[row.source_id] @ embedded.T
        assert abs(row.score - float(scores[row.target_id])) < 1e-9
        largest = scores.sort(descending=True).values[: LOW.top_tokens]
        assert abs(row.z - float((scores[row.target_id] - largest.mean()) / largest.std())) < 1e-7
    every = ql.weight_lens(neurons, model, thresholds=LOW, bos_token_id=BOS).pandas()
    last = every[every.source_layer == 2]
    assert as_sets(frame) == as_sets(last)


def test_some_features_and_no_run(model: ql.Model, neurons: list[ql.Dictionary]) -> None:
    frame = ql.weight_lens(neurons[0], model, thresholds=LOW, validate=False, features=[7, 3]).pandas()
    assert set(frame.source_id) <= {3, 7} and frame.accepted.all() and frame.activation.isna().all()
    every = ql.weight_lens(neurons[0], model, thresholds=LOW, bos_token_id=BOS).pandas()
    candidates = every[every.source_id.isin([3, 7])]
    assert set(zip(frame.source_id, frame.target_id, frame.relation, strict=True)) == set(
        zip(candidates.source_id, candidates.target_id, candidates.relation, strict=True)
    )


def test_descriptions(model: ql.Model, neurons: list[ql.Dictionary]) -> None:
    found = ql.weight_lens(neurons, model, thresholds=LOW, bos_token_id=BOS)
    frame, described = found.pandas(), ql.weight_descriptions(found, n=2).to_pandas()
    accepted = frame[frame.accepted & (frame.relation != "earlier feature")]
    assert len(described) == len(accepted.groupby(["source_layer", "source_id"], observed=True))
    for row in described.itertuples():
        own = accepted[(accepted.source_layer == row.source_layer) & (accepted.source_id == row.source_id)]
        inputs = own[own.relation != "output token"].sort_values("activation", ascending=False)
        outputs = own[own.relation == "output token"].sort_values("score", ascending=False)
        assert row.activated_by == ", ".join(map(repr, inputs.token[:2]))
        assert row.promotes == ", ".join(map(repr, outputs.token[:2]))


def test_mistakes(model: ql.Model, neurons: list[ql.Dictionary]) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 61"):
        ql.weight_lens(neurons[0], model, bos_token_id=61)
    with pytest.raises(ValueError, match="features is for one dictionary, but 3 are given"):
        ql.weight_lens(neurons, model, features=[1])
    with pytest.raises(ValueError, match="no encoder configuration"):
        ql.weight_lens(ql.directions(torch.randn(9, 24), layer=1), model, bos_token_id=BOS, thresholds=LOW)
    with pytest.raises(ValueError, match="expected one of weight_lens"):
        ql.weight_descriptions(ql.neighbours(neurons[0]))
    with pytest.raises(ValueError, match="empty list"):
        ql.weight_lens([], model)
    with pytest.raises(ValueError, match="top_tokens, top_features are 1, 8; expected at least 2"):
        ql.weight_lens(neurons[0], model, thresholds=LOW._replace(top_tokens=1))


def test_a_model_without_bos(tmp_path: Path) -> None:
    model = ql.load_model(save_tiny_model("qwen3", tmp_path))
    model.source.config.bos_token_id = None
    with pytest.raises(ValueError, match="names no BOS token"):
        ql.weight_lens(ql.neuron_dictionary(model, 0), model)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    V=st.integers(1, 300),
    limit=st.integers(1, 300),
    threshold=st.floats(-2, 2.5),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([1, 2, 5, 1000]),
)
def test_outliers_by_brute_force(n: int, V: int, limit: int, threshold: float, seed: int, levels: int) -> None:
    """Any limit and threshold, equal scores too."""
    generator = torch.Generator().manual_seed(seed)
    F = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    W = torch.randint(-levels, levels + 1, (V, 3), generator=generator).double()

    def search(vectors: torch.Tensor, k: int) -> ql.TopK:
        return ql.streamed_topk(vectors, W, k, bottom=False)

    found = outliers(search, F, V, limit, threshold).found
    scores = F @ W.T
    largest, order = scores.sort(dim=1, descending=True, stable=True)
    largest, order = largest[:, :limit], order[:, :limit]
    if min(limit, V) < 2:
        assert len(found.row) == 0
        return
    deviation = largest.std(1)
    z = (largest - largest.mean(1, keepdim=True)) / deviation[:, None]
    for row in range(n):
        mine = found.id[found.row == row].tolist()
        if deviation[row] < 1e-9 or ((z[row] - threshold).abs() < 1e-9).any():
            continue
        assert mine == order[row][z[row] > threshold].tolist()


def test_nothing_of_features_by_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    n, V = 6000, 30_000
    model = ql.load_model(save_tiny_model("gpt2", tmp_path))
    model.W_E = torch.randn(V, 24, generator=generator)
    model.W_U = torch.randn(V, 24, generator=generator)
    model.b_U = None
    monkeypatch.setattr(lens_module, "FEATURES_AT_ONCE", 4096)
    dictionary = ql.directions(torch.randn(n, 24, generator=generator), layer=1)
    with Largest() as largest:
        found = ql.weight_lens(dictionary, model, validate=False)
    assert len(found) > 0
    assert 0 < largest.bytes <= 1 << 27 < 4 * n * V / 4


def test_dictionaries_at_one_point_do_not_describe_each_other(model: ql.Model) -> None:
    matrix = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    two = [ql.directions(matrix, layer=1, name="a"), ql.directions(matrix.flip(0), layer=1, name="b")]
    frame = ql.weight_lens(two, model, thresholds=LOW, validate=False).pandas()
    assert set(frame.relation) == {"input token", "output token"}


def test_a_killed_run_resumes(model: ql.Model, neurons: list[ql.Dictionary], tmp_path: Path) -> None:
    """What earlier layers found is found again where their parts are already on the disk."""
    settings = {"thresholds": LOW, "bos_token_id": BOS, "progress": False}
    whole = ql.weight_lens(neurons, model, out=tmp_path / "whole.parquet", **settings)
    describe, calls = lens_module._Lens.describe, []

    def killed(self: lens_module._Lens, dictionary: ql.Dictionary, ids: torch.Tensor) -> list:
        calls.append(dictionary.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return describe(self, dictionary, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens_module._Lens, "describe", killed)
        with pytest.raises(KeyboardInterrupt):
            ql.weight_lens(neurons, model, out=tmp_path / "parts.parquet", **settings)
    assert len(list((tmp_path / "parts.parquet.parts").glob("part-*"))) == 2
    resumed = ql.weight_lens(neurons, model, out=tmp_path / "parts.parquet", **settings)
    assert resumed.table().equals(whole.table())
