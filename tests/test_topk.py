"""streamed_topk and scores_at: order, ties, infinities, NaN, options, errors; every backend against float64."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys

import oracle
import pytest
import torch

from querylens_fast.topk import arguments, bf16_candidates, torch_backend
from querylens_fast.topk import triton_backend as fused
from querylens_fast.topk.api import TopK, scores_at, streamed_topk
from querylens_fast.topk.request import Epilogue, Request

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def integers(n: int, d: int, seed: int, low: int = -3, high: int = 4) -> torch.Tensor:
    """Small whole numbers: every product and sum is exact, and ties are everywhere."""
    return torch.randint(low, high, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def run(F, W, k, **options) -> TopK:
    moved = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    result = streamed_topk(F.to(DEVICE), W.to(DEVICE), k, **moved)
    return result.to("cpu")


def check_exact(result: TopK, S: torch.Tensor, k: int) -> None:
    """Ids and scores equal those of a stable sort (for scores that float32 holds exactly)."""
    for found, ids, largest in (
        (result.top_scores, result.top_ids, True),
        (result.bottom_scores, result.bottom_ids, False),
    ):
        if found is None:
            continue
        expected, order = oracle.topk(S, k, largest)
        assert torch.equal(ids, order)
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=0, equal_nan=True)


@each_backend
@pytest.mark.parametrize("k", [1, 2, 31, 256])
@pytest.mark.parametrize("options", ["", "b", "s", "o", "bso"])
def test_ties_and_options_are_exact(backend: str, k: int, options: str) -> None:
    F, W = integers(5, 7, 0), integers(700, 7, 1)
    bias, scale, offset = (integers(1, m, s)[0] for m, s in ((700, 2), (700, 3), (5, 4)))
    given = {n: v for n, v in (("bias", bias), ("scale", scale), ("offset", offset)) if n[0] in options}
    S = oracle.scores(F, W, given.get("bias"), given.get("scale"), given.get("offset"))
    check_exact(run(F, W, k, backend=backend, **given), S, k)


def adversarial(name: str, V: int) -> torch.Tensor:
    """One column of scores, [V]."""
    ramp = torch.arange(V).float()
    return {
        "ascending": ramp,
        "descending": -ramp,
        "equal": torch.full((V,), 3.0),
        "zero": torch.where(ramp % 2 == 0, 0.0, -0.0),
        "one group": torch.where((ramp < 256) & (ramp // 2 % 4 == 1), 1000 + ramp, -ramp % 7),
        "neighbours": torch.where((ramp > 300) & (ramp < 340), 1000 + ramp % 5, ramp % 3),
        "k-th tie": torch.where(ramp % 50 == 49, 5.0, ramp % 4),
    }[name]


@each_backend
@pytest.mark.parametrize("name", ["ascending", "descending", "equal", "zero", "one group", "neighbours", "k-th tie"])
def test_adversarial_rows(backend: str, name: str) -> None:
    W = adversarial(name, 1000)[:, None]
    F = torch.tensor([[1.0], [-1.0], [0.0], [2.0]])
    check_exact(run(F, W, 20, backend=backend), oracle.scores(F, W, None, None, None), 20)


@each_backend
def test_infinities_are_numbers_and_nan_comes_last(backend: str) -> None:
    F, W = integers(4, 3, 5), integers(300, 3, 6)
    bias = torch.zeros(300)
    bias[7:20], bias[30:33], bias[100:110] = -math.inf, math.inf, math.nan
    S = oracle.scores(F, W, bias, None, None)
    result = run(F, W, 25, backend=backend, bias=bias)
    check_exact(result, S, 25)
    assert result.top_ids[0, :3].tolist() == [30, 31, 32]
    assert not result.top_scores.isnan().any()


@each_backend
def test_nan_fills_up_when_numbers_run_out(backend: str) -> None:
    F, W = torch.ones(2, 1), torch.tensor([math.nan, 1.0, math.nan, 2.0, -math.inf])[:, None]
    result = run(F, W, 5, backend=backend)
    assert result.top_ids.tolist() == [[3, 1, 4, 0, 2]] * 2
    assert result.bottom_ids.tolist() == [[4, 1, 3, 0, 2]] * 2
    assert result.top_scores[:, 3:].isnan().all()


@each_backend
def test_nan_and_infinite_inputs_follow_ieee(backend: str) -> None:
    F, W = torch.tensor([[0.0, 1.0], [1.0, -1.0], [math.nan, 0.0]]), integers(120, 2, 7)
    W[3], W[5, 0], W[9, 1] = math.inf, -math.inf, math.nan
    check_exact(run(F, W, 6, backend=backend), oracle.scores(F, W, None, None, None), 6)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 37, 4), (9, 33, 1023, 64), (17, 65, 515, 8)])
def test_scores_against_float64(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel has no float64; asking for it is an error")
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies raw bits in a bfloat16 dot")
    n, d, V, k = shape
    F, W = gaussian(n, d, 8).to(dtype), gaussian(V, d, 9).to(dtype)
    S = oracle.scores(F, W, None, None, None)
    result = run(F, W, k, backend=backend)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 * math.sqrt(d)
    for found, ids, largest in (
        (result.top_scores, result.top_ids, True),
        (result.bottom_scores, result.bottom_ids, False),
    ):
        assert found is not None and ids is not None
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected, _ = oracle.topk(S, k, largest)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(S.gather(1, ids), expected, rtol=0, atol=tolerance)
        assert all(len(set(row)) == k for row in ids.tolist())


@each_backend
def test_one_side_only_and_no_rows(backend: str) -> None:
    F, W = integers(3, 4, 10), integers(90, 4, 11)
    both = run(F, W, 4, backend=backend)
    top, bottom = run(F, W, 4, backend=backend, bottom=False), run(F, W, 4, backend=backend, top=False)
    assert top.bottom_ids is None and top.bottom_scores is None and bottom.top_ids is None
    assert torch.equal(top.top_ids, both.top_ids) and torch.equal(bottom.bottom_ids, both.bottom_ids)
    assert run(F[:0], W, 4, backend=backend).top_ids.shape == (0, 4)


@each_backend
def test_views_and_gradients(backend: str) -> None:
    F, W = integers(4, 12, 12)[:, ::2].requires_grad_(), integers(6, 200, 13).T
    result = run(F, W, 5, backend=backend)
    check_exact(result, oracle.scores(F.detach(), W, None, None, None), 5)
    assert not result.top_scores.requires_grad


def test_float32_stays_float32_when_the_process_allows_less() -> None:
    F, W = gaussian(8, 300, 14), gaussian(400, 300, 15)
    expected = run(F, W, 5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(run(F, W, 5).top_scores, expected.top_scores)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@needs_triton
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32 kernel", "rounded operands"])
def test_kernel_proves_ordinary_rows(dtype: torch.dtype | None) -> None:
    F, W = gaussian(12, 64, 16).to(DEVICE), gaussian(4000, 64, 17).to(DEVICE)
    outcome = fused.topk(Request(F, W, 12), dtype)
    best, worst = torch_backend.topk(Request(F, W, 12))[:2]
    assert outcome.fallback_rows == 0 and outcome.widened_rows > 0
    assert torch.equal(outcome.top.ids, best.ids) and torch.equal(outcome.bottom.ids, worst.ids)


@pytest.mark.parametrize("options", ["", "b", "s", "o", "bso"])
def test_bfloat16_candidates_prove_ordinary_rows(options: str) -> None:
    # Runs on any processor; without bfloat16 products it is slow, not wrong.
    F, W = gaussian(16, 96, 18), gaussian(9000, 96, 19)
    given = {"b": gaussian(1, 9000, 20)[0], "s": gaussian(1, 9000, 21)[0].abs() + 0.5, "o": 9 * gaussian(1, 16, 22)[0]}
    epilogue = Epilogue(*(given[c] if c in options else None for c in "bso"))
    outcome = bf16_candidates.topk(Request(F, W, 10, epilogue))
    S = oracle.scores(F, W, *epilogue)
    assert outcome.fallback_rows == 0
    for side, largest in ((outcome.top, True), (outcome.bottom, False)):
        expected, order = oracle.topk(S, 10, largest)
        torch.testing.assert_close(side.scores.double(), expected, rtol=0, atol=1e-4)
        assert (side.ids == order).float().mean() > 0.99


def test_scores_at() -> None:
    F, W = integers(6, 5, 25), integers(80, 5, 26)
    bias, scale, offset = integers(1, 80, 27)[0], integers(1, 80, 28)[0], integers(1, 6, 29)[0]
    S = oracle.scores(F, W, bias, scale, offset)
    ids = torch.randint(0, 80, (6, 9), generator=torch.Generator().manual_seed(30))
    for given, expected in (
        (ids, S.gather(1, ids)),
        (ids[0], S[:, ids[0]]),
        (torch.arange(80).int(), S),
        (ids[:, :0], S[:, :0]),
    ):
        found = scores_at(F, W, given, bias=bias, scale=scale, offset=offset)
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), expected)


F2, W4 = torch.zeros(2, 3), torch.zeros(4, 3)
ERRORS = [
    ((F2, W4, 5), {}, "k is 5 but W has 4 rows"),
    ((F2, W4, 0), {}, "k is 0 but W has 4 rows"),
    ((F2, W4, 2.0), {}, "k is 2.0 but"),
    ((F2, W4[:0], 1), {}, "W has 0 rows"),
    ((F2, torch.zeros(4, 2), 1), {}, r"F is \[2, 3\] but W is \[4, 2\]: the last axes"),
    ((F2[0], W4, 1), {}, r"F is \[3\]: expected a tensor of two axes"),
    ((F2, [[1.0]], 1), {}, "W is list: expected a tensor"),
    ((F2.long(), W4, 1), {}, "F is torch.int64: expected a float dtype"),
    ((F2.long(), W4, 1), {}, "F is torch.int64"),
    ((F2, W4.to("meta"), 1), {}, "F is on cpu but W is on meta"),
    ((F2, W4, 1), {"bias": torch.zeros(2)}, r"bias is \[2\]: expected a tensor \[4\]"),
    ((F2, W4, 1), {"scale": 2.0}, r"scale is float: expected a tensor \[4\]"),
    ((F2, W4, 1), {"offset": torch.zeros(2, dtype=torch.int64)}, "offset is torch.int64"),
    ((F2, W4, 1), {"offset": torch.zeros(2, device="meta")}, "offset is on meta but F is on cpu"),
    ((F2, W4, 1), {"top": False, "bottom": False}, "top and bottom are both False"),
    ((F2, W4, 1), {"backend": "cuda"}, "backend is 'cuda': expected one of auto, torch, triton"),
    ((F2, W4, 1), {"block_rows": 0}, "block_rows is 0"),
]


@pytest.mark.parametrize(("arguments", "options", "message"), ERRORS, ids=[e[2][:24] for e in ERRORS])
def test_errors_say_what_to_do(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        streamed_topk(*arguments, **options)
    assert ";" in str(caught.value)


@needs_triton
def test_triton_backend_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="F is torch.float64"):
        arguments.choose_backend("triton", *[torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)] * 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="F is on cpu: expected a GPU"):
        streamed_topk(F2, W4, 1, backend="triton")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.int64), r"ids is \[3, 1\]: expected \[m\] or \[2, m\]"),
        (torch.zeros(2), "ids is torch.float32"),
        (torch.tensor([4]), "ids holds 4..4: expected 0..3"),
        (torch.tensor([-1]), "ids holds -1..-1"),
        ([0], "ids is list"),
    ],
)
def test_scores_at_errors(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores_at(F2, W4, ids)


def test_import_needs_only_torch() -> None:
    code = (
        "import sys, querylens_fast.topk.api\nassert 'triton' not in sys.modules or 'torch._inductor' in sys.modules; "
    )
    code += "assert 'csrc_triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the compiled kernel is what is tested")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(255, 507, 5000, 25), (130, 768, 50257, 25), (33, 2304, 30011, 256)])
def test_compiled_kernel(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    n, d, V, k = shape
    F, W = gaussian(n, d, 31).to(dtype), gaussian(V, d, 32).to(dtype)
    S = oracle.scores(F, W, None, None, None)
    result = run(F, W, k, backend="triton")
    for ids, largest in ((result.top_ids, True), (result.bottom_ids, False)):
        expected, _ = oracle.topk(S, k, largest)
        torch.testing.assert_close(S.gather(1, ids), expected, rtol=0, atol=1e-5 * d**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_negation_is_resolved(backend: str) -> None:
    F, W = integers(5, 6, 61), integers(300, 6, 62)
    result = run(torch._neg_view(-F), torch._neg_view(-W), 7, backend=backend)
    check_exact(result, oracle.scores(F, W, None, None, None), 7)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("n", [5, 200])
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype], n: int) -> None:
    F, W = integers(n, 6, 63).to(dtypes[0]), integers(2000, 6, 64).to(dtypes[1])
    result = run(F, W, 7, backend="torch")
    assert result.top_scores.dtype == torch.float32
    check_exact(result, oracle.scores(F.float(), W.float(), None, None, None), 7)
