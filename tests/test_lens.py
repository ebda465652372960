"""The lens's options, results and transitions: one list of options, results without a model, points of tuned lenses."""

import dataclasses
import gc
import inspect
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import transformers
import typer
from tiny_models import D_MODEL, LAYERS
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import querylens_fast as ql
from querylens_fast.analysis.configuration import KEYS, REFERENCE_NAMES
from querylens_fast.cli import app
from querylens_fast.dictionaries.rows import unit_rows
from querylens_fast.lens.options import LensOptions, described
from querylens_fast.lens.planning import plan

K = 4
OPTIONS = [f.name for f in dataclasses.fields(LensOptions)]


@pytest.fixture(scope="module")
def neurons(gpt2: ql.Model) -> ql.Dictionary:
    return ql.neuron_dictionary(gpt2, 1)


def test_one_list_of_options() -> None:
    """Fields of LensOptions are the keywords of `signatures`, keys of a run and flags of the command line."""
    parameters = inspect.signature(ql.signatures).parameters
    assert list(parameters) == ["dictionary", "model", *OPTIONS]
    assert all(parameters[name].default == getattr(LensOptions, name) for name in OPTIONS)
    assert list(described(LensOptions)) == OPTIONS
    assert all(f"{name}: " in str(ql.signatures.__doc__) for name in OPTIONS)
    in_memory, by_side = {"vectors"}, {"through_norms"}
    assert {REFERENCE_NAMES.get(name, name) for name in OPTIONS} - in_memory - by_side <= set(KEYS)
    command = typer.main.get_command(app).commands["signatures"]  # type: ignore[attr-defined]
    assert set(OPTIONS) - in_memory <= {p.name for p in command.params}


def test_the_identity_of_a_run_keeps_its_keys(gpt2: ql.Model, neurons: ql.Dictionary, sample: ql.Tokens) -> None:
    """Files begun by earlier versions have these keys and no others: without them they would not resume."""
    keys = [
        *("preset", "feature_vector", "stream_transition", "readout", "baseline", "k", "dictionary", "kind", "layer"),
        *("features", "n_features", "model", "fingerprint", "dtype", "convention", "final_norm", "transport"),
        *("tokens_digest", "tuned_lens", "adaptive_threshold", "token_change_value", "stats", "layers"),
    ]
    keys += ["hook_name", "hook_name_out"]  # which describe, and do not tell runs apart where they are missing
    lens = plan(neurons, gpt2, preset="query_lens_value", tokens=sample, n_features=3)
    assert list(lens.identity(torch.arange(3))) == keys
    lens = plan(neurons, gpt2, preset="query_lens_value", tokens=sample, n_features=3, submodule="mlp")
    assert lens.identity(torch.arange(3)).keys() == {*keys, "submodule"}


def test_a_pickled_result_holds_data_and_no_model(gpt2: ql.Model, neurons: ql.Dictionary, sample: ql.Tokens) -> None:
    options = {"preset": "query_lens_value_approx", "tokens": sample, "layers": True, "features": [3, 5], "k": K}
    found = ql.signatures(neurons, gpt2, **options)
    data = pickle.dumps(found)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert torch.equal(again.top_ids, found.top_ids) and again.top_tokens == found.top_tokens
    assert list(again.rows()) == list(found.rows())
    assert found.handle is not None and again.handle is None
    with pytest.raises(ValueError, match=r"without its model; ql\.scores_at"):
        again.scores_at([3], [1])
    bare = dataclasses.replace(gpt2, tokenizer=None)
    silent = pickle.loads(pickle.dumps(ql.signatures(neurons, bare, preset="logit_lens_value", features=[1], k=K)))
    with pytest.raises(ValueError, match="no strings"):
        silent.top_tokens  # noqa: B018


def test_a_result_lets_go_of_its_dictionary(gpt2: ql.Model) -> None:
    dictionary = ql.directions(torch.randn(5, D_MODEL), layer=1)
    alive = weakref.ref(dictionary.value_rows)
    found = ql.signatures(dictionary, gpt2, preset="logit_lens_value", k=K)
    del dictionary
    gc.collect()
    assert alive() is not None
    found.handle = None
    gc.collect()
    assert alive() is None and found.top_ids.shape == (5, K)


def test_a_tuned_lens_translates_at_the_point_where_a_dictionary_writes(gpt2: ql.Model, tmp_path: Path) -> None:
    """resid_pre of layer 2 is resid_post of layer 1; a point inside a layer has no translator."""
    generator = torch.Generator().manual_seed(0)
    params = {}
    for layer in range(LAYERS):
        params[f"{layer}.weight"] = torch.randn(D_MODEL, D_MODEL, generator=generator)
        params[f"{layer}.bias"] = torch.randn(D_MODEL, generator=generator)
    torch.save(params, tmp_path / "params.pt")
    options = {"preset": "tuned_lens", "tuned_lens": tmp_path / "params.pt", "k": K, "vectors": True}
    matrix = torch.randn(3, D_MODEL, dtype=torch.float64, generator=generator)
    after = ql.signatures(ql.directions(matrix, layer=1), gpt2, **options)
    before = ql.signatures(ql.directions(matrix, layer=2, point="resid_pre"), gpt2, **options)
    expected = matrix + matrix @ params["1.weight"].double().T + params["1.bias"].double()
    assert after.vectors is not None and torch.allclose(after.vectors, expected)
    assert before.vectors is not None and torch.equal(after.vectors, before.vectors)
    for layer, point in ((1, "resid_mid"), (0, "resid_pre")):
        with pytest.raises(ValueError, match=f"writes at 'blocks.{layer}.hook_{point}', but a tuned lens translates"):
            ql.signatures(ql.directions(matrix, layer=layer, point=point), gpt2, **options)


