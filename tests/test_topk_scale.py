"""Ten thousand rows and more over random shapes, dtypes, terms and kinds of rows, each equal to a stable sort.

Inputs are whole numbers of up to ten bits with some 64 products in a sum: exact in float32, rounded by bfloat16.
"""

from __future__ import annotations

import importlib.util
import math
import random

import pytest
import torch

from querylens_fast.topk import bf16_candidates
from querylens_fast.topk.api import streamed_topk

pytestmark = pytest.mark.slow
KINDS = ("gaussian", "sorted", "equal", "dead", "heavy-tailed", "outlier", "one-signed", "infinite terms")
ROWS = 700


def problem(seed: int, kind: str, n: int, V: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    d = choose.randint(1, 64)

    def whole(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 100).round().clamp(-360, 360)

    F, W = whole(n, d), whole(V, d)
    match kind:
        case "sorted":
            W = (torch.linspace(0, 360, V)[:, None] * torch.ones(d)).round()
        case "equal":
            W = W[:1].repeat(V, 1)
        case "dead":
            F[torch.rand(n, generator=generator) < 0.7] = 0
        case "heavy-tailed":
            W = (W * (torch.randn(V, 1, generator=generator) - 2).exp()).round().clamp(-360, 360)
        case "outlier":
            W, F = (W / 100).round(), (F / 10).round()
            W[choose.randrange(V)] *= 300
        case "one-signed":
            F, W = F.abs(), -W.abs()
    terms = {}
    if kind in ("gaussian", "infinite terms"):
        terms = {"bias": whole(V), "offset": whole(n)}
    if kind == "infinite terms":
        terms["bias"][torch.rand(V, generator=generator) < 0.01] = -math.inf
        terms["bias"][choose.randrange(V)] = math.inf
    return F, W, terms


def check(F: torch.Tensor, W: torch.Tensor, k: int, terms: dict[str, torch.Tensor], **options: str) -> None:
    found = streamed_topk(F, W, k, **terms, **options)
    S = F.double() @ W.double().T
    S = S + terms.get("offset", torch.zeros(len(F)))[:, None] + terms.get("bias", torch.zeros(len(W)))
    S = S.float() + 0.0
    for scores, ids, largest in (
        (found.top_scores, found.top_ids, True),
        (found.bottom_scores, found.bottom_ids, False),
    ):
        order = S.sort(dim=1, descending=largest, stable=True).indices[:, :k]
        assert torch.equal(ids, order)
        assert torch.equal(scores, S.gather(1, order))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_and_plain_pass(seed: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_candidates, "faster_in_bfloat16", lambda: True)
    choose = random.Random(100 * seed + KINDS.index(kind))
    V, k = choose.randint(4000, 30000), choose.choice([1, 7, 25, 100])
    F, W, terms = problem(choose.randrange(10**6), kind, ROWS, V)
    check(F, W, k, terms)
    check(F[:200], W, k, {n: v[:200] if n == "offset" else v for n, v in terms.items()}, precision="float32")
    # What bfloat16 keeps of the inputs, which are then scored as they are.
    narrow_F, narrow_W = F.bfloat16(), W.bfloat16()
    check(narrow_F, narrow_W, k, terms)
    check(F, narrow_W, k, {})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels(kind: str) -> None:
    F, W, terms = problem(KINDS.index(kind), kind, 33, 700)
    check(F, W, 12, terms, backend="triton")
