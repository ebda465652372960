"""Row statistics from tiles against whole rows in float64."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from querylens_fast.topk.api import TopK, streamed_topk
from querylens_fast.topk.statistics import Moments, RowStatistics

FIELDS = ("mean", "variance", "skewness", "kurtosis", "logsumexp", "entropy")


def whole(scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definitions, on whole rows."""
    mean, variance = scores.mean(1), scores.var(1, correction=0)
    centred = scores - mean[:, None]
    p = scores.softmax(1)
    return {
        "mean": mean,
        "variance": variance,
        "skewness": (centred**3).mean(1) / variance**1.5,
        "kurtosis": (centred**4).mean(1) / variance**2 - 3,
        "logsumexp": scores.logsumexp(1),
        "entropy": -(p * scores.log_softmax(1)).sum(1),
    }


def check(found: RowStatistics, scores: torch.Tensor, tolerance: float) -> None:
    for name, expected in whole(scores).items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=tolerance, atol=tolerance, msg=lambda m: m)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(2, 200),
    st.lists(st.integers(1, 199), max_size=4),
    st.sampled_from([-1e4, 0.0, 300.0]),
    st.sampled_from([0.01, 1.0, 30.0]),
)
def test_tiles_of_any_width_give_whole_rows(n: int, V: int, cuts: list[int], mean: float, spread: float) -> None:
    scores = gaussian(n, V, seed=n + V).double() * spread + mean
    moments = Moments(n, torch.device("cpu"))
    edges = [0, *sorted({c for c in cuts if c < V}), V]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        moments.add_tile(scores[:, start:end], 0)
    check(moments.finish(), scores, 1e-7)


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float64, "exact", 1e-9),
        (torch.float32, "float32", 1e-5),
        (torch.float32, "exact", 1e-5),
        (torch.float32, "bf16", 0.1),
    ],
)
def test_statistics_of_a_product(dtype: torch.dtype, precision: str, tolerance: float) -> None:
    F, W = gaussian(300, 48, seed=1).to(dtype) / 7, gaussian(3000, 48, seed=2).to(dtype)
    bias, scale, offset = (
        gaussian(3000, seed=3).to(dtype),
        gaussian(3000, seed=4).abs().to(dtype),
        gaussian(300, seed=5),
    )
    edges = torch.linspace(-2, 2, 9)
    found = streamed_topk(F, W, 5, bias=bias, scale=scale, offset=offset, histogram=edges, precision=precision)
    S = oracle.scores(F, W, bias, scale, offset)
    assert found.statistics is not None and found.statistics.histogram is not None
    check(found.statistics, S, tolerance)
    counted = torch.stack([torch.from_numpy(np.histogram(row.numpy(), edges.numpy())[0]) for row in S])
    # A score that rounding takes across an edge changes two bins.
    assert (found.statistics.histogram - counted).abs().sum(1).max() <= (0 if dtype == torch.float64 else 60)
    assert found.statistics.histogram.sum() > 0.5 * S.numel()


def test_histogram_bins_are_numpys() -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 2.0, 3.0, -0.5, 3.5, math.nan]])
    moments = Moments(1, torch.device("cpu"), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    moments.add_tile(scores, 0)
    assert moments.finish().histogram.tolist() == [[1, 2, 2]]


def test_rows_without_a_spread_or_with_infinities_are_nan_and_no_other() -> None:
    scores = gaussian(4, 50, seed=6).double()
    scores[1], scores[2, 7] = 3.0, -math.inf
    moments = Moments(4, torch.device("cpu"))
    moments.add_tile(scores, 0)
    found = moments.finish()
    assert found.variance[1] == 0 and found.skewness[1].isnan() and found.kurtosis[1].isnan()
    assert found.entropy[1] == pytest.approx(math.log(50)) and found.mean[2].isnan()
    check(RowStatistics(*(x[[0, 3]] for x in found[:6]), None), scores[[0, 3]], 1e-9)


def test_top_rows_and_statistics_concatenate() -> None:
    F, W = gaussian(9, 8, seed=8), gaussian(40, 8, seed=9)
    whole_call = streamed_topk(F, W, 3, histogram=[-1.0, 0.0, 1.0])
    joined = TopK.concatenate([streamed_topk(F[i : i + 4], W, 3, histogram=[-1.0, 0.0, 1.0]) for i in (0, 4, 8)])
    assert torch.equal(joined.top_ids, whole_call.top_ids)
    torch.testing.assert_close(joined.statistics.entropy, whole_call.statistics.entropy, rtol=0, atol=1e-5)
    assert torch.equal(joined.statistics.histogram, whole_call.statistics.histogram)


def test_statistics_alone() -> None:
    F, W = gaussian(3, 8, seed=10), gaussian(40, 8, seed=11)
    found = streamed_topk(F, W, 1, top=False, bottom=False, statistics=True)
    assert found.top_ids is None and found.bottom_scores is None
    check(found.statistics, F.double() @ W.double().T, 1e-5)


@pytest.mark.parametrize("edges", [[1.0], [1.0, 1.0], [[0.0, 1.0]], [2.0, 1.0]])
def test_edges_that_do_not_ascend_are_refused(edges: list) -> None:
    with pytest.raises(ValueError, match="histogram is .*: expected two or more edges in ascending order"):
        streamed_topk(torch.zeros(1, 2), torch.zeros(3, 2), 1, histogram=edges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bins_between_each_rows_own_extremes(dtype: torch.dtype) -> None:
    """histogram=N counts as torch.histc does over the row's own range; counts add up to V."""
    generator = torch.Generator().manual_seed(3)
    F, W = torch.randn(30, 24, generator=generator).to(dtype), torch.randn(3001, 24, generator=generator).to(dtype)
    F[4] = 0
    found = streamed_topk(F, W, 3, histogram=50).statistics
    assert found is not None and found.histogram is not None and found.edges is not None
    assert found.histogram.shape == (30, 50) and found.edges.shape == (30, 51)
    assert bool((found.histogram.sum(1) == 3001).all())
    scores = F.float() @ W.float().T
    for i in (0, 7, 29):
        low, high = scores[i].min(), scores[i].max()
        assert torch.allclose(found.edges[i], torch.linspace(float(low), float(high), 51).double(), atol=1e-4)
        expected = torch.histc(scores[i], 50, float(low), float(high))
        assert (found.histogram[i] - expected).abs().sum() <= 4  # a score at an edge may fall on either side


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton"))])  # fmt: skip
def test_bins_of_scores_near_the_largest_numbers(backend: str) -> None:
    """A range that float32 cannot hold times the number of bins, and equal scores that a unit does not move."""
    F = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    W = torch.stack([torch.arange(101.0).sub(50).pow(3) * 1e33, torch.full((101,), 1e30)], 1)
    found = streamed_topk(F, W, 3, histogram=100, backend=backend).statistics
    assert found is not None and found.histogram is not None and found.edges is not None
    expected = np.histogram((F[:1] @ W.T).double().numpy(), found.edges[0].numpy())[0]
    assert abs(found.histogram[0].numpy() - expected).sum() <= 4  # a score at an edge may fall on either side
    assert int(found.histogram[1].max()) == 101 and found.edges[1, 0] < 1e30 < found.edges[1, -1]
