"""The Triton backend, by its interpreter where there is no GPU: both ways, every mode, and the pieces they share."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from querylens_fast.topk.api import streamed_topk
from querylens_fast.topk.request import Epilogue, Request

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ("fused", "gemm")


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
@pytest.mark.parametrize("shape", [(5, 64, 700, 7), (2, 40, 515, 2), (1, 7, 130, 30), (2, 128, 1025, 1)])
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
    if method == "fused":
        F, W = F.half(), W.half()
    found = streamed_topk(F, W, 4, scale=scale, bias=bias, statistics=True, backend="triton", method=method)
    S = oracle.scores(F, W, bias, scale, None)
    assert found.statistics is not None
    torch.testing.assert_close(found.statistics.logsumexp.double(), S.logsumexp(1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("terms", [False, True])
def test_statistics_in_the_same_pass(method: str, terms: bool) -> None:
    n, d, V = 7, 64, 777
    F, W = gaussian(n, d, seed=6) / 8, gaussian(V, d, seed=7)
    if method == "fused":
        F, W = F.half(), W.half()
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
    from csrc_triton.job import Job, Keys
    from csrc_triton.topk import topk

    F, W = gaussian(5, 64, seed=15).bfloat16(), gaussian(300, 64, seed=16).bfloat16()
    best = (F.double() @ W.double().T).amax(1)

    def largest() -> torch.Tensor:
        winners = torch.empty(1, 5, 2, 12, dtype=torch.int32)
        topk(F, W, Job(torch.full((5,), 1e4), winners, Keys(bottom=False)), Config(16, 128, 32, 4, 1))
        return (((winners.amax((0, 2, 3)) >> 6) & 0x7FFFFF) - 0x400000).double() / 1e4

    patched = InterpreterBuilder.create_dot
    torch.testing.assert_close(largest(), best, rtol=1e-4, atol=1e-3)
    InterpreterBuilder.create_dot = patched.__closure__[0].cell_contents
    try:
        assert (largest() - best).abs().max() > 10
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

    F, W = gaussian(5, 32, seed=17), gaussian(300, 32, seed=18)
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

    n, d, V, k = 4, 24, 520, 5
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
    found = fused.topk(Request(F, W, 9, bottom=False), torch.float16)
    S = F.double() @ W.double().T
    expected, _ = oracle.topk(S, 9, True)
    assert found.widened_rows > 0
    torch.testing.assert_close(found.top.scores.double(), expected, rtol=0, atol=2e-6)
    assert (S.gather(1, found.top.ids) >= expected - 2e-6).all()


def test_measured_choices_are_kept_in_a_file_and_used_on_request(tmp_path: Path) -> None:
    from csrc_triton import tune
    from csrc_triton.configs import target_of

    F, W = gaussian(6, 32, seed=31).half(), gaussian(500, 32, seed=32).half()
    table = tune.Table()
    times = tune.measure(F, W, 5, table, repeat=1)
    assert len(times) >= 2 and all(t > 0 for t in times.values())
    table.save(tmp_path / "choices.json")
    again = tune.Table.load(tmp_path / "choices.json")
    assert again.measured == table.measured
    tune.use(again)
    try:
        chosen = tune.active().choose(target_of(F.device), torch.float16, 32, 500, 5)
        assert chosen == min(times, key=lambda choice: times[choice])
        check(streamed_topk(F, W, 5, backend="triton"), F.double() @ W.double().T, 5, 1e-4)
    finally:
        tune.use(None)
    (tmp_path / "choices.json").write_text('{"choices": [{"method": "magic"}]}')
    with pytest.raises(ValueError, match="is no table of choices"):
        tune.Table.load(tmp_path / "choices.json")


@pytest.mark.parametrize(("splits", "parts", "V"), [(2, 1, 515), (1, 2, 256), (1, 2, 270), (2, 2, 256)])
def test_tiles_whose_winners_are_found_in_parts(splits: int, parts: int, V: int) -> None:
    """Eight groups a tile, or four found in two halves: the same answers, also where half a tile is empty."""
    from csrc_triton import tune
    from csrc_triton.configs import Choice, Config

    F, W, k = gaussian(2, 48, seed=1).half(), gaussian(V, 48, seed=2).half(), 12
    W[64:72] = F[0] * torch.linspace(0.5, 0.9, 8, device=DEVICE).half()[:, None]
    table = tune.Table()
    target = tune.target_of(F.device)
    tile = Config(32, 128, 16, 4, 1, splits=splits, parts=parts)
    table.measured[tune.Shape(target, str(F.dtype), 48, V, k)] = Choice("fused", tile)
    tune.use(table)
    try:
        check(streamed_topk(F, W, k, backend="triton"), oracle.scores(F, W, None, None, None), k, 1e-4)
    finally:
        tune.use(None)


def test_many_winners_split_wide_groups_alone() -> None:
    from csrc_triton.configs import SQUARE, WIDE

    assert WIDE.split(262_144, 100).group == 32 and WIDE.split(262_144, 32).group == 64
    assert SQUARE.split(262_144, 1000) == SQUARE
    assert WIDE.split(300, 100).groups(300) == 16 == 2 * WIDE.groups(300)


def test_method_is_the_triton_backends() -> None:
    with pytest.raises(ValueError, match="method is 'gemm' with backend 'torch'"):
        streamed_topk(torch.zeros(2, 3), torch.zeros(4, 3), 1, method="gemm", backend="torch")
    with pytest.raises(ValueError, match="method is 'magic'"):
        streamed_topk(torch.zeros(2, 3), torch.zeros(4, 3), 1, method="magic", backend="triton")


def launches_and_answers(rows: int, block_rows: int) -> tuple[int, int, int]:
    """Kernels and torch operations that a pass over some rows launches, and answers that it waits for.

    Returns:
        Launches and answers of the blocks, and answers of the whole call.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.interpreter import GridExecutor

    from querylens_fast.topk import triton_backend as fused

    class Count(TorchDispatchMode):
        launches = answers = 0
        kernel = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            views = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
            if not self.kernel:
                self.answers += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
                self.launches += not views and not name.startswith(("aten::empty", "aten::_local_scalar"))
            return func(*args, **(kwargs or {}))

    counts, run, blocks = Count(), GridExecutor.__call__, fused._Pass.blocks
    inside = []

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        counts.launches, counts.kernel = counts.launches + 1, True
        run(self, *args, **kwargs)
        counts.kernel = False

    def all_blocks(self: Any, *args: Any) -> Any:
        before = counts.launches, counts.answers
        found = blocks(self, *args)
        inside.append((counts.launches - before[0], counts.answers - before[1]))
        return found

    F, W = gaussian(rows, 32, seed=33).bfloat16(), gaussian(300, 32, seed=34).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(fused._Pass, "blocks", all_blocks)
        request = Request(F, W, 3, Epilogue(bias=gaussian(300, seed=35), offset=gaussian(rows, seed=36)))
        with counts:
            found = fused.topk(replace(request, block_rows=block_rows))
    assert found.widened_rows == 0 or len(inside) <= 2
    return inside[0][0], inside[0][1], counts.answers


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter launches")
def test_blocks_take_eight_launches_and_wait_for_nothing() -> None:
    """Nothing in the loop over blocks depends on an answer from the device, so that it can be captured as a graph."""
    one, three = launches_and_answers(2, 2), launches_and_answers(6, 2)
    assert three[0] - one[0] <= 2 * 8 and three[1] == one[1] == 0
    assert three[2] <= one[2] + 2


