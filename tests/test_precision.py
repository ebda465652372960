"""What each precision promises, what the certificate does where it must fail, and the bounds a caller may set."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from querylens_fast.topk import bf16_candidates, torch_backend
from querylens_fast.topk import buffers as workspace
from querylens_fast.topk.api import TopK, streamed_topk
from querylens_fast.topk.products import FasterLinear
from querylens_fast.topk.request import Request


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_exact(found: TopK, F: torch.Tensor, W: torch.Tensor, k: int, atol: float) -> None:
    """Scores, the true scores at the ids, and the order of both."""
    S = oracle.scores(F, W, None, None, None)
    for scores, ids, largest in (
        (found.top_scores, found.top_ids, True),
        (found.bottom_scores, found.bottom_ids, False),
    ):
        expected, _ = oracle.topk(S, k, largest)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=atol)
        torch.testing.assert_close(S.gather(1, ids), expected, rtol=0, atol=atol)
        assert ids.sort(1).values.diff(dim=1).min() > 0


def narrow_topk(F: torch.Tensor, W: torch.Tensor, k: int) -> tuple[TopK, int, int]:
    """The bfloat16 pass itself, whatever the processor; with its counts."""
    found = bf16_candidates.topk(Request(F, W, k))
    assert found.top is not None and found.bottom is not None
    return TopK(*found.top, *found.bottom), found.widened_rows, found.fallback_rows


@pytest.mark.parametrize("shape", [(40, 96, 9000, 10), (3, 7, 2000, 1), (20, 33, 4001, 60)])
def test_bf16_is_within_three_times_torchs_own_error(shape: tuple[int, int, int, int]) -> None:
    n, d, V, k = shape
    F, W = gaussian(n, d, seed=1), gaussian(V, d, seed=2)
    S = F.double() @ W.double().T
    theirs = ((F.bfloat16() @ W.bfloat16().T).double() - S).abs().amax()
    found = streamed_topk(F, W, k, precision="bf16")
    for scores, ids, largest in (
        (found.top_scores, found.top_ids, True),
        (found.bottom_scores, found.bottom_ids, False),
    ):
        expected, _ = oracle.topk(S, k, largest)
        assert (scores.double() - expected).abs().max() <= 3 * theirs + 1e-5
        assert (S.gather(1, ids) - expected).abs().max() <= 3 * theirs + 1e-5
        steps = scores.diff(dim=1)
        assert (steps <= 0).all() if largest else (steps >= 0).all()


def test_exact_and_float32_agree() -> None:
    F, W = gaussian(250, 64, seed=3), gaussian(6000, 64, seed=4)
    for precision in ("exact", "float32"):
        check_exact(streamed_topk(F, W, 12, precision=precision), F, W, 12, 5e-5)


def test_candidates_that_rounding_misleads_are_widened_and_exact() -> None:
    """300 columns whose scores differ by less than bfloat16 can tell: the first candidates cannot be proved."""
    F, W = gaussian(30, 64, seed=5), 0.1 * gaussian(6000, 64, seed=6)
    chosen = torch.randperm(6000, generator=torch.Generator().manual_seed(7))[:180]
    W[chosen] = 2 * torch.nn.functional.normalize(F.mean(0), dim=0) * F.norm() + 1e-3 * gaussian(180, 64, seed=8)
    found, widened, _ = narrow_topk(F, W, 20)
    assert widened > 0
    check_exact(found, F, W, 20, 2e-4)


def test_equal_columns_reach_the_float32_path_and_ties_go_to_the_lower_id() -> None:
    F = torch.randint(-3, 4, (40, 16), generator=torch.Generator().manual_seed(9)).float()
    W = torch.ones(5000, 16)
    found, widened, fallback = narrow_topk(F, W, 7)
    assert widened == 80 and fallback > 0
    assert (found.top_ids == torch.arange(7)).all() and (found.bottom_ids == torch.arange(7)).all()


def test_dead_features_are_scored_once() -> None:
    F, W = gaussian(100, 32, seed=10), gaussian(5000, 32, seed=11)
    F[10:90] = 0
    found, widened, fallback = narrow_topk(F, W, 5)
    assert widened >= 160 and fallback <= 4
    assert (found.top_ids[10:90] == torch.arange(5)).all()
    check_exact(found, F, W, 5, 1e-4)


def test_probes_are_not_all_dead_where_every_other_row_is() -> None:
    F, W = gaussian(600, 32, seed=10), gaussian(3000, 32, seed=11)
    F[::2] = 0
    found, widened, fallback = narrow_topk(F, W, 5)
    assert widened == 600 and fallback == 2
    check_exact(found, F, W, 5, 1e-4)


def test_rows_get_the_sharpest_limits_at_once_where_the_probes_need_them() -> None:
    """Columns of very different norm: the limits of a few large groups of columns leave too many candidates."""
    F, W = gaussian(520, 8, seed=12), gaussian(49152, 8, seed=13) * gaussian(49152, 1, seed=14).exp()
    _, widened, fallback = narrow_topk(F, W, 12)
    assert widened == 0 and fallback == 0


@pytest.mark.parametrize("factor", [1e3, float("inf"), float("nan")])
def test_a_few_outlying_columns_cost_no_row_its_proof(factor: float) -> None:
    F, W = gaussian(60, 48, seed=12), gaussian(6000, 48, seed=13)
    W[[5, 77, 5999]] *= factor
    found, _, fallback = narrow_topk(F, W, 9)
    assert fallback == 0 if factor == 1e3 else True
    S = oracle.scores(F, W, None, None, None)
    for ids, largest in ((found.top_ids, True), (found.bottom_ids, False)):
        expected, order = oracle.topk(S, 9, largest)
        same = (ids == order) | ((S.gather(1, ids) - expected).abs() < 1e-3)
        assert same.all()


@pytest.mark.parametrize("positive", [0, 3, 30, 6000])
def test_scores_of_either_sign(positive: int) -> None:
    """The top of rows with no, few and only positive scores: positive candidates are compared by their bits alone."""
    F, W = gaussian(60, 32, seed=21).abs(), -gaussian(6000, 32, seed=22).abs()
    W[:positive] *= -1
    F[7], F[8] = 0.0, float("nan")
    found, _, _ = narrow_topk(F, W, 12)
    keep = [i for i in range(60) if i != 8]
    sides = {name: side[keep] for name, side in found.sides().items()}
    check_exact(found._replace(**sides), F[keep], W, 12, 1e-4)
    assert torch.equal(found.top_ids[[7, 8]], torch.arange(12).expand(2, -1))
    assert found.top_scores[8].isnan().all() and (found.top_scores[7] == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 2**20), st.sampled_from(["ties", "prefix", "late"]))
def test_ties_across_the_kth_place(n_equal: int, k: int, seed: int, kind: str) -> None:
    """Whole numbers: many equals, within the first columns or far behind them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (3, 5000), generator=generator).float()
    if kind != "ties":
        scores[:] = -5
        start = 0 if kind == "prefix" else 4000
        scores[:, start : start + n_equal * 3 : 3] = 1
    for largest in (True, False):
        found = torch_backend.topk(Request(torch.eye(3), scores.T.contiguous(), k))[0 if largest else 1]
        expected, order = oracle.topk(scores.double(), k, largest)
        assert torch.equal(found.ids, order) and torch.equal(found.scores.double(), expected)


