"""Token → features against the signatures' own scores; nothing of features × vocabulary is ever made."""

from pathlib import Path

import pytest
import torch
import transformers
from test_relations_flow import Largest
from tiny_models import D_MODEL, VOCAB, save_tiny_model

import querylens_fast as ql
from querylens_fast.lens import readouts
from querylens_fast.relations.flow import related
from querylens_fast.relations.vocabulary import swapped_topk

K = 4
PRESETS = ("logit_lens_value", "logit_lens_key", "query_lens_value", "query_lens_key_approx", "query_lens_key")


@pytest.fixture(scope="module", params=("gpt2", "gemma3", "qwen3"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return ql.load_model(folder, dtype="float64")


@pytest.fixture(scope="module")
def dictionaries(model: ql.Model) -> list[ql.Dictionary]:
    return [ql.neuron_dictionary(model, 2), ql.neuron_dictionary(model, 0)]


def test_scores_are_the_signatures(
    model: ql.Model, dictionaries: list[ql.Dictionary], sample: ql.Tokens, tmp_path: Path
) -> None:
    transport = ql.fit_transport(model, sample, progress=False)
    everything = torch.arange(VOCAB)
    for preset in PRESETS:
        given = transport if preset.startswith("query") else None
        scores = [ql.scores_at(d, model, None, everything, preset=preset, transport=given) for d in dictionaries]
        both = torch.cat(scores).T
        sizes = [d.n_features for d in dictionaries]
        features = torch.cat([torch.arange(n) for n in sizes])
        names = [d.name for d in dictionaries for _ in range(d.n_features)]
        frame = ql.token_features(
            dictionaries, model, preset=preset, transport=given, k=K, out=tmp_path / f"{preset}.parquet", progress=False
        ).pandas()
        for side, largest in (("top", True), ("bottom", False)):
            mine = frame[frame.side == side]
            expected = both.topk(K, dim=1, largest=largest)
            assert torch.allclose(torch.tensor(mine.score.to_numpy()).view(VOCAB, K), expected.values)
            columns = expected.indices.flatten().tolist()
            assert list(mine.target_id) == [int(features[c]) for c in columns]
            assert list(mine.target) == [names[c] for c in columns]
        assert frame.source_layer.isna().all() and set(frame.target_layer) <= {0, 2}
        assert list(frame.token[:: 2 * K]) == model.str_tokens(range(VOCAB))


def test_some_tokens_of_one_dictionary(model: ql.Model, dictionaries: list[ql.Dictionary]) -> None:
    scores = ql.scores_at(dictionaries[0], model, None, torch.tensor([7, 3]), preset="logit_lens_value")
    frame = ql.token_features(dictionaries[0], model, k=10_000, token_ids=[7, 3], token_strings=False).pandas()
    n = dictionaries[0].n_features
    assert len(frame) == 2 * 2 * n and "token" not in frame
    assert torch.allclose(torch.tensor(frame.score.to_numpy()).view(2, 2, n)[:, 0], scores.T.sort(1, True).values)


def test_a_token_at_the_centre_scores_nothing(model: ql.Model) -> None:
    scorer = readouts.embed_cosine_centered(model, model.W_E[5].double() * model.embed_scale)
    vectors = torch.randn(30, D_MODEL, dtype=torch.float64)
    found = swapped_topk(scorer, vectors, torch.arange(4, 8), 3)
    expected = scorer.scores_at(vectors, torch.arange(4, 8)).T
    assert torch.allclose(found.top_scores, expected.topk(3, dim=1).values)
    assert found.top_ids[1].tolist() == [0, 1, 2] and (found.bottom_scores[1] == 0).all()


def test_refusals(model: ql.Model, dictionaries: list[ql.Dictionary]) -> None:
    with pytest.raises(ValueError, match="runs the model for each feature"):
        ql.token_features(dictionaries, model, preset="zero_out")
    with pytest.raises(ValueError, match="needs transport="):
        ql.token_features(dictionaries, model, preset="query_lens_key")
    with pytest.raises(ValueError, match="token id 61 is outside"):
        ql.token_features(dictionaries, model, token_ids=[61])
    with pytest.raises(ValueError, match="empty list"):
        ql.token_features([], model)


def test_no_matrix_of_features_by_vocabulary(tmp_path: Path) -> None:
    """As many features, readers and tokens as would make matrices of 1.4 · 10⁸ scores."""
    n, d = 12_000, 16
    config = transformers.GPT2Config(
        vocab_size=n, n_embd=d, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = ql.as_model(transformers.AutoModelForCausalLM.from_config(config).eval())
    matrix = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    features, readers = ql.directions(matrix, layer=0, name="a"), ql.directions(matrix.flip(0), layer=1, name="b")
    with Largest() as largest:
        targets = [readers, "blocks.1.attn.OV.1"]
        found = ql.downstream(features, model, targets=targets, k=4, out=tmp_path / "d.parquet", progress=False)
        tokens = ql.token_features(features, model, k=4, token_strings=False)
    assert isinstance(found, ql.RelationTable) and len(found) == 2 * 8 * n == 2 * len(tokens)
    assert 0 < largest.bytes <= 1 << 27 < 4 * n * n / 4


def test_flow_between_neurons(model: ql.Model, dictionaries: list[ql.Dictionary]) -> None:
    """Cosines of what a model's own neurons write, between a residual dictionary and the MLPs around it."""
    stream = ql.directions(torch.randn(15, D_MODEL, dtype=torch.float64), layer=0)
    frame = ql.feature_flow([*dictionaries, stream], k=3).pandas()
    pairs = related([*dictionaries, stream])
    assert {relation for _, relation, _ in pairs} == {"mlp", "next residual", "previous residual"}
    for source, relation, target in pairs:
        a, b = source.values(slice(None)), target.values(slice(None))
        expected = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).topk(3).values
        mine = frame[(frame.source == source.name) & (frame.target == target.name)]
        assert (mine.relation == relation).all()
        assert torch.allclose(torch.tensor(mine.score.to_numpy()).view(-1, 3), expected)