def test_submodules_and_norms_of_walks_and_transports(
    gpt2: ql.Model, neurons: ql.Dictionary, sample: ql.Tokens
) -> None:
    """The options reach features carried one by one; a transport that was fitted otherwise is refused."""
    options = {"preset": "query_lens_value", "k": K, "features": [2, 7]}
    fitted = ql.fit_transport(gpt2, sample, orders=("full",), submodule="mlp", through_norms=False, progress=False)
    given = ql.signatures(neurons, gpt2, transport=fitted, **options)
    walked = ql.signatures(neurons, gpt2, tokens=sample, submodule="mlp", through_norms=False, **options)
    both = ql.signatures(neurons, gpt2, tokens=sample, **options)
    assert torch.allclose(given.top_scores, walked.top_scores) and not torch.allclose(
        both.top_scores, walked.top_scores
    )
    for name, value in (("submodule", "both"), ("through_norms", True)):
        with pytest.raises(ValueError, match=f"fitted with {name}=.*, but this call has {name}={value}"):
            ql.signatures(neurons, gpt2, transport=fitted, **options, **{name: value})


def test_vectors_are_read_once(gpt2: ql.Model, sample: ql.Tokens) -> None:
    dictionary = ql.directions(torch.randn(40, D_MODEL), layer=1)
    reads: list[int] = []
    original = type(dictionary.value_rows).read

    class Counted(type(dictionary.value_rows)):  # type: ignore[misc]
        def read(self, ids):
            reads.append(len(ids))
            return original(self, ids)

    dictionary.value_rows = Counted(dictionary.value_rows.matrix)  # type: ignore[union-attr]
    transport = ql.fit_transport(gpt2, sample, energy="probes", n_probes=2, progress=False)
    options = {"preset": "query_lens_value_approx", "transport": transport, "layers": True, "tokens": sample}
    ql.signatures(dictionary, gpt2, block_rows=16, stats="exact", k=K, **options)
    assert sum(reads) == 40


def test_wrong_options_are_named(gpt2: ql.Model, neurons: ql.Dictionary) -> None:
    with pytest.raises(TypeError, match="unexpected option 'presett'; the options are preset, transport"):
        ql.signatures(neurons, gpt2, presett="logit_lens_key")
    for given, message in (
        ({"k": 2.5}, "k is 2.5; expected a whole number"),
        ({"format": "csv"}, "format is 'csv'; expected parquet, jsonl, None"),
        ({"submodule": "all"}, "submodule is 'all'; expected both, attn, mlp, None"),
        ({"max_memory_gib": 0}, "max_memory_gib is 0"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected auto, torch, triton"),
    ):
        with pytest.raises(ValueError, match=message):
            LensOptions(preset="logit_lens_key", **given)  # type: ignore[arg-type]


def test_an_embedded_model_is_not_evaluated_for_a_dictionary_of_another(tmp_path: Path) -> None:
    for given in (["--dictionary", str(tmp_path / "none")], ["--tokens", "x.txt"]):
        result = CliRunner().invoke(app, ["evaluate", "input", *given])
        assert result.exit_code == 2 and "give --model too" in result.stderr


class WidestFloat32(TorchDispatchMode):
    """Records the size of the largest float32 tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("preset", ["logit_lens_value", "logit_lens_key", "key_identity_embed_cosine_centered"])
def test_a_bfloat16_model_is_read_out_in_bfloat16(preset: str) -> None:
    """The unembedding is never widened as a whole, and features enter the product in its dtype."""
    config = transformers.GPT2Config(vocab_size=50_000, n_embd=256, n_layer=1, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = ql.as_model(transformers.GPT2LMHeadModel(config).bfloat16().eval())
    lens = plan(ql.directions(torch.randn(50, 256), layer=0), model, preset=preset, k=K)
    assert lens.scorer.W.dtype == torch.bfloat16 and lens.scorer.W.data_ptr() == model.W_U.data_ptr()
    assert lens.scorer.prepare(torch.randn(2, 256))[0].dtype == torch.bfloat16
    with WidestFloat32() as seen:
        lens = plan(lens.dictionary, model, preset=preset, k=K)
        found = lens(*lens.read())
    assert 0 < seen.elements < model.W_U.numel() / 2
    scores = lens.scores_at(None, torch.arange(50_000))
    assert torch.allclose(found.top_scores, scores.topk(K).values)


def test_rows_of_any_length_become_unit_rows() -> None:
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for length in (1e-4, 1e19, 1e30):
        assert torch.allclose(unit_rows(rows * length), unit_rows(rows), rtol=1e-5)
