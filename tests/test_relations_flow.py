"""Feature flow, chains and neighbours against brute force in float64; nothing of features × features is ever made."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import querylens_fast as ql
from querylens_fast.relations.flow import cosine_topk, feature_chains, feature_flow, neighbours, related, site

D = 12


def features(n: int, layer: int, seed: int, point: str = "resid_post") -> ql.Dictionary:
    matrix = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ql.directions(matrix, layer=layer, point=point, name=f"{point} {layer}")


def module(n: int, layer: int, seed: int, hook: str, point: int) -> ql.Dictionary:
    found = features(n, layer, seed)
    found.hook_name = found.hook_name_out = f"blocks.{layer}.{hook}"
    found.name, found.value_point = f"{hook} {layer}", point
    return found


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


def values(dictionary: ql.Dictionary) -> Tensor:
    return dictionary.values(slice(None))


@pytest.fixture(scope="module")
def stack() -> list[ql.Dictionary]:
    """Residual streams after layers 0, 1 and 3; attention and MLP of layer 1, MLP of layer 2."""
    return [
        features(20, 3, 1),
        features(17, 0, 2),
        features(19, 1, 3),
        module(13, 1, 4, "hook_mlp_out", 4),
        module(11, 1, 5, "hook_attn_out", 3),
        module(14, 2, 6, "hook_mlp_out", 6),
    ]


def test_neighbours_in_depth(stack: list[ql.Dictionary]) -> None:
    found = {(a.name, relation, b.name) for a, relation, b in related(stack)}
    assert found == {
        ("resid_post 0", "next residual", "resid_post 1"),
        ("resid_post 1", "previous residual", "resid_post 0"),
        ("resid_post 1", "attention", "hook_attn_out 1"),
        ("resid_post 1", "mlp", "hook_mlp_out 1"),
        ("resid_post 1", "next residual", "resid_post 3"),
        ("resid_post 3", "previous residual", "resid_post 1"),
        ("resid_post 3", "mlp", "hook_mlp_out 2"),
        ("hook_attn_out 1", "previous residual", "resid_post 0"),
        ("hook_attn_out 1", "next residual", "resid_post 1"),
        ("hook_mlp_out 1", "previous residual", "resid_post 0"),
        ("hook_mlp_out 1", "next residual", "resid_post 1"),
        ("hook_mlp_out 2", "previous residual", "resid_post 1"),
        ("hook_mlp_out 2", "next residual", "resid_post 3"),
    }


def test_transcoders_write_as_mlps(stack: list[ql.Dictionary]) -> None:
    """Of a plain file, which has no hook names, too."""
    vectors = torch.randn(9, 24)
    assert {site(d) for d in stack} == {"residual", "mlp", "attention"}
    plain = dataclasses.replace(ql.directions(vectors, layer=1), kind="transcoder", hook_name="", hook_name_out="")
    assert site(plain) == "mlp"


def test_no_matches_asked_for(stack: list[ql.Dictionary]) -> None:
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k is {k}; expected at least 1"):
            ql.feature_flow(stack, k=k)
        with pytest.raises(ValueError, match=f"k is {k}; expected at least 1"):
            ql.neighbours(stack[0], k=k)


def test_flow_by_brute_force(stack: list[ql.Dictionary], tmp_path: Path) -> None:
    found = feature_flow(stack, k=4, out=tmp_path / "flow.parquet", progress=False)
    frame = found.pandas()
    pairs = related(stack)
    assert len(frame) == sum(a.n_features * 4 for a, _, _ in pairs)
    for source, relation, target in pairs:
        expected = cosines(values(source), values(target)).topk(4)
        mine = frame[(frame.source == source.name) & (frame.target == target.name)]
        assert (mine.relation == relation).all() and (mine.side == "top").all()
        assert torch.allclose(torch.tensor(mine.score.to_numpy()).view(-1, 4), expected.values)
        assert torch.equal(torch.tensor(mine.target_id.to_numpy()).view(-1, 4), expected.indices)
    with pytest.raises(ValueError, match="expected two or more"):
        feature_flow(stack[:1])
    with pytest.raises(ValueError, match="none of these dictionaries follows another"):
        feature_flow([stack[3], stack[4]])


def test_neighbours_leave_the_feature_out(stack: list[ql.Dictionary]) -> None:
    scores = cosines(values(stack[0]), values(stack[0])).fill_diagonal_(-2)
    frame = neighbours(stack[0], k=3, features=range(2, 9)).pandas()
    assert torch.equal(torch.tensor(frame.target_id.to_numpy()).view(-1, 3), scores[2:9].topk(3).indices)
    close = neighbours(stack[0], k=19, threshold=0.4).pandas()
    assert len(close) == int((scores >= 0.4).sum()) > 0
    assert (close.score >= 0.4).all() and (close.source_id != close.target_id).all()
    keys = neighbours(stack[0], stack[2], k=50, side="key").pandas()
    assert len(keys) == 20 * 19


@pytest.mark.parametrize("length", [1e-40, 1e-30, 1e-19, 1.0, 1e19, 1e30])
def test_cosines_at_any_length(length: float) -> None:
    """Lengths whose squares are no float32 change no cosine."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(n, 16, generator=generator) for n in (5, 40))
    exact = torch.nn.functional.normalize(source.double()) @ torch.nn.functional.normalize(target.double()).T
    rows = (target.double() * length).float()
    for found in (cosine_topk(source, rows, 3), cosine_topk((source.double() * length).float(), target, 3)):
        error = (exact.gather(1, found.top_ids) - found.top_scores).abs().max()
        assert error < (1e-3 if length < 1e-38 else 1e-6)  # subnormal numbers have fewer digits
    mixed = torch.cat([rows, torch.zeros(1, 16)])
    assert cosine_topk(source, mixed, 41, bottom=True).top_scores.abs().max() < 1 + 1e-3


