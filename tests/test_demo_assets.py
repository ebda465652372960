"""The embedded model and its dictionaries are as good as their report says, and their training runs and repeats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from examples.demo_model import corpus, dictionaries, language_model
from examples.demo_model.dictionaries import Dictionary
from examples.demo_model.train import SMOKE, read_model, train
from querylens_fast.demo import ASSETS

DICTIONARIES = ["sae_layer0", "sae_layer1", "sae_layer2", "sae_layer3", "transcoder_layer1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread, and for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((ASSETS / "training_report.json").read_text())


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return read_model(ASSETS / "model")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return load_file(ASSETS / "tokens.safetensors")["tokens"]


@pytest.fixture(scope="module")
def activations(model: GPT2LMHeadModel, tokens: Tensor) -> dict[str, Tensor]:
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.config.n_layer)]
    hooks += ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]
    kept = language_model.activations(model, tokens, hooks)
    return {name: each[:, 1:].flatten(0, 1) for name, each in kept.items()}


def test_assets_are_complete_and_small(report: dict) -> None:
    names = {path.name for path in ASSETS.iterdir()}
    assert {"model", "tokens.safetensors", "training_report.json", "README.md", "LICENSE-PYTHON.txt"} <= names
    assert {name for name in names if "layer" in name} == set(DICTIONARIES) == set(report["dictionaries"])
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 20e6
    assert "PSF-2.0" in (ASSETS / "README.md").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (ASSETS / "LICENSE-PYTHON.txt").read_text()


def test_tokenizer_round_trips_and_keeps_end_and_pad_apart() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    source = "def résumé(x: int) -> str:\n\treturn f'{x!r}'  # 三\n"
    assert tokenizer.decode(tokenizer(source).input_ids) == source
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1
    assert len(tokenizer) == 4096


def test_sample_is_held_out_text_without_padding(tokens: Tensor) -> None:
    mask = load_file(ASSETS / "tokens.safetensors")["valid_mask"]
    assert tokens.shape == mask.shape == (256, 64)
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool and mask.all()
    assert (tokens != 1).all() and int(tokens.max()) < 4096


def test_language_model_beats_the_bigram_on_the_sample(model: GPT2LMHeadModel, tokens: Tensor, report: dict) -> None:
    figures = report["language_model"]
    loss = language_model.model_loss(model, tokens)
    assert loss == pytest.approx(figures["sample_loss"], abs=5e-3)
    assert loss < figures["sample_bigram_loss"] - 0.8
    assert figures["held_out_loss"] < figures["bigram_held_out_loss"] - 0.8
    assert figures["curve"][-1][0] == report["settings"]["model"]["steps"]
    assert figures["curve"][-1][1] < figures["curve"][0][1]


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_explains_the_sample(name: str, activations: dict[str, Tensor], report: dict) -> None:
    figures = report["dictionaries"][name]
    dictionary = dictionaries.read_dictionary(ASSETS / name)
    hook_out = dictionary.hook_name_out or dictionary.hook_name
    result = dictionaries.quality(dictionary, activations[dictionary.hook_name], activations[hook_out])
    assert len(result.fired) == figures["features"] >= 2048
    assert result.explained_variance >= 0.7
    assert result.explained_variance == pytest.approx(figures["explained_variance"], abs=0.05)
    assert result.l0 == pytest.approx(figures["l0"], rel=0.15) == pytest.approx(figures["k"], rel=0.25)
    assert figures["dead_fraction"] < 0.05 and figures["dead_tokens"] >= 200_000
    assert figures["loss_clean"] < figures["loss_spliced"] < figures["loss_zero"]
    norms = dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_sae_lens_reads_the_same_dictionary(name: str, activations: dict[str, Tensor]) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    dictionary = dictionaries.read_dictionary(ASSETS / name)
    loaded = sae_lens.SAE.load_from_disk(str(ASSETS / name))
    assert loaded.cfg.metadata.hook_name == dictionary.hook_name
    assert loaded.cfg.metadata.hook_name_out == dictionary.hook_name_out
    assert loaded.W_dec.dtype == torch.float32
    inputs = activations[dictionary.hook_name][:512].float()
    with torch.no_grad():
        features = dictionary.encode(inputs)
        torch.testing.assert_close(loaded.encode(inputs), features)
        torch.testing.assert_close(loaded.decode(features), dictionary.decode(features))


def test_training_runs_and_repeats(tmp_path: Path) -> None:
    reports = [train(tmp_path / name, SMOKE, seed=3) for name in ("first", "second")]
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert Path("sae_layer1/cfg.json") in files and Path("transcoder_layer1/sae_weights.safetensors") in files
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}, "unfinished work is removed"
    for file in files:
        if file.name != "training_report.json":
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    first, second = ({**r["language_model"], "seconds": 0} for r in reports)
    assert first == second
    assert reports[0]["dictionaries"]["sae_layer0"]["l0"] == reports[1]["dictionaries"]["sae_layer0"]["l0"]


def test_broken_off_training_goes_on_as_if_unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = SMOKE.model
    stream = torch.randint(size.vocab_size, (5000,), generator=torch.Generator().manual_seed(0))
    whole = language_model.new_model(size, 0, 1, seed=0)
    language_model.train_model(whole, stream, size, 0, tmp_path / "whole.pt", every=4)

    def break_off(stream: Tensor, size: language_model.ModelSize, seed: int, step: int) -> Tensor:
        if step == 10:
            raise KeyboardInterrupt
        return batch(stream, size, seed, step)

    batch = language_model.training_batch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(language_model, "training_batch", break_off)
        broken = language_model.new_model(size, 0, 1, seed=0)
        language_model.train_model(broken, stream, size, 0, tmp_path / "broken.pt", every=4)
    resumed = language_model.new_model(size, 0, 1, seed=9)
    run = language_model.train_model(resumed, stream, size, 0, tmp_path / "broken.pt", every=4)
    assert [step for step, _ in run.curve] == [4, 8, 12]
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_trained_transcoder_folds_scale_and_mean() -> None:
    """A linear map of shifted, scaled inputs is learned in the units of the data."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.relu(torch.randn(4096, 12, generator=generator) - 1)
    inputs = 30 * codes @ torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:12] + 5
    targets = 0.1 * inputs.flip(1) - 2
    size = dictionaries.DictionarySize(features=64, k=4, batch=512, steps=300, learning_rate=1e-2)
    for hook_out, goal in ((None, inputs), ("blocks.0.hook_mlp_out", targets)):
        dictionary = dictionaries.train_dictionary(inputs, goal, "blocks.0.hook", hook_out, size, seed=0)
        result = dictionaries.quality(dictionary, inputs, goal)
        assert result.explained_variance > 0.9
        assert result.l0 == pytest.approx(4, rel=0.3)


