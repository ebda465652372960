"""Where paper, reference code and this package differ: a test for each line of docs/reference-users.md."""

import re
from pathlib import Path

import torch
from tiny_models import D_MODEL, LAYERS, VOCAB
from torch import Tensor

import querylens_fast as ql
from querylens_fast.analysis import common
from querylens_fast.transport.jacobians import linearise
from querylens_fast.transport.per_feature import walk_features

K = 5
ROOT = Path(__file__).parent.parent


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-8, atol=1e-10)


def test_every_test_named_in_the_page_exists() -> None:
    page = (ROOT / "docs" / "reference-users.md").read_text()
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    names = re.findall(r"`(test_\w+)`", page)
    assert len(names) > 20
    for name in names:
        assert any(f"def {name}(" in text for text in sources.values()), name
    for file in re.findall(r"`tests/(test_\w+\.py)`", page):
        assert file in sources


def test_centring_vector(gpt2: ql.Model, sample: ql.Tokens) -> None:
    keys = ql.neuron_dictionary(gpt2, 1)
    for transition, options, rows in (
        ("identity", {}, torch.arange(VOCAB)),
        ("full", {"tokens": sample}, sample.ids[sample.valid_mask]),
    ):
        preset = ("key", transition, "embed_cosine_centered")
        found = ql.signatures(keys, gpt2, preset=preset, k=K, features=[3], vectors=True, **options)
        table = gpt2.W_E - gpt2.W_E[rows].mean(0)
        scores = found.vectors @ (table / table.norm(dim=1, keepdim=True)).T
        assert close(found.top_scores, scores.topk(K).values)


def test_final_norm_is_a_function(gpt2: ql.Model, sample: ql.Tokens) -> None:
    found = ql.signatures(ql.neuron_dictionary(gpt2, 1), gpt2, tokens=sample, k=K, features=[3, 4], vectors=True)
    logits = gpt2.source.lm_head(gpt2.source.transformer.ln_f(found.vectors))
    assert close(found.top_scores, logits.topk(K).values)
    assert gpt2.source.transformer.ln_f.bias.abs().max() > 0.1


def test_cosine_is_not_divided_by_the_vector(gpt2: ql.Model) -> None:
    vector = torch.randn(D_MODEL, dtype=torch.float64)
    one, three = (common.apply_embed_cosine_centered(gpt2, c * vector) for c in (1, 3))
    assert close(three, 3 * one)


def test_residuals_ignore_padding_jacobians_do_not(gpt2: ql.Model, sample: ql.Tokens) -> None:
    row = slice(3, 4)  # padding in mid-row
    assert not sample.valid_mask[row].all()
    lin = linearise(gpt2, sample, row)
    pre, mid, _ = gpt2.residuals(sample.ids[row])
    first = gpt2.blocks[1].attention
    masked = first.linearise(pre[1], gpt2.masking(sample.ids[row], sample.valid_mask[row]))
    t = torch.randn(2, *pre[1].shape, dtype=torch.float64)
    assert close(lin.apply(2, t, "forward"), masked.jvp(t))
    assert not close(lin.apply(2, t, "forward"), first.linearise(pre[1], gpt2.masking(sample.ids[row])).jvp(t))
    assert close(lin.apply(3, t, "forward"), gpt2.blocks[1].mlp.linearise(mid[1]).jvp(t))


def test_first_order_keys_enter_at_padded_queries(gpt2: ql.Model, sample: ql.Tokens) -> None:
    key = torch.randn(D_MODEL, dtype=torch.float64)
    expected, masked = torch.zeros(D_MODEL).double(), torch.zeros(D_MODEL).double()
    for row in range(len(sample.ids)):
        lin = linearise(gpt2, sample, slice(row, row + 1))
        everywhere = lin.everywhere(key[None])
        for total, start in ((expected, everywhere), (masked, everywhere * lin.mask)):
            total += ((lin.apply(0, start, "backward") + everywhere) * lin.mask).sum((0, 1, 2))
    found = walk_features(gpt2, sample, key[None], 1, "key", "first_order").mean[0]
    assert close(found, expected / sample.n_valid)
    assert not close(found, masked / sample.n_valid)


def test_first_order_has_no_cross_terms(gpt2: ql.Model, sample: ql.Tokens) -> None:
    point, last = 2 * LAYERS - 2, 2 * LAYERS
    value = torch.randn(D_MODEL, dtype=torch.float64)
    attn, mlp = (
        walk_features(gpt2, sample, value[None], point, "value", "first_order", submodule=s).mean[0]
        for s in ("attn", "mlp")
    )
    both = walk_features(gpt2, sample, value[None], point, "value", "first_order").mean[0]
    assert close(both, attn + mlp - value)
    assert not close(walk_features(gpt2, sample, value[None], point, "value", "full").mean[0], both)
    assert close(walk_features(gpt2, sample, value[None], last, "value", "full").mean[0], value)


def test_ablations_count_every_position(gpt2: ql.Model, sample: ql.Tokens) -> None:
    """The padding mask changes nothing: not the run, not the mean."""
    neurons = ql.neuron_dictionary(gpt2, 0)
    options = {"preset": "token_change", "k": K, "features": [2]}
    masked = ql.signatures(neurons, gpt2, tokens=sample, **options)
    whole = ql.signatures(neurons, gpt2, tokens=ql.Tokens(sample.ids, torch.ones_like(sample.valid_mask)), **options)
    assert close(masked.top_scores, whole.top_scores)


def test_a_token_at_the_centre_scores_nothing(gpt2: ql.Model) -> None:
    centre = gpt2.W_E[7].clone()
    scores = common.apply_embed_cosine_centered(gpt2, torch.randn(D_MODEL, dtype=torch.float64), centre)
    assert scores[7] == 0 and scores.abs().max() > 0.1


def test_pad_token_of_a_hooked_tokenizer(gpt2_folder: Path) -> None:
    """Without a pad token: the end-of-text token where the reference's loader is asked, every position elsewhere."""
    plain = ql.load_model(gpt2_folder)
    plain.tokenizer.pad_token = None
    ids = torch.tensor([[5, 1, 6]])
    assert ql.models.tokens.as_tokens(ids, plain).valid_mask.all()
    plain.tokenizer.save_pretrained(gpt2_folder / "no_pad")
    for name in ("config.json", "model.safetensors"):
        (gpt2_folder / "no_pad" / name).write_bytes((gpt2_folder / name).read_bytes())
    reference = common.load_model("cpu", str(gpt2_folder / "no_pad"), torch.float32)
    assert reference.pad_token_id == 1
    assert ql.models.tokens.as_tokens(ids, reference).valid_mask.tolist() == [[True, False, True]]


def test_every_sequence_counts(gpt2: ql.Model, sample: ql.Tokens) -> None:
    """Five sequences in two accumulation steps: the reference leaves the fifth out."""
    transport = ql.fit_transport(gpt2, sample, progress=False)
    four = ql.fit_transport(gpt2, sample.head(4), progress=False)
    assert transport.n_valid == sample.n_valid > four.n_valid
    cache = common.ResidCache.build_for_local_pile_sample(gpt2, sample.ids, 2, "all")
    assert sum(len(cache.get(i)[2]) for i in range(len(cache))) == len(sample.ids)
