"""Steering, output scores and the table of scores, on the embedded model against plain loops."""

from pathlib import Path

import pytest
import torch
from golden_cases import CASES, golden
from safetensors.torch import load_file

import querylens_fast as ql
from querylens_fast.demo.showcase import Example
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample
from querylens_fast.evaluation.means import MeanScore, by_thirds, gains, mean_scores
from querylens_fast.evaluation.methods import Context, find_methods
from querylens_fast.evaluation.output_score import (
    Promoted,
    neutral_prefixes,
    output_scores,
    prefix_ids,
    promoted_tokens,
    read_promoted,
)
from querylens_fast.evaluation.ranking import generated_ranking, rank_sums
from querylens_fast.evaluation.scores import Case, coherent_from, input_scores, score_methods
from querylens_fast.evaluation.steering import KL_TOLERANCE, Steered, calibrate
from querylens_fast.lens.ablations import activations
from querylens_fast.lens.similarity import embedding_similarity

FEATURES = torch.tensor([3, 40, 700, 1500])


@pytest.fixture(scope="module")
def prefixes(example: Example) -> torch.Tensor:
    return example.held_out.ids[:12, :7]


@pytest.fixture(scope="module")
def promoted(example: Example, prefixes: torch.Tensor) -> Promoted:
    return promoted_tokens(example.dictionaries[1], example.model, FEATURES, prefixes=prefixes, n_tokens=40)


def test_rank_sums_break_ties_by_the_lower_id() -> None:
    logits = torch.tensor([[[1.0, 3.0, 1.0, -0.0, 0.0], [-2.0, -2.0, -1.0, -3.0, float(2**20)]]])
    first = [1, 0, 2, 3, 4], [2, 3, 1, 4, 0]
    expected = torch.tensor([first[0], first[1]]).sum(0).double()
    assert torch.equal(rank_sums(logits)[0], expected)
    assert torch.equal(rank_sums(logits.double())[0], expected)


@pytest.mark.parametrize("layer", (1, 4))
def test_steered_logits_by_running_the_model(example: Example, prefixes: torch.Tensor, layer: int) -> None:
    """The error term kept: the model's own stream plus (α − a) times the decoder row. Layer 4: the transcoder."""
    dictionary, model = example.dictionaries[layer], example.model
    alphas = torch.tensor([4.0, 9.0])
    steered = Steered(model, dictionary, prefixes, FEATURES)
    found = steered.logits(torch.tensor([1, 3]), alphas.double())
    acts = activations(model, dictionary, prefixes)
    rows = dictionary.values(FEATURES)
    for c, (place, alpha) in enumerate(zip((1, 3), alphas, strict=True)):
        delta = (alpha - acts[..., FEATURES[place]])[..., None] * rows[place]
        assert torch.allclose(found[c], run_from(model, prefixes, 2, delta), atol=2e-4)
    assert torch.allclose(steered.clean, run_from(model, prefixes, 2, torch.zeros(1)), atol=2e-4)


def run_from(model: ql.Model, ids: torch.Tensor, layer: int, delta: torch.Tensor) -> torch.Tensor:
    """Next-token logits with ``delta`` added to the stream in front of a layer."""
    x = model.residuals(ids)[0][layer] + delta
    masking = model.masking(ids)
    for block in model.blocks[layer:]:
        x = x + block.attention(x, masking)
        x = x + block.mlp(x)
    return model.logits(x[:, -1])


