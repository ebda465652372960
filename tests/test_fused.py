"""The Triton backend, by its interpreter where there is no GPU: both ways, every mode, and the pieces they share."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from querylens_fast.topk.api import streamed_topk
from querylens_fast.topk.torch_backend import Epilogue

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ("fused", "gemm")
NONE = Epilogue(None, None, None)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check(found: object, S: torch.Tensor, k: int, atol: float) -> None:
    for side, largest in (("top", True), ("bottom", False)):
        scores, ids = getattr(found, f"{side}_scores"), getattr(found, f"{side}_ids")
        expected, _ = oracle.topk(S, k, largest)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=atol)
        torch.testing.assert_close(S.gather(1, ids), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64, 1000, 7), (70, 40, 515, 25), (1, 7, 130, 130), (33, 128, 2049, 1)])
def test_both_ways_with_every_term(method: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    n, d, V, k = shape
    F, W = gaussian(n, d, seed=1).to(dtype), gaussian(V, d, seed=2).to(dtype)
    bias, scale, offset = gaussian(V, seed=3), gaussian(V, seed=4).abs() + 0.1, gaussian(n, seed=5)
    found = streamed_topk(F, W, k, bias=bias, scale=scale, offset=offset, backend="triton", method=method)
    check(found, oracle.scores(F, W, bias, scale, offset), k, 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("V", [256, 300, 700])
def test_statistics_far_below_what_they_are_taken_about(method: str, V: int) -> None:
    """A scale that is small where the product is large: the mean's estimate is far above every score."""
    large = torch.arange(V, device=DEVICE) % 2 == 0
    W = torch.zeros(V, 32, device=DEVICE)
    W[:, 0], scale, bias = 100.0 * large, 100.0 * ~large, gaussian(V, seed=V)
    F = torch.ones(3, 32, device=DEVICE)
    found = streamed_topk(F, W, 4, scale=scale, bias=bias, statistics=True, backend="triton", method=method)
    S = oracle.scores(F, W, bias, scale, None)
    assert found.statistics is not None
    torch.testing.assert_close(found.statistics.logsumexp.double(), S.logsumexp(1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("terms", [False, True])
def test_statistics_in_the_same_pass(method: str, terms: bool) -> None:
    n, d, V = 37, 64, 777
    F, W = gaussian(n, d, seed=6) / 8, gaussian(V, d, seed=7)
    vectors = {"bias": gaussian(V, seed=8), "scale": gaussian(V, seed=9).abs(), "offset": gaussian(n, seed=10)}
    vectors = vectors if terms else {}
    found = streamed_topk(F, W, 5, **vectors, statistics=True, backend="triton", method=method)
    S = oracle.scores(F, W, vectors.get("bias"), vectors.get("scale"), vectors.get("offset"))
    check(found, S, 5, 1e-4)
    stats, centred = found.statistics, S - S.mean(1, keepdim=True)
    assert stats is not None and stats.histogram is None
    p = S.softmax(1)
    for ours, expected in (
        (stats.mean, S.mean(1)),
        (stats.variance, S.var(1, correction=0)),
        (stats.skewness, (centred**3).mean(1) / S.var(1, correction=0) ** 1.5),
        (stats.kurtosis, (centred**4).mean(1) / S.var(1, correction=0) ** 2 - 3),
        (stats.logsumexp, S.logsumexp(1)),
        (stats.entropy, -(p * S.log_softmax(1)).sum(1)),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_extreme_scores_neither_overflow_nor_vanish() -> None:
    F, W = 30 * gaussian(6, 32, seed=11), gaussian(500, 32, seed=12)
    S = F.double() @ W.double().T
    assert S.max() > 200
    stats = streamed_topk(F, W, 3, statistics=True, backend="triton").statistics
    torch.testing.assert_close(stats.logsumexp, S.logsumexp(1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(stats.mean, S.mean(1), rtol=1e-4, atol=1e-3)


def test_histogram_goes_by_the_scores_in_memory() -> None:
    F, W = gaussian(9, 16, seed=13), gaussian(300, 16, seed=14)
    edges = [-20.0, -2.0, 0.0, 2.0, 20.0]
    found = streamed_topk(F, W, 3, histogram=edges, backend="triton")
    S = F.double() @ W.double().T
    counted = torch.stack([torch.histogram(row.cpu(), torch.tensor(edges).double()).hist for row in S])
    assert torch.equal(found.statistics.histogram.cpu().double(), counted)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_the_exact_answer_for_rounded_inputs(method: str) -> None:
    F, W = gaussian(12, 48, seed=15), gaussian(900, 48, seed=16)
    found = streamed_topk(F, W, 6, precision="bf16", backend="triton", method=method)
    check(found, F.bfloat16().double() @ W.bfloat16().double().T, 6, 1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="the compiled kernel multiplies bfloat16")
def test_interpreter_multiplies_bfloat16_only_when_patched() -> None:
    """Negative control of the patch: without it scores are wrong by far, and the fused kernel is refused."""
    from triton.runtime.interpreter import InterpreterBuilder

    from bench.interpreter import widen_bfloat16
    from csrc_triton.configs import Config
    from csrc_triton.topk import topk

    F, W = gaussian(5, 64, seed=15).bfloat16(), gaussian(300, 64, seed=16).bfloat16()
    best = (F.double() @ W.double().T).amax(1)

    def largest() -> torch.Tensor:
        keys = topk(F, W, config=Config(16, 128, 32, 4, 1)).top.amax((1, 2))
        return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32).double()

    patched = InterpreterBuilder.create_dot
    torch.testing.assert_close(largest(), best, rtol=1e-4, atol=1e-4)
    InterpreterBuilder.create_dot = patched.__closure__[0].cell_contents
    try:
        assert ((largest() - best).abs() > 1e3).all()
        with pytest.raises(ValueError, match="use method='gemm'"):
            streamed_topk(F, W, 1, backend="triton", method="fused")
    finally:
        InterpreterBuilder.create_dot = patched
    widen_bfloat16()
    assert InterpreterBuilder.create_dot is patched


@pytest.mark.skipif(DEVICE == "cuda", reason="permutes the interpreter's programs")
@pytest.mark.parametrize("method", METHODS)
def test_order_of_programs_changes_nothing(method: str) -> None:
    from bench.interpreter import shuffled_programs

    F, W = gaussian(40, 32, seed=17), gaussian(600, 32, seed=18)
    plain = streamed_topk(F, W, 7, backend="triton", method=method)
    with shuffled_programs(19):
        shuffled = streamed_topk(F, W, 7, backend="triton", method=method)
    for one, other in zip(plain.sides().values(), shuffled.sides().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["equal", "sorted", "one group", "nan", "infinite"])
def test_adversarial_rows_are_exact(method: str, kind: str) -> None:
    """Whole numbers, so that ids equal those of a stable sort."""
    generator = torch.Generator().manual_seed(17)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float().to(DEVICE)

    n, d, V, k = 20, 24, 1500, 33
    F, W, bias = integers(n, d), integers(V, d), integers(V)
    if kind == "equal":
        W[:] = W[:1].clone()
        bias[:] = 0
    if kind == "sorted":
        W[:] = (torch.arange(V, device=DEVICE) // 12)[:, None].float()
    if kind == "one group":
        W[:] = 0
        W[2:256:8] = 7
    if kind == "nan":
        bias[::3] = math.nan
        F[3] = math.nan
    if kind == "infinite":
        bias[5:40], bias[100:103] = -math.inf, math.inf
    S = oracle.scores(F, W, bias, None, None)
    found = streamed_topk(F, W, k, bias=bias, backend="triton", method=method)
    for side, largest in (("top", True), ("bottom", False)):
        expected, order = oracle.topk(S, k, largest)
        assert torch.equal(getattr(found, f"{side}_ids"), order)
        assert torch.equal(getattr(found, f"{side}_scores").double().nan_to_num(nan=99), expected.nan_to_num(nan=99))


@pytest.mark.parametrize("method", METHODS)
def test_winners_hidden_in_one_group_are_counted_and_found(method: str) -> None:
    """All of the ten best columns lie in one group, which shows only two of them."""
    F, W = gaussian(8, 32, seed=18), 0.01 * gaussian(2000, 32, seed=19)
    direction = torch.nn.functional.normalize(F.mean(0), dim=0)
    W[torch.arange(0, 80, 8, device=DEVICE)] = direction * torch.linspace(5, 6, 10, device=DEVICE)[:, None]
    S = F.double() @ W.double().T
    found = streamed_topk(F, W, 8, backend="triton", method=method)
    assert found.widened_rows > 0
    check(found, S, 8, 1e-4)


def test_operands_that_rounding_misleads_are_settled_in_float32() -> None:
    """A pass in float16 cannot tell 200 columns apart; the answer has to."""
    from querylens_fast.topk import triton_backend as fused

    F, W = gaussian(6, 64, seed=20), 0.01 * gaussian(3000, 64, seed=21)
    W[::15] = torch.nn.functional.normalize(F.sum(0), dim=0) + 1e-5 * gaussian(200, 64, seed=22)
    found = fused.topk(F, W, 9, NONE, top=True, bottom=False, dtype=torch.float16)
    S = F.double() @ W.double().T
    expected, _ = oracle.topk(S, 9, True)
    assert found.widened_rows > 0
    torch.testing.assert_close(found.top.scores.double(), expected, rtol=0, atol=2e-6)
    assert (S.gather(1, found.top.ids) >= expected - 2e-6).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter does not round to TF32; the bound is what is tested")
def test_bound_of_tf32_covers_its_rounding() -> None:
    from querylens_fast.topk.certify import ErrorBound

    F, W = gaussian(10, 50, seed=23), gaussian(300, 50, seed=24)

    def tf32(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    error = (F.double() @ W.double().T - tf32(F).double() @ tf32(W).double().T).abs().amax(1)
    bound = ErrorBound.of(W, NONE, torch.float32, tf32=True).rows(F, NONE)
    assert (error <= bound).all() and (bound < 100 * error).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.sampled_from([8, 16, 64]), st.booleans(), st.integers(0, 2**20))
def test_selection_keeps_the_best_and_bounds_the_rest(m: int, step: int, largest: bool, seed: int) -> None:
    """Random keys with many equals, in one part or in several."""
    from csrc_triton import select as module

    generator = torch.Generator().manual_seed(seed)
    groups = 24
    scores = torch.randint(-9, 10, (3, 2, groups), generator=generator).float()
    bits = scores.view(torch.int32)
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) & -16) | torch.randint(0, 16, bits.shape, generator=generator)
    before, module.MAX_KEYS = module.MAX_KEYS, 2 * step
    try:
        found = module.select(keys.int().to(DEVICE), m, 10**6, 16, largest=largest)
    finally:
        module.MAX_KEYS = before
    values = scores if largest else -scores
    for row in range(3):
        kept = {
            (int(group), bool(second))
            for group, second, column in zip(found.groups[row], found.second[row], found.columns[row], strict=True)
            if column < 10**6
        }
        assert len(kept) >= min(m, 2 * groups)
        others = [
            float(values[row, int(second), group])
            for group in range(groups)
            for second in (False, True)
            if (group, second) not in kept
        ]
        bound = float(found.left_out[row] if largest else -found.left_out[row])
        assert not others or max(others) <= bound + 1e-4 * abs(bound) + 1e-4
        # The best of all is kept, and with it as many as were asked for.
        assert max(float(values[row, int(second), group]) for group, second in kept) == float(values[row].max())


def test_rescored_candidates_are_exact_and_absent_ones_nan() -> None:
    from csrc_triton.rescore import rescore

    F, W = gaussian(5, 77, seed=25), gaussian(40, 77, seed=26)
    ids = torch.randint(0, 43, (5, 21), generator=torch.Generator().manual_seed(27)).to(DEVICE)
    bias, scale, offset = gaussian(40, seed=28), gaussian(40, seed=29), gaussian(5, seed=30)
    found = rescore(F, W, ids, bias=bias, scale=scale, offset=offset)
    S = oracle.scores(F, W, bias, scale, offset)
    assert torch.equal(found.isnan(), ids >= 40)
    expected = S.gather(1, ids.clamp(max=39)).masked_fill(ids >= 40, 0)
    torch.testing.assert_close(found.double().nan_to_num(), expected, rtol=1e-5, atol=1e-5)


def test_measured_choices_are_kept_in_a_file_and_used_on_request(tmp_path: Path) -> None:
    from csrc_triton import tune
    from csrc_triton.configs import target_of

    F, W = gaussian(16, 32, seed=31), gaussian(500, 32, seed=32)
    table = tune.Table()
    times = tune.measure(F, W, 5, table, repeat=1)
    assert len(times) >= 2 and all(t > 0 for t in times.values())
    table.save(tmp_path / "choices.json")
    again = tune.Table.load(tmp_path / "choices.json")
    assert again.measured == table.measured
    tune.use(again)
    try:
        chosen = tune.active().choose(target_of(F.device), torch.float32, 32, 500, 5)
        assert chosen == min(times, key=lambda choice: times[choice])
        check(streamed_topk(F, W, 5, backend="triton"), F.double() @ W.double().T, 5, 1e-4)
    finally:
        tune.use(None)
    (tmp_path / "choices.json").write_text('{"choices": [{"method": "magic"}]}')
    with pytest.raises(ValueError, match="is no table of choices"):
        tune.Table.load(tmp_path / "choices.json")


def test_method_is_the_triton_backends() -> None:
    with pytest.raises(ValueError, match="method is 'gemm' with backend 'torch'"):
        streamed_topk(torch.zeros(2, 3), torch.zeros(4, 3), 1, method="gemm", backend="torch")
    with pytest.raises(ValueError, match="method is 'magic'"):
        streamed_topk(torch.zeros(2, 3), torch.zeros(4, 3), 1, method="magic", backend="triton")