def test_many_copies_of_one_feature() -> None:
    """More equal rows than k: every feature still lists others only, lower ids first."""
    matrix = torch.ones(8, D, dtype=torch.float64)
    frame = neighbours(ql.directions(matrix, layer=0), k=2).pandas()
    for feature, group in frame.groupby("source_id"):
        assert list(group.target_id) == [i for i in range(8) if i != feature][:2]
    matrix[3] = 0
    frame = neighbours(ql.directions(matrix, layer=0), k=7).pandas()
    assert (frame[frame.source_id == 3].score == 0).all() and not frame.score.isna().any()


def brute_chains(scores: list[Tensor], threshold: float, mutual: bool) -> set[tuple[tuple[int, int], ...]]:
    """All chains as tuples of (depth, feature), by following each beginning."""
    follows: dict[tuple[int, int], tuple[int, int]] = {}
    for depth, s in enumerate(scores):
        for f in range(s.shape[0]):
            g = int(s[f].argmax())
            if s[f, g] >= threshold and (not mutual or int(s[:, g].argmax()) == f):
                follows[depth, f] = depth + 1, g
    nodes = {(d, f) for d, s in enumerate(scores) for f in range(s.shape[0])}
    nodes |= {(len(scores), g) for g in range(scores[-1].shape[1])}
    chains = set()
    for node in nodes - set(follows.values()):
        chain = [node]
        while chain[-1] in follows:
            chain.append(follows[chain[-1]])
        chains.add(tuple(chain))
    return chains


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
    mutual=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.1, 0.4]),
    min_length=st.integers(1, 3),
)
def test_chains_by_brute_force(sizes: list[int], seed: int, mutual: bool, threshold: float, min_length: int) -> None:
    dictionaries = [features(n, layer, seed + layer) for layer, n in enumerate(sizes)]
    scores = [cosines(values(a), values(b)) for a, b in zip(dictionaries, dictionaries[1:], strict=False)]
    expected = {c for c in brute_chains(scores, threshold, mutual) if len(c) >= min_length}
    found = feature_chains(dictionaries[::-1], threshold=threshold, mutual=mutual, min_length=min_length).pandas()
    chains = [tuple(zip(g.source_layer, g.source_id, strict=True)) for _, g in found.groupby("chain")]
    assert len(chains) == len(set(chains)) and set(chains) == expected
    lengths = [len(c) for c in chains]
    assert lengths == sorted(lengths, reverse=True)
    for row in found.itertuples():
        assert row.length == lengths[row.chain]
    later = found[found.step > 0]
    before = found.shift(1)[found.step > 0]
    for now, then in zip(later.itertuples(), before.itertuples(), strict=True):
        assert abs(now.score - scores[now.source_layer - 1][int(then.source_id), now.source_id]) < 1e-9
    assert found[found.step == 0].score.isna().all()


class Largest(TorchDispatchMode):
    """Records the size of the largest dense tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.bytes = max(self.bytes, tensor.nbytes)
        return made


def test_no_matrix_of_features_by_features(tmp_path: Path) -> None:
    n = 12_000
    matrix = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    one, two = ql.directions(matrix, layer=0, name="a"), ql.directions(matrix.flip(0), layer=1, name="b")
    with Largest() as largest:
        found = neighbours(one, k=4, out=tmp_path / "n.parquet", progress=False)
        chains = feature_chains([one, two], progress=False)
    assert 0 < largest.bytes <= 1 << 27 < 4 * n * n / 4
    assert len(found) == 4 * n
    assert len(chains) == 2 * n and chains.metadata["what"] == "feature chains"
