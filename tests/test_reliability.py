"""Standard errors: the jackknife against its definition and against refits. Stability: samples compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import D_MODEL, VOCAB
from torch import Tensor
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.cli import app
from querylens_fast.lens.presets import find_preset
from querylens_fast.lens.reliability import Jackknife, jackknife_se
from querylens_fast.transport.growth import jaccard

PRESETS = (
    *("query_lens_value", "query_lens_key", "query_lens_value_approx", "query_lens_key_approx"),
    "query_lens_value_adaptive",
)


@pytest.fixture(scope="module")
def grouped(gpt2: ql.Model, sample: ql.Tokens) -> ql.Transport:
    return ql.fit_transport(gpt2, sample, groups=5, energy="exact", progress=False)


def test_standard_error_of_a_mean() -> None:
    """Of a plain mean the jackknife gives s/√G over the group means; of unequal groups, the weighted spread."""
    values = torch.randn(8, 3, 5, dtype=torch.float64)
    n = torch.full((8,), 4.0)
    without = [(values.sum(0) - v) / 7 for v in values]
    expected = values.std(0) / 8**0.5
    assert torch.allclose(jackknife_se(values.mean(0), without, n), expected)
    sizes = torch.tensor([1.0, 2, 5, 4])
    means, total = values[:4], sizes.sum()
    whole = (means * sizes[:, None, None]).sum(0) / total
    without = [(whole * total - m * s) / (total - s) for m, s in zip(means, sizes, strict=True)]
    spread = sum((m - whole).square() * s / (total - s) for m, s in zip(means, sizes, strict=True)) / 4
    assert torch.allclose(jackknife_se(whole, without, sizes), spread.sqrt())


@pytest.mark.parametrize("preset", PRESETS)
def test_jackknife_is_what_fits_without_each_group_say(
    gpt2: ql.Model, sample: ql.Tokens, grouped: ql.Transport, preset: str
) -> None:
    """Every score and list under the leave-one-out readouts is that of a transport fitted on the other sequences."""
    dictionary, k, chosen = ql.neuron_dictionary(gpt2, 1), 6, torch.arange(12)
    lens = find_preset(preset)
    energy = "exact" if lens.stream_transition == "adaptive" else "none"
    found = ql.signatures(dictionary, gpt2, preset=preset, transport=grouped, k=k, features=chosen)
    jackknife = Jackknife(gpt2, grouped, lens, dictionary.point(lens.feature_vector))
    vectors = dictionary.vectors(lens.feature_vector, chosen)
    error, stable = jackknife(vectors, found.top_ids, found.top_scores)
    scores, stays = [], torch.ones_like(found.top_ids, dtype=torch.bool)
    for left_out in range(5):
        rest = torch.arange(5) != left_out
        tokens = ql.Tokens(sample.ids[rest], sample.valid_mask[rest])
        refit = ql.fit_transport(gpt2, tokens, energy=energy, progress=False)
        options = {"preset": preset, "transport": refit}
        scores.append(ql.scores_at(dictionary, gpt2, chosen, found.top_ids, **options))
        lists = ql.signatures(dictionary, gpt2, k=k, features=chosen, **options).top_ids
        stays &= (found.top_ids[:, :, None] == lists[:, None]).any(2)
    sizes = torch.tensor([float(n) for n in grouped.group_sizes])
    assert torch.allclose(error, jackknife_se(found.top_scores, scores, sizes), rtol=1e-6, atol=1e-9)
    assert found.top_se is not None and torch.equal(found.top_se, error.cpu())
    assert torch.equal(stable, stays.sum(1)) and 0 < int(stable.sum()) < stays.numel()


def test_jackknife_needs_groups_and_a_matrix(gpt2: ql.Model, sample: ql.Tokens, grouped: ql.Transport) -> None:
    plain = ql.fit_transport(gpt2, sample, progress=False)
    with pytest.raises(ValueError, match="fit it with groups=8"):
        Jackknife(gpt2, plain, find_preset("query_lens_value"), 2)
    with pytest.raises(ValueError, match="standard errors are of first_order, full and adaptive"):
        Jackknife(gpt2, grouped, find_preset("logit_lens_value"), 2)


def test_energies_of_groups_sum_up_and_are_kept_in_files(
    gpt2: ql.Model, sample: ql.Tokens, grouped: ql.Transport, tmp_path: Path
) -> None:
    pair = ("value", "full")
    assert torch.allclose(grouped.group_energies[pair].sum(0), grouped.energies[pair].mean(1), rtol=1e-9)
    probed = ql.fit_transport(gpt2, sample, groups=2, energy="probes", n_probes=11, progress=False)
    assert torch.allclose(probed.group_energies[pair].sum(0), probed.energies[pair].mean(1), rtol=1e-9)
    again = ql.load_transport(grouped.save(tmp_path / "t.safetensors"))
    assert torch.equal(again.group_energies[pair], grouped.group_energies[pair])
    with pytest.raises(ValueError, match="keeps no energies of groups"):
        ql.fit_transport(gpt2, sample, groups=2, progress=False).leave_one_out_energies(*pair, 2)
    earlier = replace(grouped, group_energies={})  # files of earlier versions: no standard errors, as ever
    options = {"preset": "query_lens_value_adaptive", "k": 3, "features": [0, 1]}
    assert ql.signatures(ql.neuron_dictionary(gpt2, 1), gpt2, transport=earlier, **options).top_se is None


def test_jaccard_of_lists() -> None:
    a, b = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[3, 2, 9], [4, 5, 6]])
    assert jaccard(a, b).tolist() == [0.5, 1.0]


def test_stability_is_the_overlap_of_separate_fits(gpt2: ql.Model) -> None:
    ids = torch.randint(3, VOCAB, (9, 6), generator=torch.Generator().manual_seed(0))
    dictionaries = [ql.neuron_dictionary(gpt2, layer) for layer in (0, 2)]
    found = ql.stability(gpt2, dictionaries, ids, seeds=3, features=10, k=4, progress=False)
    assert [(r.layer, r.preset) for r in found.rows] == [
        (0, "query_lens_key"), (0, "query_lens_value"), (2, "query_lens_key"), (2, "query_lens_value"),
    ]  # fmt: skip
    assert (found.samples, found.sequences, found.tokens) == (3, 3, 18)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(42))
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(42))[:10].sort().values

    def lists(group: int) -> Tensor:
        one = ql.fit_transport(gpt2, ids[order[_members(9, group)]], progress=False)
        return ql.signatures(dictionaries[1], gpt2, transport=one, k=4, features=chosen).top_ids

    first, second, third = map(lists, range(3))
    pairs = [jaccard(a, b).mean() for a, b in ((first, second), (first, third), (second, third))]
    assert found.rows[3].jaccard == pytest.approx(float(sum(pairs) / 3), abs=1e-12)
    assert found.mean("query_lens_value") == (found.rows[1].jaccard + found.rows[3].jaccard) / 2


def _members(n: int, group: int) -> list[int]:
    """Sequences of a group: batches of one, in turn."""
    return list(range(group * n // 3, (group + 1) * n // 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 1}, "seeds is 1"),
        ({"seeds": 8}, "5 sequences; expected at least 8"),
        ({"num_samples": 2}, "expected at least 6, for 3 samples of 2"),
        ({"presets": ["logit_lens_value"]}, "transition is full or first_order"),
        ({"features": 0}, "features is 0"),
        ({"k": 2.5}, "k is 2.5"),
    ],
)
def test_bad_arguments(gpt2: ql.Model, sample: ql.Tokens, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ql.stability(gpt2, ql.neuron_dictionary(gpt2, 0), sample, progress=False, **options)


def test_the_command_prints_and_writes(gpt2: ql.Model, gpt2_folder: Path, sample: ql.Tokens, tmp_path: Path) -> None:
    sample.save(tmp_path / "tokens.safetensors")
    weights = tmp_path / "directions.safetensors"
    save_file({"W_dec": torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(0))}, weights)
    out = tmp_path / "stability.json"
    given = [str(gpt2_folder), str(tmp_path / "tokens.safetensors"), str(weights)]
    options = ["--seeds", "2", "--k", "5", "--presets", "query_lens_value", "--layer", "1", "--out", str(out)]
    done = CliRunner().invoke(app, ["stability", *given, *options])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert f"{record['means']['query_lens_value']:.3f}" in done.output and record["samples"] == 2
    refused = CliRunner().invoke(app, ["stability", *given, "--seeds", "9", "--layer", "1"])
    assert refused.exit_code == 2 and "expected at least" in refused.output


def test_signatures_carry_the_errors(gpt2: ql.Model, sample: ql.Tokens, tmp_path: Path) -> None:
    """A transport with groups gives standard errors and counts of stable tokens, in memory, Parquet and JSONL."""
    transport = ql.fit_transport(gpt2, sample, groups=3, progress=False)
    dictionary = ql.directions(torch.randn(6, gpt2.d_model, dtype=torch.float64), layer=0)
    found = ql.signatures(dictionary, gpt2, transport=transport, k=4)
    assert found.top_se is not None and found.top_se.shape == (6, 4) and bool((found.top_se >= 0).all())
    vectors = dictionary.values(slice(None))
    expected = Jackknife(gpt2, transport, find_preset("query_lens_value"), 2)(vectors, found.top_ids, found.top_scores)
    assert torch.equal(found.top_se, expected.top_se) and torch.equal(found.stats["stable_k"], expected.stable_k)
    for name in ("errors.parquet", "errors.jsonl"):
        stored = ql.signatures(dictionary, gpt2, transport=transport, k=4, out=tmp_path / name, progress=False)
        assert torch.allclose(torch.tensor(stored.table()["top_se"].to_pylist()).double(), found.top_se.double())
    plain = ql.fit_transport(gpt2, sample, progress=False)
    assert ql.signatures(dictionary, gpt2, transport=plain, k=4).top_se is None


def test_the_transport_command_grows_its_sample(gpt2_folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCAB, (150, 8), generator=torch.Generator().manual_seed(1))
    ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool)).save(tmp_path / "tokens.safetensors")
    out = tmp_path / "t.safetensors"
    options = ["--until", "0.3", "--k", "5", "--groups", "4", "--out", str(out)]
    done = CliRunner().invoke(app, ["transport", str(gpt2_folder), str(tmp_path / "tokens.safetensors"), *options])
    assert done.exit_code == 0, done.output
    found, kept = ql.load_transport(out), ql.load_tokens(f"{out}.tokens.safetensors")
    assert found.n_groups == 4 and found.n_valid == kept.n_valid < ids.numel()
    assert found.metadata["tokens_digest"] == kept.digest and float(found.metadata["jaccard"]) >= 0.3
