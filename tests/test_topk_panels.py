"""Panels of the streamed top-k: limits that several of them set together, and the rows of W that each holds."""

import math

import oracle
import pytest
import torch
from torch import Tensor

from querylens_fast.topk import bf16_candidates, rescore, torch_backend
from querylens_fast.topk.api import streamed_topk
from querylens_fast.topk.narrow import NarrowProduct
from querylens_fast.topk.panel import Panel
from querylens_fast.topk.request import Request


def filled(scores: Tensor, k: int, **options: bool) -> Panel:
    rows, columns = scores.shape
    panel = Panel(rows, columns, k, scores.dtype, scores.device, (True,), **options)
    for t, columns_of in enumerate(panel.tiles):
        panel.tile(t).copy_(scores[:, columns_of])
        panel.add(t)
    return panel


def test_a_limit_is_set_by_all_panels_together() -> None:
    """Two of the three best scores are in each panel: either alone shows no better than the third of its own."""
    first, second = torch.zeros(1, 4096), torch.zeros(1, 4096)
    first[0, [100, 3000]], second[0, [5, 2500]] = 9.0, 7.0
    shown = filled(first, 3).search(True, None, None).shown
    found = filled(second, 3).search(True, shown, None)
    assert found.limit.tolist() == [7.0] and sorted(found.shown[0].tolist()) == [7.0, 9.0, 9.0]
    assert sorted(found.candidates.columns.tolist()) == [5, 2500]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("others", [0, 6])
def test_rows_of_one_sign_over_several_panels(sign: int, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one side fewer than k gains are positive, for which the raw order of bfloat16 does not do."""
    generator = torch.Generator().manual_seed(5)
    F, W = torch.rand(24, 12, generator=generator), sign * torch.rand(9000, 12, generator=generator)
    W[100 : 100 + 301 * others : 301] *= -1
    monkeypatch.setattr(torch_backend, "PANEL_BYTES", 1 << 17)
    found = streamed_topk(F, W, 9, precision="bf16", backend="torch", block_rows=24)
    S = oracle.scores(F, W, None, None, None)
    for ids, largest in ((found.top_ids, True), (found.bottom_ids, False)):
        assert ids is not None and bool((ids.sort(1).values.diff() > 0).all())
        torch.testing.assert_close(S.gather(1, ids), oracle.topk(S, 9, largest)[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("column", [3, 40000])
def test_a_nan_is_seen_wherever_it_is(column: int, descending: bool) -> None:
    scores = torch.randn(3, 50000, generator=torch.Generator().manual_seed(1)).bfloat16()
    scores[1, column] = math.nan
    panel = filled(scores, 2, descending=descending)
    assert panel.search(True, None, torch.zeros(len(panel.tiles), 3)).invalid.tolist() == [False, True, False]


def test_rows_of_very_different_length_come_longest_first() -> None:
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(3000, 16, generator=generator) * torch.randn(3000, 1, generator=generator).exp()
    product = NarrowProduct(Request(torch.ones(1, 16), W, 1), exact=True)
    assert product.descending and product.columns is not None
    assert bool((product.norms.diff() <= 0).all())
    lengths = torch.linalg.vector_norm(W, dim=1)[product.columns]
    assert torch.allclose(product.norms, lengths)


def test_candidates_of_bfloat16_rows_are_scored_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """W is widened a few rows at a time where the candidates of the bfloat16 pass are scored."""
    monkeypatch.setattr(rescore, "WIDENED_ELEMENTS", 48 * 700)
    generator = torch.Generator().manual_seed(3)
    F = torch.randn(40, 48, generator=generator)
    W = torch.randn(3000, 48, generator=generator).bfloat16()
    found = bf16_candidates.topk(Request(F, W, 9))
    assert found.top is not None and found.bottom is not None and found.fallback_rows == 0
    S = oracle.scores(F, W.float(), None, None, None)
    for side, largest in ((found.top, True), (found.bottom, False)):
        scores, ids = oracle.topk(S, 9, largest)
        assert torch.equal(side.ids, ids) and torch.allclose(side.scores.double(), scores.double(), atol=1e-5)
