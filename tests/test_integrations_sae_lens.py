"""sae-lens's statistics and enrichment: equal to its own on a real SAE, and dashboards' two unembeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import querylens_fast as ql
from querylens_fast.demo import ASSETS
from querylens_fast.integrations import sae_lens as ours

SAE_LENS = Path(pytest.importorskip("sae_lens").__file__).parent


@pytest.fixture(scope="module")
def model() -> ql.Model:
    return ql.load_model(ASSETS / "model")


@pytest.fixture(scope="module")
def sae():
    from sae_lens import SAE

    return SAE.load_from_disk(str(ASSETS / "sae_layer1"))


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """sae_lens.tutorial.tsea; its imports for plots and word lists, which nothing here calls, are left out."""
    absent = {}
    for name in ("nltk", "plotly_express", "babe"):
        if name not in sys.modules:
            absent[name] = sys.modules[name] = ModuleType(name)
    absent.get("babe", ModuleType("babe")).UsNames = object  # type: ignore[attr-defined]
    import importlib

    try:
        return importlib.import_module("sae_lens.tutorial.tsea")
    finally:
        for name in absent:
            del sys.modules[name]


def notebooks_stats(projection: torch.Tensor) -> dict[str, torch.Tensor]:
    """The formulas of sae-lens's notebook: population moments, z-scores, kurtosis without −3; in float64."""
    z = projection.double()
    mean = z.mean(1)
    z = z - mean[:, None]
    std = z.square().mean(1).sqrt()
    z = z / std[:, None]
    return {"mean": mean, "std": std, "skewness": z.pow(3).mean(1), "kurtosis": z.pow(4).mean(1)}


@pytest.mark.parametrize("cosine_sim", [False, True])
def test_statistics_equal_the_notebooks(sae, model, cosine_sim) -> None:
    hooked = SimpleNamespace(W_U=model.W_U.T)
    frame, lazy = ours.get_W_U_W_dec_stats_df(sae.W_dec, hooked, cosine_sim)
    W_U = hooked.W_U / hooked.W_U.norm(dim=0, keepdim=True) if cosine_sim else hooked.W_U
    projection = sae.W_dec.detach() @ W_U
    assert list(frame.columns) == ["feature", "mean", "std", "skewness", "kurtosis"]
    assert tuple(lazy.shape) == tuple(projection.shape) and list(frame["feature"]) == list(range(len(projection)))
    for name, wanted in notebooks_stats(projection).items():
        assert np.allclose(frame[name], wanted, rtol=1e-5, atol=1e-5), name
    for choice in ([5, 2], 3, slice(0, 4), torch.tensor([7])):
        assert torch.allclose(lazy[choice], projection[choice], atol=1e-5)
    dense = ours.get_stats_df(projection)
    assert np.allclose(dense.to_numpy(), frame.to_numpy(), rtol=1e-5, atol=1e-5)


def test_statistics_of_tiny_and_huge_decoders(sae, model) -> None:
    """Dead features' decoders decay: the fourth powers of their scores are no float32."""
    scales = torch.tensor([1.0, 1e-12, 1e-25, 1e12])
    rows = sae.W_dec[:1].detach() * scales[:, None]
    frame, lazy = ours.get_W_U_W_dec_stats_df(rows, SimpleNamespace(W_U=model.W_U.T))
    for found in (frame, ours.get_stats_df(lazy[:])):
        for name, size in (("mean", scales), ("std", scales), ("skewness", 1), ("kurtosis", 1)):
            values = torch.tensor(found[name].to_numpy()) / size
            assert torch.allclose(values, values[0].expand(4), rtol=1e-4), name


def test_all_stats_have_sparsity_and_layer(sae, model) -> None:
    hooked, keys = SimpleNamespace(W_U=model.W_U.T), ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
    sparsities = {key: torch.linspace(-9, 0, len(sae.W_dec)) for key in keys}
    frame = ours.get_all_stats_dfs({key: sae for key in keys}, sparsities, hooked, cosine_sim=True)
    n = len(sae.W_dec)
    assert list(frame.columns[-2:]) == ["log_feature_sparsity", "layer"]
    assert list(frame["layer"]) == [0] * n + [2] * n
    assert np.allclose(frame["log_feature_sparsity"][:n], sparsities[keys[0]])


