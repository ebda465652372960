"""The selection kernel by itself against a sort, on winners that hold anything: every candidate once, nothing else."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
SHAPES = ((4, 3, 32), (12, 12, 32), (100, 7, 64), (1572, 25, 128), (4096, 100, 512), (1572, 100, 256), (17000, 10, 64))
"""Groups, k and slots: sets of one, two and four, several loads, more chosen sets than are read at a time."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made_winners(kind: str, sides: int, n: int, G: int) -> torch.Tensor:
    """Best and second keys [sides, n, 2, G] int32; of the bottom side, as the kernels write them, smaller is better."""
    generator = torch.Generator().manual_seed(G)
    size = (sides, n, 2, G)
    if kind == "few values":
        units = torch.randint(-3, 3, size, generator=generator)
    elif kind == "neighbours":  # the best ones lie side by side, and a set's distance apart
        units = torch.randint(-1000, 1000, size, generator=generator)
        units[..., :9] += 5000
        units[..., :: max(4, G // 4)] += 5000
    else:
        units = torch.randint(-(2**21), 2**21, size, generator=generator)
    keys = (0x4B400000 + units) * 64 + torch.randint(0, 64, size, generator=generator)
    keys = (keys + 2**31) % 2**32 - 2**31
    first, second = keys.unbind(2)
    high, low = torch.maximum(first, second), torch.minimum(first, second)
    for side in range(sides):
        pair = (high[side], low[side]) if side == 0 else (low[side], high[side])
        keys[side] = torch.stack(pair, 1)
    return keys.int().to(DEVICE)


@pytest.mark.parametrize("kind", ["anything", "few values", "neighbours"])
@pytest.mark.parametrize(("G", "k", "slots"), SHAPES)
def test_candidates_are_all_winners_that_can_belong(kind: str, G: int, k: int, slots: int) -> None:
    from csrc_triton.job import Keys
    from csrc_triton.rows import Rows
    from csrc_triton.select import select

    n = 2
    winners = made_winners(kind, 2, n, G)
    ones = torch.ones(n, device=DEVICE)
    # Units a score and the pass's error in scores: 40 units of a key's 64 places each.
    found = select(winners, Rows(ones, ones, ones, ones, 40 * ones, None), k, slots, Keys())
    for row in range(n):
        for side in range(2):
            turned = winners[side, row].long() if side == 0 else ~winners[side, row].long()
            count, left_out = int(found.counts[row, side]), int(found.left_out[row, side])
            kth = int(turned[0].sort(descending=True).values[k - 1])
            needed = turned >= kth - 2 * 40 * 64
            if count > slots:
                # Too many for the slots: the caller has to learn so, and the best of the others.
                assert left_out >= kth - 2 * 40 * 64
                continue
            keys, groups = found.keys[row, side, :count].long(), found.groups[row, side, :count].long()
            assert len(set(groups.tolist())) == count
            assert torch.equal(turned[groups % 2, groups // 2], keys)
            taken = torch.zeros_like(needed)
            taken[groups % 2, groups // 2] = True
            assert bool((taken | ~needed).all())
            assert bool(taken.all()) or left_out == int(turned[~taken].max())
            # No more than the few that joined groups and the early end of the bisection add.
            lowest = int(turned[0].sort(descending=True).values[min(G, 2 * k + 4) - 1])
            assert kind == "neighbours" or bool((keys >= lowest - (2 * 40 + 4) * 64).all())


def test_a_row_without_a_bound_has_everything_for_candidates() -> None:
    from csrc_triton.job import Keys
    from csrc_triton.rows import Rows
    from csrc_triton.select import select

    winners, ones = made_winners("anything", 1, 2, 100), torch.ones(2, device=DEVICE)
    error = torch.tensor([torch.nan, torch.inf], device=DEVICE)
    found = select(winners, Rows(ones, ones, ones, ones, error, None), 5, 256, Keys(bottom=False))
    assert found.counts.tolist() == [[200], [200]]


def test_sets_beyond_the_slots_are_counted() -> None:
    """Each holds a candidate that has no slot: the caller has to learn that there are more, and how good they are."""
    from csrc_triton.job import Keys
    from csrc_triton.rows import Rows
    from csrc_triton.select import select

    best = ((0x4B400000 + 1000) * 64 + 2**31) % 2**32 - 2**31
    winners = torch.full((1, 2, 2, 100), best, dtype=torch.int64)
    winners[:, :, 1] -= 500 * 64
    ones = torch.ones(2, device=DEVICE)
    found = select(winners.int().to(DEVICE), Rows(ones, ones, ones, ones, ones, None), 20, 32, Keys(bottom=False))
    assert found.counts.tolist() == [[100], [100]] and found.left_out.tolist() == [[best], [best]]
