"""The error bounds of the fast passes hold, at every magnitude, and the process's own settings break no result."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import querylens_fast as ql
from querylens_fast.topk import api as ops
from querylens_fast.topk import bf16_candidates, products, rescore
from querylens_fast.topk.narrow import NarrowProduct
from querylens_fast.topk.request import Epilogue, Request

EXPONENTS = st.sampled_from([-39, -30, -25, -21, -12, 0, 10])


def exact(F: torch.Tensor, W: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    wide = Epilogue(*(None if x is None else x.double() for x in epilogue))
    return wide.apply_(F.double() @ W.double().T, slice(None), slice(None))


def problem(
    seed: int, n: int, V: int, d: int, exponents: tuple[int, int], terms: int, cancelling: bool
) -> tuple[torch.Tensor, torch.Tensor, Epilogue]:
    generator = torch.Generator().manual_seed(seed)
    F = torch.randn(n, d, generator=generator) * 10.0 ** exponents[0]
    W = torch.randn(V, d, generator=generator) * 10.0 ** exponents[1]
    if cancelling and d > 1:
        # Sums far smaller than what is summed.
        F[:, d // 2 : 2 * (d // 2)] = F[:, : d // 2]
        W[:, d // 2 : 2 * (d // 2)] = -W[:, : d // 2]
    bias, scale = torch.randn(2, V, generator=generator)
    offset = 100 * torch.randn(n, generator=generator)
    return F, W, Epilogue(bias if terms & 1 else None, scale if terms & 2 else None, offset if terms & 4 else None)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 70),
    exponents=st.tuples(EXPONENTS, EXPONENTS),
    terms=st.integers(0, 7),
    cancelling=st.booleans(),
)
def test_the_narrow_product_stays_in_its_bound(
    seed: int, d: int, exponents: tuple[int, int], terms: int, cancelling: bool
) -> None:
    F, W, epilogue = problem(seed, 9, 40, d, exponents, terms, cancelling)
    product = NarrowProduct(Request(F, W, 1, epilogue), exact=True)
    product.start(slice(None))
    everything = slice(0, product.n_columns)
    seen = product._F.float() @ product._tile(everything).float().T
    columns = torch.arange(len(W)) if product.columns is None else product.columns
    bound = product.bound([everything]).rows(F, epilogue)[0]
    error = (seen.double() - exact(F, W, epilogue)[:, columns]).abs()
    assert bool((error <= bound[:, None].double()).all())


@pytest.mark.parametrize("exponents", [(-39, 10), (-30, 10), (10, -30), (0, -21), (-20, -20)])
@pytest.mark.parametrize("cancelling", [False, True])
def test_small_numbers_are_not_certified_wrongly(
    exponents: tuple[int, int], cancelling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bfloat16 pass, whether or not it pays here."""
    monkeypatch.setattr(bf16_candidates, "faster_in_bfloat16", lambda: True)
    F, W, _ = problem(3, 256, 3000, 24, exponents, 0, cancelling)
    found = ql.streamed_topk(F, W, 5)
    plain = ql.streamed_topk(F, W, 5, precision="float32")
    for side in ("top_scores", "bottom_scores"):
        ours, theirs = getattr(found, side), getattr(plain, side)
        size = F.norm(dim=1, keepdim=True).double() * float(W.double().norm(dim=1).max())
        assert bool(((ours - theirs).abs().double() <= 1e-5 * size + 1e-35).all())


def test_equal_rows_with_offsets_that_are_alike_in_half_precision() -> None:
    """Rows without proof are scored once for all that are alike; the offset counts in full."""
    F, offset = torch.zeros(4, 8, dtype=torch.float16), torch.tensor([1.0, 1.0001, 70000.0, 80000.0])
    found = bf16_candidates.topk(Request(F, torch.randn(300, 8).half(), 2, Epilogue(None, None, offset)))
    assert found.fallback_rows >= 4  # at least one side of each row
    for side in (found.top, found.bottom):
        assert side is not None and torch.equal(side.scores, offset[:, None].expand(-1, 2))
        assert side.ids.tolist() == [[0, 1]] * 4