@pytest.mark.parametrize("gib", [0.002, 0.02])
def test_memory_bound_changes_no_result(gib: float) -> None:
    F, W = gaussian(220, 64, seed=14), gaussian(20000, 64, seed=15)
    bounded, free = streamed_topk(F, W, 6, max_memory_gib=gib), streamed_topk(F, W, 6)
    assert torch.equal(bounded.top_ids, free.top_ids) and torch.equal(bounded.bottom_ids, free.bottom_ids)
    torch.testing.assert_close(bounded.top_scores, free.top_scores)


def test_threads_are_set_for_the_call_alone() -> None:
    before = torch.get_num_threads()
    F, W = gaussian(4, 8, seed=16), gaussian(50, 8, seed=17)
    assert torch.equal(streamed_topk(F, W, 3, threads=1).top_ids, streamed_topk(F, W, 3).top_ids)
    assert torch.get_num_threads() == before


def test_workspace_is_reused_bounded_and_given_back() -> None:
    device = torch.device("cpu")
    first = workspace.take("a test", 1000, torch.float32, device)
    again = workspace.take("a test", 1500, torch.bfloat16, device)
    assert first.data_ptr() == again.data_ptr() and again.shape == (1500,)
    large = workspace.take("a test", workspace.LIMIT, torch.float32, device)
    assert large.data_ptr() != first.data_ptr()
    assert workspace.take("a test", 10, torch.float32, device).data_ptr() == first.data_ptr()
    workspace.release()
    assert not workspace._kept.buffers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "precision is 'half': expected one of exact, float32, bf16"),
        ({"max_memory_gib": 0.0}, "max_memory_gib is 0.0: expected at least 0.001"),
        ({"threads": 0}, "threads is 0: expected at least 1"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streamed_topk(torch.zeros(2, 3), torch.zeros(4, 3), 1, **options)


def test_bf16_of_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="'bf16' but F is torch.float64"):
        streamed_topk(torch.zeros(2, 3).double(), torch.zeros(4, 3).double(), 1, precision="bf16")


def test_faster_linear_is_linear() -> None:
    """The layers above a spliced dictionary run in it: weights of either layout, with and without bias and axes."""
    draw = torch.Generator().manual_seed(3)
    x, W, bias = (torch.randn(*shape, generator=draw) for shape in ((2, 7, 33), (50, 33), (50,)))
    for weight in (W, W.T.contiguous().T):
        for b in (bias, None):
            with torch.no_grad(), FasterLinear():
                found = torch.nn.functional.linear(x, weight, b)
            expected = torch.nn.functional.linear(x.double(), W.double(), None if b is None else b.double())
            assert found.shape == (2, 7, 50) and torch.allclose(found.double(), expected, atol=1e-5)
    with FasterLinear():
        assert torch.nn.functional.linear(x, W.clone().requires_grad_(), bias).requires_grad
