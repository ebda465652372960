"""Subspace channels against brute force over the features, gradient training, and scipy."""

from pathlib import Path

import pytest
import torch
from tiny_models import D_MODEL, LAYERS, save_tiny_model

import querylens_fast as ql
from querylens_fast.relations.channel_statistics import channel_maps, overlaps_by_distance
from querylens_fast.relations.channels import reduced_rank_map
from querylens_fast.relations.drawing import draw_channels

RANK = 4


@pytest.fixture(scope="module", params=("gpt2", "gemma3", "qwen3"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return ql.load_model(folder, dtype="float64")


@pytest.fixture(scope="module")
def transport(model: ql.Model, sample: ql.Tokens) -> ql.Transport:
    return ql.fit_transport(model, sample, sides=("value",), orders=("first_order",), progress=False)


@pytest.fixture(scope="module")
def neurons(model: ql.Model) -> list[ql.Dictionary]:
    return [ql.neuron_dictionary(model, layer) for layer in range(LAYERS)]


def by_regression(V: torch.Tensor, R: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """Textbook reduced-rank regression of responses R on V: (the map [D, D], its share of the squares)."""
    full = torch.linalg.lstsq(V, R, driver="gelsd").solution
    _, _, right = torch.linalg.svd(V @ full, full_matrices=False)
    fitted = full @ right[:rank].T @ right[:rank]
    return fitted, 1 - float((V @ fitted - R).square().sum() / R.square().sum())


def basis(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svd(matrix).U[:, :rank]


def responses(model: ql.Model, transport: ql.Transport, V: torch.Tensor, layer: int) -> torch.Tensor:
    """Σ over the layer's modules of each feature's first-order term, feature by feature."""
    terms = transport.matrices["value", "first_order"]
    return torch.stack([terms[2 * layer] @ v + terms[2 * layer + 1] @ v for v in V])


def test_by_brute_force(model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary], tmp_path: Path) -> None:
    found = ql.subspace_channels(neurons, model, transport, rank=RANK, out=tmp_path / "c.parquet", progress=False)
    frame = found.pandas()
    pairs = [(j, k) for j in range(LAYERS) for k in range(j + 1, LAYERS)]
    assert len(frame) == 2 * len(pairs) * (len(pairs) + 1) // 2
    fitted = {}
    for j, k in pairs:
        V = neurons[j].values(slice(None))
        fitted[j, k] = by_regression(V, responses(model, transport, V, k), RANK)
    for row in frame.itertuples():
        a, b = (row.source_layer, row.target_layer), (row.other_source_layer, row.other_target_layer)
        maps = [fitted[a][0], fitted[b][0]]
        bases = [basis(m if row.space == "read" else m.T, RANK) for m in maps]
        assert abs(row.score - float((bases[0].T @ bases[1]).square().sum()) / RANK) < 1e-6
        assert abs(row.explained - fitted[a][1]) < 1e-8
        shared = {(True, True): "both", (True, False): "destination", (False, True): "source"}
        assert row.shares == shared.get((a[1] == b[1], a[0] == b[0]), "nothing")
    assert frame[frame.shares == "both"].score.sub(1).abs().max() < 1e-9


def test_fewer_features_than_dimensions(model: ql.Model, transport: ql.Transport) -> None:
    """Features that span a part of the stream: the map of least norm, which reads nothing outside their span."""
    V = torch.randn(7, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    J = transport.matrices["value", "first_order"].double().unflatten(0, (LAYERS, 2)).sum(1)[2]
    A, B = reduced_rank_map(J, V.T @ V / 7, 3)
    expected, _ = by_regression(V, V @ J.T, 3)
    assert torch.allclose(A @ B, expected, atol=1e-8)


def layer_jacobian(transport: ql.Transport, layer: int) -> torch.Tensor:
    return transport.matrices["value", "first_order"].double().unflatten(0, (LAYERS, 2)).sum(1)[layer]


def test_errors_on_held_out_features(model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary]) -> None:
    """The error columns, by regression on the same nine tenths of the features."""
    frame = ql.subspace_channels(neurons[:1], model, transport, rank=RANK, seed=3).pandas()
    own = frame[(frame.shares == "both") & (frame.space == "write")]
    V = neurons[0].values(slice(None))
    order = torch.randperm(len(V), generator=torch.Generator().manual_seed(3 + neurons[0].point("value")))
    held_out = order[: max(1, round(0.1 * len(V)))]
    seen = torch.ones(len(V), dtype=torch.bool)
    seen[held_out] = False
    for row in own.itertuples():
        R = responses(model, transport, V, row.target_layer)
        fitted, explained = by_regression(V[seen], R[seen], RANK)
        error = (V[~seen] @ fitted - R[~seen]).square().sum() / R[~seen].square().sum()
        cosine = torch.cosine_similarity(V[~seen] @ fitted, R[~seen], dim=1).mean()
        assert abs(row.train_error - (1 - explained)) < 1e-8
        assert abs(row.held_out_error - float(error)) < 1e-8
        assert abs(row.held_out_cosine - float(cosine)) < 1e-8


def test_gradient_descent_finds_no_better_map(transport: ql.Transport) -> None:
    """The closed form is at least as good as the paper's training (AdamW from A ~ N(0, 0.01²), B = 0)."""
    generator = torch.Generator().manual_seed(5)
    V = torch.randn(60, D_MODEL, dtype=torch.float64, generator=generator)
    J = layer_jacobian(transport, 2)
    A = (0.01 * torch.randn(D_MODEL, RANK, dtype=torch.float64, generator=generator)).requires_grad_()
    B = torch.zeros(RANK, D_MODEL, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0.0)
    trained = float("inf")
    for _ in range(1000):
        optimiser.zero_grad()
        error = (V @ A @ B - V @ J.T).square().sum()
        error.backward()
        optimiser.step()
        trained = error.item()
    A, B = reduced_rank_map(J, V.T @ V / len(V), RANK)
    best = float((V @ A @ B - V @ J.T).square().sum())
    assert best <= trained + 1e-9 and trained < 1.1 * best


def test_separation_and_rank_correlation(
    model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary]
) -> None:
    from scipy import stats

    every = [*neurons, ql.directions(torch.eye(D_MODEL, dtype=torch.float64), layer=0, point="resid_pre")]
    found = ql.subspace_channels(every, model, transport, rank=RANK)
    frame = found.pandas()
    pairs = frame[(frame.space == "write") & (frame.shares != "both")]
    test = ql.channel_test(found, n_permutations=2000)
    same = pairs[pairs.shares == "destination"].score
    other = pairs[pairs.shares != "destination"].score
    expected = stats.mannwhitneyu(same, other).statistic / (len(same) * len(other))
    assert test.auc == pytest.approx(expected)
    one_source = pairs[pairs.shares == "source"]
    distance = (one_source.target_layer - one_source.other_target_layer).abs()
    assert test.spearman == pytest.approx(stats.spearmanr(one_source.score, distance).statistic)
    assert 0 < test.spearman_p <= 1


def test_sweep(model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary]) -> None:
    swept = ql.channel_sweep([(neurons, model, transport)], [2, RANK], n_permutations=50).pandas()
    assert len(swept) == 2 * 2 * 2 and set(swept["rank"]) == {2, RANK}
    found = ql.subspace_channels(neurons, model, transport, rank=RANK)
    row = swept[(swept["rank"] == RANK) & (swept.space == "read") & (swept.shares == "source")].iloc[0]
    test = ql.channel_test(found, shares="source", space="read", n_permutations=50)
    assert (row.same, row.different, row.p_value, row.auc) == (test.same, test.different, test.p_value, test.auc)
    errors = swept.groupby("rank").train_error.first()
    assert errors[2] > errors[RANK]


def test_maps_of_fewer_dimensions(model: ql.Model, transport: ql.Transport) -> None:
    """Two features are read through the plane they span, whatever the rank; the rest would be rounding."""
    V = torch.randn(2, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    many = torch.randn(60, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    two, rest = ql.directions(V, layer=0), ql.directions(many, layer=1)
    frame = ql.subspace_channels([two, rest], model, transport, rank=6).pandas()
    assert list(frame[frame.shares == "both"].dimensions) == [2, 2, 6] * 2
    read = frame[frame.space == "read"].set_index(["map", "other_map"]).score
    assert abs(read[0, 1] - 1) < 1e-9 and (read <= 1 + 1e-9).all()
    maps = [V.T @ torch.linalg.pinv(V.T) @ layer_jacobian(transport, k).T for k in (1, 2)]
    planes = [basis(m.T, 2) for m in maps]
    write = frame[frame.space == "write"].set_index(["map", "other_map"]).score
    assert abs(write[0, 1] - float((planes[0].T @ planes[1]).square().sum()) / 2) < 1e-8
    test = ql.channel_test(
        ql.subspace_channels([two, rest], model, transport, rank=6), shares="source", n_permutations=9
    )
    assert test.random == pytest.approx((2 + 6 + 6) / 3 / D_MODEL)


def test_permutations(model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary]) -> None:
    found = ql.subspace_channels(neurons, model, transport, rank=RANK)
    maps = channel_maps(found, "write")
    assert maps.layers == [(0, 1), (0, 2), (1, 2)]
    for shares in ("destination", "source"):
        same_of = maps.same_destination if shares == "destination" else maps.same_source
        pairs = [(a, b) for a in range(3) for b in range(a + 1, 3)]
        same = [float(maps.overlaps[p]) for p in pairs if same_of[p]]
        different = [float(maps.overlaps[p]) for p in pairs if not same_of[p]]
        test = ql.channel_test(found, shares=shares, n_permutations=4000, seed=1)
        assert abs(test.same - sum(same) / len(same)) < 1e-12
        assert abs(test.different - sum(different) / len(different)) < 1e-12
        assert test.random == pytest.approx(RANK / D_MODEL)
        # One of three pairs is the same: permutations put each of the three there equally often.
        rank = sum(score >= same[0] - 1e-12 for score in (*same, *different))
        assert abs(test.p_value - rank / 3) < 0.05
        assert test == ql.channel_test(found, shares=shares, n_permutations=4000, seed=1)


def test_pictures(model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary], tmp_path: Path) -> None:
    found = ql.subspace_channels(neurons, model, transport)
    paths = draw_channels(found, tmp_path / "pictures", "write")
    names = ("overlaps", "groups", "distance")
    assert [path.name for path in paths] == [f"channels-write-{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


def test_overlaps_by_distance(model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary]) -> None:
    every = [*neurons, ql.directions(torch.eye(D_MODEL, dtype=torch.float64), layer=0, point="resid_pre")]
    found = ql.subspace_channels(every, model, transport, rank=RANK)
    frame = found.pandas()
    pairs = frame[(frame.space == "write") & (frame.shares == "source")]
    distance = (pairs.target_layer - pairs.other_target_layer).abs()
    mine = overlaps_by_distance(channel_maps(found, "write"))
    assert sorted(mine) == sorted(distance.unique()) == [1, 2]
    for d, values in mine.items():
        assert sorted(values.tolist()) == sorted(pairs[distance == d].score)
    single = ql.subspace_channels(neurons[1:], model, transport, rank=RANK)
    assert overlaps_by_distance(channel_maps(single, "write")) == {}


def test_mistakes(model: ql.Model, transport: ql.Transport, neurons: list[ql.Dictionary], sample: ql.Tokens) -> None:
    with pytest.raises(ValueError, match="no layer lies after"):
        ql.subspace_channels(neurons[-1:], model, transport)
    with pytest.raises(ValueError, match="rank is 25; expected 1 to d_model = 24"):
        ql.subspace_channels(neurons, model, transport, rank=25)
    with pytest.raises(ValueError, match="has one feature; expected at least 2"):
        ql.subspace_channels([ql.directions(torch.ones(1, D_MODEL), layer=0)], model, transport)
    with pytest.raises(ValueError, match="same point"):
        ql.subspace_channels([neurons[0], neurons[0]], model, transport)
    full = ql.fit_transport(model, sample, sides=("value",), orders=("full",), progress=False)
    with pytest.raises(ValueError, match="no first-order terms of the value side"):
        ql.subspace_channels(neurons, model, full)
    found = ql.subspace_channels(neurons, model, transport)
    with pytest.raises(ValueError, match="expected 'destination' or 'source'"):
        ql.channel_test(found, shares="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="space is 'both'; expected 'write' or 'read'"):
        ql.channel_test(found, space="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_permutations is -1"):
        ql.channel_test(found, n_permutations=-1)
    single = ql.subspace_channels(neurons[1:], model, transport)
    with pytest.raises(ValueError, match="no two of these 1 maps"):
        ql.channel_test(single)
    with pytest.raises(ValueError, match="expected one of subspace_channels"):
        ql.channel_test(ql.neighbours(neurons[0]))
    zeros = ql.directions(torch.zeros(3, D_MODEL, dtype=torch.float64), layer=0)
    with pytest.raises(ValueError, match="does not respond"):
        ql.subspace_channels([zeros], model, transport)
