"""Readers and writers of features against brute force in float64; what carries features to a layer in between."""

from collections.abc import Callable
from pathlib import Path

import pytest
import relations_oracle as oracle
import torch
from tiny_models import D_MODEL, LAYERS, VOCAB, save_tiny_model

import querylens_fast as ql
from querylens_fast.relations.weights import weight_names
from querylens_fast.transport.jacobians import linearise

K = 5
LAYER = 1
"""Of the dictionary: it writes at point 4 and reads there."""


@pytest.fixture(scope="module", params=("gpt2", "gemma3", "qwen3"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ql.Model:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return ql.load_model(folder, dtype="float64")


@pytest.fixture(scope="module")
def features() -> ql.Dictionary:
    generator = torch.Generator().manual_seed(1)
    values, keys = torch.randn(2, 23, D_MODEL, dtype=torch.float64, generator=generator)
    return ql.directions(values, keys=keys, layer=LAYER)


def check(found: ql.TopK, scores: torch.Tensor, k: int = K) -> None:
    """Both sides hold the extreme scores, and each id is one that has its score."""
    expected = oracle.extremes(scores, k)
    for side in ("top", "bottom"):
        ids, values = getattr(found, f"{side}_ids"), getattr(found, f"{side}_scores")
        assert torch.allclose(values, expected[side])
        assert torch.allclose(scores.gather(1, ids), values)
        assert (ids.sort(1).values.diff() > 0).all()


@torch.no_grad()
def reader_scores(model: ql.Model, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every reader of layer 2, by name: scores of all features and all that reads."""
    layer = oracle.layer_of(model.source, 2)
    seen = oracle.through(values, layer.attention_gain, layer.centred)
    by_mlp = oracle.through(values, layer.mlp_gain, layer.centred)
    scores = {"blocks.2.mlp.W_in": by_mlp @ layer.up.T}
    if layer.gate is not None:
        scores["blocks.2.mlp.W_gate"] = by_mlp @ layer.gate.T
    for name, weight, n in (
        ("Q", layer.q, layer.n_heads),
        ("K", layer.k, layer.n_kv_heads),
        ("V", layer.v, layer.n_kv_heads),
    ):
        scores[f"blocks.2.attn.W_{name}"] = seen @ weight.T
        scores[f"blocks.2.attn.W_{name}.heads"] = oracle.head_norms(seen @ weight.T, n)
    for head in range(layer.n_heads):
        written = (seen @ oracle.ov(layer, head).T) * layer.after_attention
        scores[f"blocks.2.attn.OV.{head}"] = oracle.final_logits(model.source, written)
    return scores | {"unembed": oracle.final_logits(model.source, values)}


@torch.no_grad()
def writer_scores(model: ql.Model, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every writer of layer 0, by name."""
    layer = oracle.layer_of(model.source, 0)
    by_attention = keys * layer.after_attention
    scores = {"blocks.0.mlp.W_out": (keys * layer.after_mlp) @ layer.down}
    scores["blocks.0.attn.W_O"] = by_attention @ layer.o
    scores["blocks.0.attn.W_O.heads"] = oracle.head_norms(by_attention @ layer.o, layer.n_heads)
    table = oracle.embeddings(model.source)
    for head in range(layer.n_heads):
        read = oracle.back_through(by_attention @ oracle.ov(layer, head), layer.attention_gain, layer.centred)
        scores[f"blocks.0.attn.OV.{head}"] = read @ table.T
    return scores | {"embed": keys @ table.T}


def test_every_reader_by_brute_force(model: ql.Model, features: ql.Dictionary) -> None:
    expected = reader_scores(model, features.values(slice(None)))
    for name, scores in expected.items():
        k = min(K, scores.shape[1])
        check(ql.downstream(features, model, targets=name, k=k), scores, k)
    assert set(expected) == {n for n in weight_names(model, "value") if n.startswith("blocks.2.") or n == "unembed"}


def test_every_writer_by_brute_force(model: ql.Model, features: ql.Dictionary) -> None:
    expected = writer_scores(model, features.keys(slice(None)))
    for name, scores in expected.items():
        k = min(K, scores.shape[1])
        check(ql.upstream(features, model, targets=name, k=k), scores, k)
    assert set(expected) == {n for n in weight_names(model, "key") if n.startswith("blocks.0.") or n == "embed"}


def test_virtual_weights(model: ql.Model, features: ql.Dictionary) -> None:
    later = ql.neuron_dictionary(model, 2)
    check(ql.downstream(features, model, targets=later, k=K), features.values(slice(None)) @ later.keys(slice(None)).T)
    earlier = ql.neuron_dictionary(model, 0)
    check(
        ql.upstream(features, model, targets=earlier, k=K), features.keys(slice(None)) @ earlier.values(slice(None)).T
    )
    matrix = torch.randn(9, D_MODEL, dtype=torch.float64)
    check(ql.upstream(features, model, targets=matrix, k=K), features.keys(slice(None)) @ matrix.T)


def brute_passage(
    model: ql.Model, tokens: ql.Tokens, vectors: torch.Tensor, start: int, stop: int, order: str
) -> torch.Tensor:
    """Each vector walked on its own from point to point and averaged over valid positions, one sequence at a time."""
    total = torch.zeros_like(vectors)
    up = stop > start
    for row in range(len(tokens.ids)):
        lin = linearise(model, tokens, slice(row, row + 1))
        seed = vectors[:, None, None, :].expand(-1, *lin.mask.shape[:2], -1)  # first order: at padded queries too
        t = seed * lin.mask
        for i in range(start, stop) if up else range(start - 1, stop - 1, -1):
            module = lin.modules[i]
            assert module is not None
            given = t if order == "full" else seed
            t = t + (module.jvp(given) if up else module.vjp(given)) * lin.mask
        total += t.sum((1, 2))
    return total / tokens.n_valid


@pytest.mark.parametrize("order", ["full", "first_order"])
def test_features_are_carried_to_the_target(
    model: ql.Model, features: ql.Dictionary, sample: ql.Tokens, order: str
) -> None:
    fitted = ql.fit_transport(model, sample, orders=("first_order",), progress=False)
    for side, point, relate in (("value", 5, ql.downstream), ("key", 1, ql.upstream)):
        carrier = (
            ql.fit_passage(model, sample, 4, side=side, progress=False) if order == "full" else fitted  # type: ignore[arg-type]
        )
        vectors = features.vectors(side, slice(None))
        moved = brute_passage(model, sample, vectors, 4, point, order)
        scores = (reader_scores if side == "value" else writer_scores)(model, moved)
        name = "blocks.2.mlp.W_in" if side == "value" else "blocks.0.attn.W_O.heads"
        k = min(K, scores[name].shape[1])
        check(relate(features, model, targets=name, k=k, transport=carrier), scores[name], k)


def test_a_passage_to_the_end_is_the_transport(model: ql.Model, sample: ql.Tokens) -> None:
    fitted = ql.fit_transport(model, sample, progress=False)
    for side, end in (("value", 2 * LAYERS), ("key", 0)):
        for order in ("full", "first_order"):
            passage = ql.fit_passage(model, sample, 3, side=side, order=order, progress=False)  # type: ignore[arg-type]
            eye = torch.eye(D_MODEL, dtype=torch.float64)
            assert torch.allclose(passage.apply(eye, end), fitted.apply(eye, side, order, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="point 2 is not on the way from point 3 to later layers"):
        ql.fit_passage(model, sample, 3, progress=False).apply(eye, 2)


def test_a_pattern_gives_a_table_of_later_targets(model: ql.Model, features: ql.Dictionary, tmp_path: Path) -> None:
    out = tmp_path / "readers.parquet"
    found = ql.downstream(features, model, targets="blocks.*.mlp.W_*", k=K, out=out, progress=False)
    assert isinstance(found, ql.RelationTable)
    frame = found.pandas()
    names = ["blocks.2.mlp.W_in"] + ["blocks.2.mlp.W_gate"] * (model.architecture != "gpt2")
    assert list(frame.target.unique()) == names
    assert (frame.target_layer == 2).all() and (frame.source_layer == LAYER).all()
    assert len(frame) == 23 * 2 * K * len(names) == len(found)
    expected = oracle.extremes(reader_scores(model, features.values(slice(None)))[names[0]], K)
    mine = frame[(frame.target == names[0]) & (frame.side == "bottom")].score
    assert torch.allclose(torch.tensor(mine.to_numpy().reshape(23, K)), expected["bottom"])
    again = ql.read_table(out)
    assert again.metadata["what"] == "downstream" and again.metadata["k"] == K
    in_memory = ql.downstream(features, model, targets=["blocks.*.mlp.W_*"], k=K)
    assert isinstance(in_memory, ql.RelationTable) and in_memory.table().to_pylist() == again.table().to_pylist()
    few = ql.downstream(features, model, targets=["blocks.2.attn.W_K.heads"], k=K)
    assert len(few) == 23 * 2 * model.blocks[2].attention.n_kv_heads


def test_refusals(model: ql.Model, features: ql.Dictionary, sample: ql.Tokens, tmp_path: Path) -> None:
    def refused(message: str, call: Callable[[], object], error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            call()

    refused("targets is an empty list", lambda: ql.downstream(features, model, targets=[]))
    refused("targets lie after layer 1", lambda: ql.upstream(features, model, targets="blocks.2.mlp.W_out"))
    refused(
        r"like .blocks.2.mlp.W_out.*attn.OV.\*, attn.W_O, attn.W_O.heads, mlp.W_out$",
        lambda: ql.upstream(features, model, targets="blocks.2.mlp.W_in"),
    )
    other = ql.fit_passage(model, sample, 2, progress=False)
    refused("from point 2, but the features' values act at point 4",
            lambda: ql.downstream(features, model, targets="unembed", transport=other))  # fmt: skip
    no_terms = ql.fit_transport(model, sample, orders=("full",), progress=False)
    refused("no first-order terms of the key side",
            lambda: ql.upstream(features, model, targets="embed", transport=no_terms))  # fmt: skip
    terms = ql.fit_transport(model, sample, orders=("first_order",), progress=False)
    refused("pass directions",
            lambda: ql.upstream(features, model, targets=torch.zeros(2, D_MODEL), transport=terms))  # fmt: skip
    out = tmp_path / "a.parquet"
    ql.upstream(features, model, targets="embed", k=3, out=out, progress=False)
    refused("different: k", lambda: ql.upstream(features, model, targets="embed", k=4, out=out), FileExistsError)
    refused("use resume=True", lambda: ql.upstream(features, model, targets="embed", k=3, out=out, resume=False),
            FileExistsError)  # fmt: skip
    refused("expected a .parquet file", lambda: ql.upstream(features, model, targets="embed", k=3, out="a.csv"))


def test_unembedding_is_the_logit_lens(model: ql.Model, features: ql.Dictionary) -> None:
    lens = ql.signatures(features, model, preset="logit_lens_value", k=K)
    found = ql.downstream(features, model, targets="unembed", k=K)
    assert torch.equal(found.top_ids, lens.top_ids) and torch.equal(found.top_scores, lens.top_scores)
    raw = ql.downstream(features, model, targets="unembed", k=VOCAB, final_norm=False)
    assert torch.allclose(raw.top_scores[:, :K], ql.signatures(
        features, model, preset="logit_lens_value", k=K, final_norm=False).top_scores)  # fmt: skip
