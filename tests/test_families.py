"""Families of transformers' causal LMs against brute force through their own forward pass; the readout by names."""

from pathlib import Path

import pytest
import torch
import transformers

import querylens_fast as ql
from bench.families import errors, newest, table
from bench.family_cases import FAMILIES, tiny
from querylens_fast.models.frame import position_limit

QUICK = (
    "gpt_neox_parallel",
    "opt",
    "bloom",
    "falcon_new",
    "granite",
    "cohere",
    "qwen3_next",
    "mamba",
    "gpt_oss",
    "jetmoe",
    "modernbert-decoder",
    "glm_moe_dsa",
)
REFUSED = {
    "gemma3n": "no single list of layers takes one residual stream",
    "gemma4_shared": "layer 2 reads what earlier",
    "zaya": "layer 2 reads what earlier",
    "rembert": "its layers are 1664 wide, but its embedding is 256",
    "roberta": "something other than a factor lies between final norm and head",
}
OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in QUICK and n not in REFUSED]


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_transport_is_the_models_own_derivative(name: str) -> None:
    _, found = errors(name)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_share_more_than_the_stream_are_refused(name: str) -> None:
    with pytest.raises(ql.UnsupportedModelError, match=REFUSED[name]):
        ql.as_model(tiny(name))


@pytest.mark.parametrize("name", ["gpt_neox_parallel", "gemma"])
def test_both_linearisations_agree(name: str) -> None:
    by_hand, by_autodiff = (ql.as_model(tiny(name), linearisation=how) for how in ("hand-written", "autodiff"))
    ids = torch.randint(3, 61, (3, 6), generator=torch.Generator().manual_seed(4))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 4:], valid[2, :2], valid[0, 3] = False, False, False
    ours, theirs = (
        ql.fit_transport(m, ql.Tokens(ids, valid), orders=("full",), progress=False) for m in (by_hand, by_autodiff)
    )
    assert by_hand.fingerprint == by_autodiff.fingerprint
    for pair, matrices in ours.matrices.items():
        difference = (matrices - theirs.matrices[pair]).norm() / matrices.norm()
        assert difference < 1e-6, (pair, float(difference))


TABLES = ("gpt_neo", "opt", "biogpt", "gpt", "gpt_bigcode", "ctrl", "gptj", "codegen", "mpt")


@pytest.mark.parametrize("name", [*TABLES, "llama", "bloom", "mamba"])
def test_a_model_ends_where_its_table_of_positions_does(name: str) -> None:
    source = tiny(name)
    assert position_limit(source) == (64 if name in TABLES else None)
    source(input_ids=torch.ones(1, 64, dtype=torch.long))
    if name in TABLES:
        with pytest.raises((IndexError, RuntimeError)):
            source(input_ids=torch.ones(1, 65, dtype=torch.long))
    else:
        source(input_ids=torch.ones(1, 65, dtype=torch.long))


def test_sequences_beyond_the_positions_are_refused() -> None:
    model = ql.as_model(tiny("opt"))
    with pytest.raises(ValueError, match="65 long, but model 'OPTForCausalLM' has 64 positions"):
        ql.fit_transport(model, torch.full((1, 65), 5), progress=False)


def test_a_model_of_one_layer() -> None:
    config = transformers.OPTConfig(**FAMILIES["opt"][1] | {"num_hidden_layers": 1})
    model = ql.as_model(transformers.OPTForCausalLM(config).eval())
    transport = ql.fit_transport(model, torch.full((1, 3), 5), orders=("full",), progress=False)
    assert model.n_layers == 1 and torch.isfinite(transport.matrices["value", "full"]).all()


def test_a_parallel_layer_is_one_unit() -> None:
    model = ql.as_model(tiny("gpt_neox_parallel"))
    assert model.parallel and not model.has_submodules and model.linearisation == "hand-written"
    assert ql.as_model(tiny("gptj")).parallel and not ql.as_model(tiny("mamba")).has_submodules


def test_the_documented_table_is_the_newest_record() -> None:
    page = Path(__file__).parent.parent / "docs" / "models.md"
    assert table(newest()) in page.read_text(encoding="utf-8")