def test_scores_at_given_twice_gather_a_bounded_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescore, "BLOCK_ELEMENTS", 250)
    F, W = torch.randn(50, 16), torch.randn(40, 16)
    ids = torch.randint(0, 40, (50, 30))
    gathered = []
    index = torch.Tensor.__getitem__

    def watched(self: torch.Tensor, at: object) -> torch.Tensor:
        found = index(self, at)
        gathered.append(found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "__getitem__", watched)
    found = ops.scores_at(F, W, ids)
    assert max(gathered) <= max(1000, F.numel(), ids.numel())
    assert torch.allclose(found, (F @ W.T).gather(1, ids), atol=1e-5)


def test_threads_are_set_within_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = ops._run
    monkeypatch.setattr(ops, "_run", lambda *given: seen.append(torch.get_num_threads()) or run(*given))
    before = torch.get_num_threads()
    ql.streamed_topk(torch.randn(3, 4), torch.randn(9, 4), 2, threads=1)
    assert seen == [1] and torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_terms_beyond_half_precision(dtype: torch.dtype) -> None:
    """precision="bf16" keeps its terms in float32, whatever F and W are."""
    F, W = torch.randn(5, 12).to(dtype), torch.randn(400, 12).to(dtype)
    offset, bias = torch.full((5,), 1e5), torch.full((400,), 3e5)
    found = ql.streamed_topk(F, W, 3, precision="bf16", backend="torch", offset=offset, bias=bias)
    assert found.top_scores is not None and bool(((found.top_scores - 4e5).abs() < 4e3).all())


SETTINGS = {
    "autocast": "guard = torch.autocast('cpu', dtype=torch.bfloat16)",
    "tf32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "mkldnn bf16": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "legacy": "torch.set_float32_matmul_precision('medium')",
    "default device": "torch.set_default_device('meta')",
}


@pytest.mark.parametrize("chosen", list(SETTINGS))
def test_what_the_process_has_chosen_changes_nothing(chosen: str) -> None:
    """Settings of torch that are global, each in a process of its own."""
    code = f"""
        import contextlib, torch
        from querylens_fast.topk import api as ops
        cpu, guard = torch.device("cpu"), contextlib.nullcontext()
        generator = torch.Generator(cpu).manual_seed(0)
        F, W = (torch.randn(n, 64, generator=generator, device=cpu) for n in (256, 5000))
        ids = torch.randint(0, 5000, (256, 7), generator=generator, device=cpu)
        offset, bias = F[:, 0].contiguous(), W[:, 0].contiguous()
        terms = dict(offset=offset, bias=bias, scale=bias.abs())
        exact = (F.double() @ W.double().T + offset[:, None].double()) * bias.abs().double() + bias.double()
        {SETTINGS[chosen]}
        with guard:
            for precision in ("exact", "float32", "bf16"):
                found = ops.streamed_topk(F, W, 5, precision=precision, **terms)
                tolerance = 0.5 if precision == "bf16" else 2e-4
                assert (found.top_scores.double() - exact.topk(5).values).abs().max() < tolerance, precision
            at = ops.scores_at(F, W, ids, **terms)
            assert (at.double() - exact.gather(1, ids)).abs().max() < 2e-4
            assert (ops.scores_at(F, W, ids[0], **terms).double() - exact[:, ids[0]]).abs().max() < 2e-4
    """
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="needs a torch with oneDNN")
def test_the_faster_float32_product_is_not_refused_for_its_rounding() -> None:
    assert products.onednn_is_float32()


def test_no_columns_of_d() -> None:
    offset = torch.tensor([2.0, -1.0])
    for precision in ("exact", "float32"):
        found = ql.streamed_topk(torch.randn(2, 0), torch.randn(9, 0), 3, precision=precision, offset=offset)
        assert torch.equal(found.top_scores, offset[:, None].expand(-1, 3))
        assert found.top_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