def test_calibration_reaches_its_targets() -> None:
    scale = torch.tensor([0.01, 1.0, 30.0, 1e-9]).double()

    def kl(index: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        return (scale[index] * alphas).square() / (1 + scale[index] * alphas)

    found = calibrate(kl, torch.full((4,), 5.0), 0.25)
    assert bool(((found.kl - 0.25).abs() <= KL_TOLERANCE)[:3].all())
    assert torch.allclose(kl(torch.arange(4), found.alphas), found.kl)
    assert found.alphas[3] == pytest.approx(1e3, rel=0.02) and found.kl[3] < 0.1  # cannot be reached
    guessed = kl(torch.arange(3), found.start(0.5)[:3])
    assert bool(((guessed - 0.5).abs() <= KL_TOLERANCE).all()), "the measured slope leads to the next target at once"


def test_promoted_tokens_by_plain_ranks(example: Example, prefixes: torch.Tensor, promoted: Promoted) -> None:
    model = example.model
    steered = Steered(model, example.dictionaries[1], prefixes, FEATURES)

    def ranks(logits: torch.Tensor) -> torch.Tensor:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        return order.argsort(dim=-1).double()

    clean = ranks(steered.clean)
    assert bool(((promoted.kl - torch.tensor([0.25, 0.5])).abs() <= KL_TOLERANCE).all())
    for place in range(len(FEATURES)):
        delta = torch.zeros(model.vocab_size).double()
        for target in range(2):
            logits = steered.logits(torch.tensor([place]), promoted.alphas[place, target : target + 1])
            delta += (clean - ranks(logits[0])).mean(0) / model.vocab_size / 2
            log_p, log_q = steered.clean.log_softmax(-1).double(), logits[0].log_softmax(-1).double()
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            assert kl == pytest.approx(float(promoted.kl[place, target]), abs=1e-4)
        assert torch.allclose(promoted.delta[place].double(), delta[promoted.token_ids[place]], atol=2e-4)
        assert promoted.delta[place, -1] >= delta.sort(descending=True).values[39] - 2e-4


@pytest.mark.parametrize("positions", ("forced", "generate"))
def test_other_positions(example: Example, prefixes: torch.Tensor, promoted: Promoted, positions: str) -> None:
    """Along continuations: seeded, and near the ranking at the prefixes alone (its S shares more than half)."""
    n = 1 if positions == "generate" else 2
    arguments = {"prefixes": prefixes[:6], "n_tokens": 25, "positions": positions, "seed": 1, "progress": False}
    found = promoted_tokens(example.dictionaries[1], example.model, FEATURES[:n], **arguments)
    assert output_scores(found, promoted.token_ids[:n, :25]).mean() > 0.4
    if positions == "forced":
        again = promoted_tokens(example.dictionaries[1], example.model, FEATURES[:n], **arguments)
        assert torch.equal(found.token_ids, again.token_ids)


@pytest.mark.parametrize("name", CASES)
def test_generate_is_the_references_procedure(name: str) -> None:
    """α, and the mean ranks along sampled text, that the reference's own functions gave (goldens/write_steering.py)."""
    case = golden(name)
    expected, model = load_file(case.folder / "steering.safetensors"), ql.load_model(case.model_path, dtype="float64")
    layer, features = case.layers[1], torch.tensor(case.features[:2])
    dictionary = ql.load_dictionary(case.sae_path(layer))
    ranking = generated_ranking(model, dictionary, [expected["prompts"]], 3, features)
    for place, feature in enumerate(features.tolist()):
        delta, reached = ranking.rise(torch.tensor([place]), (0.25, 0.5), torch.ones(2))
        alphas = expected[f"layer{layer}.feature{feature}.alphas"]
        assert torch.equal(torch.cat([r.alphas for r in reached]), alphas.float())
        clean, *steered = expected[f"layer{layer}.feature{feature}.ranks"]
        rise = (clean - torch.stack(steered).mean(0)) / len(clean)
        assert torch.allclose(delta[0], rise, atol=1e-4)  # theirs are float32 means, with ties in any order


def test_steered_text(example: Example) -> None:
    arguments = {"n_tokens": 8, "seed": 3}
    text = ql.steer(example.model, example.dictionaries[0], 2035, 20.0, "def parse(self):", **arguments)
    assert text.clean != text.steered and text == ql.steer(
        example.model, example.dictionaries[0], 2035, 20.0, "def parse(self):", **arguments
    )
    with pytest.raises(ValueError, match="prompt is ''; expected at least one token"):
        ql.steer(example.model, example.dictionaries[0], 2035, 20.0, "")
    with pytest.raises(ValueError, match="strength is nan"):
        ql.steer(example.model, example.dictionaries[0], 2035, float("nan"), "x")
    room = example.model.max_positions
    with pytest.raises(
        ValueError, match=f"n_tokens is 10000 after 1 tokens; .* positions for {room}, .* at most {room}"
    ):
        ql.steer(example.model, example.dictionaries[0], 2035, 20.0, " x", n_tokens=10000)


def test_output_scores(promoted: Promoted) -> None:
    ids = promoted.token_ids[:, :10].flip(1).clone()
    assert torch.equal(output_scores(promoted, ids), torch.ones(4))
    ids[:, :5] = -1
    assert torch.equal(output_scores(promoted, ids), torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="only 40 promoted tokens are stored"):
        output_scores(promoted, torch.zeros(4, 41))
    with pytest.raises(ValueError, match="signature_ids are of 3 features"):
        output_scores(promoted, torch.zeros(3, 5))


def test_promoted_tokens_resume(
    example: Example, prefixes: torch.Tensor, promoted: Promoted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops after a block goes on from there, and the file gives what memory gave."""
    from querylens_fast.evaluation import output_score

    monkeypatch.setattr(output_score, "FEATURES_A_BLOCK", 2)
    computed, rows = [], output_score._Search.rows

    def stopping(self: object, features: torch.Tensor) -> object:
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(features)
        return rows(self, features)  # type: ignore[arg-type]

    arguments = {"prefixes": prefixes, "n_tokens": 40, "out": tmp_path / "promoted.parquet", "progress": False}
    monkeypatch.setattr(output_score._Search, "rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        promoted_tokens(example.dictionaries[1], example.model, FEATURES, **arguments)
    monkeypatch.setattr(output_score._Search, "rows", rows)
    promoted_tokens(example.dictionaries[1], example.model, FEATURES, **arguments)
    again = read_promoted(tmp_path / "promoted.parquet")
    assert torch.equal(again.features, FEATURES)
    overlap = (again.token_ids[:, :, None] == promoted.token_ids[:, None]).any(-1).float().mean()
    assert overlap > 0.95  # another first guess of α leads to another α within the tolerance


def test_prefixes(example: Example) -> None:
    assert len(set(neutral_prefixes())) == 100
    groups = prefix_ids(example.model, None)
    assert sum(map(len, groups)) == 100 and all(g.ndim == 2 for g in groups)
    assert prefix_ids(example.model, torch.ones(2, 3, dtype=torch.int32))[0].dtype == torch.int64
    with pytest.raises(ValueError, match="empty list"):
        prefix_ids(example.model, [])


def test_input_scores_count_repetitions() -> None:
    activating = torch.tensor([[5, 5, 7, -1], [-1, -1, -1, -1]])
    found = input_scores(torch.tensor([[5, 9], [1, 2]]), activating)
    assert found[0] == pytest.approx(2 / 3) and found[1].isnan()


def test_table_of_scores(
    example: Example, demo_sample: FeatureSample, promoted: Promoted, demo_tokens: ql.Tokens, tmp_path: Path
) -> None:
    dictionary, model = example.dictionaries[1], example.model
    stored = [tmp_path / f"stored.{ending}" for ending in ("parquet", "jsonl")]
    for path in stored:
        ql.signatures(dictionary, model, preset="logit_lens_value", k=25, out=path, features=FEATURES, progress=False)
    methods = find_methods(["logit_lens_value", "token_change@5", *stored])
    context = Context(model, tokens=demo_tokens.head(2))
    case = Case(dictionary, "sae", FEATURES, demo_sample, promoted)
    found = score_methods([case], context, methods, ks=(5, 25, 30), out=tmp_path / "scores.parquet", progress=False)
    frame = found.pandas()
    assert len(frame) == (3 + 3 + 2 + 2) * len(FEATURES), "the files have 25 demo_tokens, and no score for 30"
    direct = frame[(frame.method == "logit_lens_value") & (frame.k < 30)].drop(columns="method").reset_index(drop=True)
    for name in ("stored.parquet", "stored.jsonl"):
        stored = frame[frame.method == name].drop(columns="method").reset_index(drop=True)
        assert direct.equals(stored)
    limits = coherent_from(model, "value", (5, 25, 30))
    assert (frame.coherent == [row.embedding_coherence > limits[row.k] for row in frame.itertuples()]).all()
    options = {"preset": "token_change", "token_change_value": 5.0, "tokens": demo_tokens.head(2), "features": FEATURES}
    ids = ql.signatures(dictionary, model, k=25, **options).top_ids
    own = frame[(frame.method == "token_change@5") & (frame.k == 25)]
    assert own.output_score.to_list() == pytest.approx(output_scores(promoted, ids).tolist())
    expected = input_scores(ids, demo_sample.tokens[FEATURES])
    assert [x for x in own.input_score if x == x] == pytest.approx(expected[~expected.isnan()].tolist())
    means = mean_scores(found, "output_score")
    by_hand = own.output_score.mean(), 1.959964 * own.output_score.std() / len(own) ** 0.5
    row = next(m for m in means if m.method == "token_change@5" and m.k == 25 and m.dictionary == "sae")
    assert (row.mean, row.high - row.mean) == pytest.approx(by_hand)
    assert ql.read_table(tmp_path / "scores.parquet").pandas().equals(frame)


@pytest.mark.parametrize("preset", ("logit_lens_value", "key_identity_embed_cosine_centered"))
def test_few_random_directions_are_coherent(example: Example, preset: str) -> None:
    directions = ql.directions(torch.randn(2000, 160, generator=torch.Generator().manual_seed(9)), layer=1)
    found = ql.signatures(directions, example.model, preset=preset, k=25).top_ids
    side = "key" if preset.startswith("key") else "value"
    limit = coherent_from(example.model, side, [25])[25]
    assert 0.03 < float((embedding_similarity(example.model, found) > limit).double().mean()) < 0.07


def test_gains() -> None:
    """Features that pass under Query Lens alone, by the score there; null scores are not compared."""
    import pyarrow as pa

    def row(method: str, feature: int, score: float | None, coherence: float) -> dict[str, object]:
        about = {"source": "sae", "source_id": feature, "method": method, "k": 25, "input_score": None}
        return {**about, "output_score": score, "coherent": coherence > 0.3, "embedding_coherence": coherence}

    before = [row("logit_lens_value", f, s, 0.1) for f, s in enumerate((0.0, 0.0, 0.2, 0.3, None))]
    scores, coherence = (0.1, 0.4, 0.0, 0.2, 1.0), (0.0, 0.0, 0.0, 0.4, 0.0)
    after = [row("query_lens_value", f, scores[f], coherence[f]) for f in range(5)]
    found = gains(ql.RelationTable({"what": "scores"}, in_memory=pa.Table.from_pylist(before + after)))
    assert [(g.criterion, g.gained, g.lost, g.n) for g in found] == [
        ("output_score", [1, 0], [2], 4),
        ("coherent", [3], [], 5),
    ]


def test_means_by_thirds_of_the_depth() -> None:
    def mean(layer: int, value: float) -> MeanScore:
        return MeanScore("input_score", "m", 25, f"sae{layer}", layer, value, value - 0.1, value + 0.1, 10)

    found = by_thirds([mean(0, 0.1), mean(1, 0.2), mean(2, 0.4), mean(5, 0.6)], 6)
    assert [(m.dictionary, m.mean) for m in found] == [
        ("early layers", pytest.approx(0.15)), ("middle layers", 0.4), ("late layers", 0.6),
    ]  # fmt: skip
    assert found[0].high - found[0].mean == pytest.approx(0.1 / 2**0.5)


def test_mistakes(example: Example, demo_sample: FeatureSample, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one, and each once"):
        find_methods(["logit_lens_key", "logit_lens_key"])
    with pytest.raises(ValueError, match="only token_change takes"):
        find_methods(["logit_lens_key@3"])
    with pytest.raises(ValueError, match="'five' is no activation"):
        find_methods(["token_change@five"])
    with pytest.raises(FileNotFoundError, match="'none.parquet' does not exist"):
        find_methods(["none.parquet"])
    with pytest.raises(ValueError, match="n_examples is 0"):
        feature_sample(example.dictionaries[0], example.model, example.fit_tokens, n_examples=0)
    with pytest.raises(ValueError, match="n_tokens is 0"):
        promoted_tokens(example.dictionaries[0], example.model, [1], n_tokens=0)
    with pytest.raises(ValueError, match="expected sizes of at least 1"):
        case = Case(example.dictionaries[1], "sae", FEATURES, demo_sample)
        score_methods([case], Context(example.model), find_methods(["logit_lens_key"]), ks=())