def test_enrichment_equals_sae_lens_and_leaves_the_sets_alone(sae, model, theirs) -> None:
    generator = torch.Generator().manual_seed(0)
    V = model.vocab_size
    sets = {f"set {n}": set(torch.randperm(V, generator=generator)[:n].tolist()) for n in (1, 7, 300)}
    before = {name: set(ids) for name, ids in sets.items()}
    projection = (sae.W_dec.detach() @ model.W_U.T)[:200]
    features = [3, 150, 0, 77]
    wanted = theirs.get_enrichment_df(projection, features, {name: set(ids) for name, ids in sets.items()})
    lazy = ours.Projection(sae.W_dec[:200], model.W_U.T)
    for given in (projection, lazy):
        found = ours.get_enrichment_df(given, features, sets)
        assert list(found.index) == list(wanted.index) and list(found.columns) == list(wanted.columns)
        assert np.allclose(found, wanted, atol=1e-5)
    assert sets == before
    signed = ours.get_enrichment_df(projection, features, sets, signed=True)
    assert np.allclose(signed.abs(), wanted, atol=1e-5) and (signed.to_numpy() < 0).any()


def test_batch_scores_equal_sae_lens_with_padding_and_repeats(theirs) -> None:
    scores = torch.randn(9, 50, generator=torch.Generator().manual_seed(2))
    lists = torch.tensor([[4, 9, 2, -1], [1, 1, 7, 30], [0, -1, -1, -1]])
    wanted = theirs.calculate_batch_enrichment_scores(scores, lists)
    assert torch.allclose(ours.calculate_batch_enrichment_scores(scores, lists), wanted, atol=1e-6)


def test_enrichment_of_a_set_on_top_is_one_with_its_sign() -> None:
    scores = torch.arange(10.0).flip(0)[None]
    top, bottom = torch.tensor([[0, 1, 2]]), torch.tensor([[9, 8]])
    assert ours.calculate_batch_enrichment_scores(scores, top, signed=True).item() == pytest.approx(1)
    assert ours.calculate_batch_enrichment_scores(scores, bottom, signed=True).item() == pytest.approx(-1)


def test_the_preset_dashboard_reads_unit_rows_by_the_raw_unembedding(model) -> None:
    dictionary = ql.load_dictionary(ASSETS / "sae_layer1")
    found = ql.signatures(dictionary, model, preset="dashboard", k=10, features="0:64")
    rows = dictionary.values(slice(0, 64)).float()
    logits = rows / rows.norm(dim=1, keepdim=True) @ model.W_U.T
    assert torch.equal(found.top_ids, logits.topk(10, dim=1).indices)
    assert torch.allclose(found.top_scores, logits.topk(10, dim=1).values, atol=1e-5)
    longer = ql.signatures(dictionary, model, preset="dashboard", k=10, features="0:64", unit_norm=False)
    assert torch.allclose(longer.top_scores, (rows @ model.W_U.T).topk(10, dim=1).values, rtol=1e-5)
    with pytest.raises(ValueError, match="unembedding='folded' is for preset 'dashboard'"):
        ql.signatures(dictionary, model, preset="logit_lens_value", unembedding="folded")


def test_the_choice_of_unembedding_is_recorded(model, tmp_path) -> None:
    dictionary = ql.load_dictionary(ASSETS / "sae_layer1")
    out = ql.signatures(
        dictionary, model, preset="dashboard", unembedding="folded", features="0:8", out=tmp_path / "r.parquet",
        progress=False,
    )  # fmt: skip
    said = out.metadata()
    assert (said["preset"], said["unembedding"], said["unit_norm"]) == ("dashboard", "folded", True)


def test_the_folded_unembedding_is_transformer_lenss(model) -> None:
    pytest.importorskip("transformer_lens")
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import convert_gpt2_weights
    from transformers import AutoModelForCausalLM

    from querylens_fast.lens.readouts import dashboard

    hf = AutoModelForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.float32)
    c = hf.config
    hooked = HookedTransformer(
        dict(
            n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head,
            d_vocab=c.vocab_size, act_fn="gelu_new", d_mlp=4 * c.n_embd, normalization_type="LN", device="cpu",
        )
    )  # fmt: skip
    state = convert_gpt2_weights(hf, hooked.cfg)
    hooked.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=True, center_unembed=True)
    assert torch.allclose(dashboard(model, "folded").W, hooked.W_U.T, atol=2e-6)