def test_operands_of_the_pass_fit_a_tma_descriptor() -> None:
    from csrc_triton.rows import Columns, rows_of

    F = gaussian(4, 64, seed=37).half()
    apart = {"whole": F, "half of the columns": F[:, :32], "misplaced": F[:, 1:33], "one row": F[:1].expand(4, 64)}
    for name, given_rows in apart.items():
        narrow = rows_of(given_rows, Columns(1.0, 0.0, 0, 1.0, 0.0)).narrow
        assert narrow.stride(0) >= narrow.shape[1] and narrow.stride(0) % 16 == narrow.data_ptr() % 16 == 0, name
        assert torch.equal(narrow, given_rows), name


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([-39, -25, -21, -12, 0, 10]),
    st.sampled_from([-39, -25, -21, -12, 0, 10]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 7),
    st.integers(0, 2**20),
)
@example(-39, 10, torch.bfloat16, 0, 0).via("subnormal rows were taken for zeros")
@example(-39, 10, torch.float32, 2, 0)
def test_the_scaled_pass_stays_in_its_bound(f: int, w: int, dtype: torch.dtype, terms: int, seed: int) -> None:
    """Scores of rounded operands against those in float32, at every magnitude, for sums that cancel too."""
    from csrc_triton.columns import prepare
    from csrc_triton.rows import rows_of

    F, W = gaussian(3, 20, seed=seed) * 10.0**f, gaussian(50, 20, seed=seed + 1) * 10.0**w
    F[:, 10:], W[:, 10:] = F[:, :10], -W[:, :10]
    W[:, :3] *= 1.5
    F, W = F.to(dtype).to(DEVICE), W.to(dtype).to(DEVICE)
    bias, scale = (gaussian(50, seed=seed + i) if terms & i else None for i in (1, 2))
    offset = 100 * gaussian(3, seed=seed + 4) if terms & 4 else torch.zeros(3, device=DEVICE)
    scaled = dtype == torch.float32
    columns = prepare(W, torch.float16 if scaled else dtype, bias, scale, scaled=scaled, terms=True)
    assert columns is not None and columns.scale is not None and columns.bias is not None
    rows = rows_of(F, columns.bounds, scaled=scaled, offset=offset)
    dots = (rows.narrow[:, :20].float() @ columns.W[:, :20].float().T) * rows.factor[:, None]
    passed = (dots + offset[:, None]) * columns.scale + columns.bias
    exact = Epilogue(bias, scale, offset).apply_(F.float() @ W.float().T, slice(None), slice(None))
    if columns.apart is not None:
        passed[:, columns.apart.long()] = exact[:, columns.apart.long()] = 0
    off = (passed.double() - exact.double()).abs().amax(1)
    assert (off <= rows.error).all() or not exact.isfinite().all()
    known = rows.error.isfinite()
    assert ((passed * rows.per_score[:, None]).abs().amax(1)[known] < 2.0**22).all()
