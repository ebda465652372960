"""Groups of sequences are fits of their own; a sample grows until the top tokens stay."""

from pathlib import Path

import pytest
import torch
from tiny_models import LAYERS, VOCAB
from torch import Tensor

import querylens_fast as ql
from querylens_fast.transport.fit import plan_batches
from querylens_fast.transport.growth import middle, sequences_needed, top_tokens
from querylens_fast.transport.jacobians import Budget

POINTS = 2 * LAYERS + 1


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("rows", [64, 1])
def test_groups_are_fits_of_their_own(gpt2: ql.Model, sample: ql.Tokens, rows: int, tmp_path: Path) -> None:
    """Padding included: a group alone, the fit without it, and the whole are fits of just those sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "plan", lambda *_: Budget(rows, 9))
        grouped = ql.fit_transport(gpt2, sample, groups=2, progress=False)
        batched = plan_batches(5, rows, 2, 1)
    members = torch.zeros(5, dtype=torch.bool)
    for batch in batched[::2]:
        members[batch] = True

    def fit_on(chosen: Tensor) -> ql.Transport:
        return ql.fit_transport(gpt2, ql.Tokens(sample.ids[chosen], sample.valid_mask[chosen]), progress=False)

    whole, first, second = ql.fit_transport(gpt2, sample, progress=False), fit_on(members), fit_on(~members)
    assert grouped.group_sizes == [first.n_valid, second.n_valid] and whole.n_groups == 1
    again = ql.load_transport(grouped.save(tmp_path / "t.safetensors"))
    for found in (grouped, again):
        for side, order in whole.matrices:
            for point in (0, 3, POINTS - 1):
                key = side, order, point
                assert relative(found.matrix(*key), whole.matrix(*key)) < 1e-12
                assert relative(found.group(0).matrix(*key), first.matrix(*key)) < 1e-12
                for one, without in zip((second, first), found.leave_one_out(*key), strict=True):
                    assert relative(without, one.matrix(*key)) < 1e-12
        centres = found.leave_one_out_centres()
        assert relative(centres[0], second.centre) < 1e-12 and relative(found.group(1).centre, second.centre) < 1e-12
    assert torch.equal(again.matrices["key", "full"], grouped.matrices["key", "full"])


@pytest.mark.parametrize("n", [1, 2, 5, 40, 100])
@pytest.mark.parametrize(("rows", "groups", "processes"), [(8, 1, 1), (8, 8, 1), (8, 2, 3), (1, 3, 2)])
def test_batches_cover_the_sample_in_rounds_of_the_groups(n: int, rows: int, groups: int, processes: int) -> None:
    found = plan_batches(n, rows, groups, processes)
    lengths = [s.stop - s.start for s in found]
    assert [s.start for s in found] == [sum(lengths[:i]) for i in range(len(found))] and sum(lengths) == n
    assert 1 <= min(lengths) and max(lengths) <= rows and max(lengths) - min(lengths) <= 1
    assert len(found) >= min(n, groups, processes) and (len(found) % groups == 0 or len(found) == n)


def test_the_sample_grows_until_top_tokens_stay(gpt2: ql.Model, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(3, VOCAB, (48, 7), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "plan", lambda *_: Budget(4, 24))
        grown = ql.fit_transport(gpt2, ids, until=0.5, k=5, progress=False)
        with caplog.at_level("WARNING"):
            short = ql.fit_transport(gpt2, ids, until=0.999, k=25, groups=4, orders=("full",), progress=False)
    n = int(grown.metadata["n_sequences"])
    assert 8 <= n < 48 and float(grown.metadata["jaccard"]) >= 0.5 and "sequences_needed" not in grown.metadata
    assert grown.groups == {} and grown.n_valid == 7 * n
    same = ql.fit_transport(gpt2, ids[:n], progress=False)
    for pair, matrices in same.matrices.items():
        assert relative(grown.matrices[pair], matrices) < 1e-12
    assert short.metadata["n_sequences"] == "48" and short.n_groups == 4
    assert int(short.metadata["sequences_needed"]) > 48
    assert f"about {short.metadata['sequences_needed']} sequences would be needed" in caplog.text


def test_what_until_compares_is_what_signatures_read_out(gpt2: ql.Model, sample: ql.Tokens) -> None:
    transport = ql.fit_transport(gpt2, sample, orders=("full",), progress=False)
    dictionary = ql.neuron_dictionary(gpt2, 1)
    for side in ("value", "key"):
        moved = transport.apply(dictionary.vectors(side, torch.arange(9)), side, "full", dictionary.point(side))
        found = top_tokens(gpt2, moved, side, transport.centre, 6)
        preset = f"query_lens_{side}"
        expected = ql.signatures(dictionary, gpt2, preset=preset, transport=transport, k=6, features=slice(0, 9))
        assert torch.equal(found, expected.top_ids)


def test_extrapolation_follows_the_square_root() -> None:
    assert sequences_needed(100, 0.85, 0.85) == 100
    overlap = 2 * 0.6 / 1.6  # four times the sequences halve what is exchanged
    target = (1 + overlap) / 2
    assert sequences_needed(100, 0.6, target / (2 - target)) == 400


def test_middle_lies_between_the_steps_of_the_median() -> None:
    assert middle(torch.full((9,), 0.7)) == pytest.approx(0.7)
    assert 0.7 < middle(torch.tensor([0.1, 0.7, 0.7, 0.7, 0.8, 0.8, 0.8, 1.0])) < 0.8


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 0},
        {"groups": 6},
        {"groups": 2.0},
        {"until": 1.0},
        {"until": 0.8, "groups": 3},
        {"until": 0.8, "k": 0},
    ],
)
def test_bad_groups_and_targets(gpt2: ql.Model, sample: ql.Tokens, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]} is"):
        ql.fit_transport(gpt2, sample, progress=False, **wrong)