def test_dictionary_survives_saving(tmp_path: Path) -> None:
    weights = [torch.randn(shape) for shape in ((4, 6), (6,), (6, 4), (4,), (6,))]
    dictionary = Dictionary("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", *(w.half().float() for w in weights))
    dictionaries.save_dictionary(dictionary, tmp_path / "saved", "tiny")
    for left, right in zip(dictionary, dictionaries.read_dictionary(tmp_path / "saved"), strict=True):
        same = torch.equal(left, right) if isinstance(left, Tensor) and isinstance(right, Tensor) else left == right
        assert same


def test_library_is_read_without_tests_and_tables(tmp_path: Path) -> None:
    for name in ("code.py", "test/test_code.py", "encodings/cp437.py", "_sysconfigdata_linux.py", "email/tests/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("topics = {'with': 'The\\nwith statement', 'assert': 'Asserts'}\n")
    texts = {document.name: document.text for document in corpus.standard_library(tmp_path)}
    assert texts == {
        "code.py": "x = 1\n",
        "pydoc_data/topics.py#assert": "Asserts",
        "pydoc_data/topics.py#with": "The\nwith statement",
    }
    with pytest.raises(FileNotFoundError, match="no Python source"):
        corpus.standard_library(tmp_path / "nowhere")


def test_split_depends_on_names_alone() -> None:
    assert corpus.is_held_out("typing.py") and not corpus.is_held_out("argparse.py")
    share = sum(corpus.is_held_out(f"module{number}.py") for number in range(4000)) / 4000
    assert share == pytest.approx(0.05, abs=0.015)


def test_bigram_is_a_distribution() -> None:
    stream = torch.randint(7, (200,), generator=torch.Generator().manual_seed(1))
    stream[stream == 3] = 2  # a token never seen still has a follower and a probability
    bigram = corpus.fit_bigram(stream, 7)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    probabilities = torch.tensor([corpus.bigram_loss(bigram, pair[None]) for pair in pairs]).neg().exp().view(7, 7)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(7), rtol=1e-5, atol=0)


def test_streams_shorter_than_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than one row"):
        corpus.chunks(torch.arange(5), 8)


def test_unknown_hooks_are_refused(model: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match="hook_resid_mid"):
        language_model.site(model, "blocks.0.hook_resid_mid")
