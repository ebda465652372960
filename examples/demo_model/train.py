"""Trains the embedded example from the standard library of the Python that runs it, and measures what it ships.

    python -m examples.demo_model.train [--out DIR] [--seed 0] [--smoke]

Writes a GPT-2 with its tokenizer, a sparse autoencoder for every layer's residual stream, a transcoder, a held-out
token sample and `training_report.json`, whose figures are measured on the saved float16 files after reading them back.
A run that is broken off goes on where it was when started again with the same arguments. About half an hour on two
cores with bfloat16 instructions, given memory that is not handed back after every step, which glibc does with
MALLOC_TOP_PAD_=500000000 MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000 in the environment; about
twice that without.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from querylens_fast.demo import ASSETS

from .corpus import (
    END,
    LICENCE,
    PAD,
    Document,
    chunks,
    fit_bigram,
    spread_sample,
    standard_library,
    token_stream,
    train_tokenizer,
)
from .dictionaries import Dictionary, DictionarySize, read_dictionary, save_dictionary, train_dictionary
from .language_model import ModelSize, activations, new_model, train_model
from .report import Text, corpus_report, dictionary_report, language_model_report, plain, splice_report, without_first

logger = logging.getLogger(__name__)

MODEL_NAME = "querylens-demo"
NOTICE = f"""# Where these files come from

Made by `python -m examples.demo_model.train`; the figures are in `training_report.json`.

- `model/`: a GPT-2 (transformers) with a byte-level BPE tokenizer, weights in float16.
- `sae_layer*/`, `transcoder_layer*/`: JumpReLU dictionaries in sae-lens's format, weights in float16.
- `tokens.safetensors`: `tokens` [B, S] int64 and `valid_mask` [B, S] bool, contiguous pieces of held-out text.

All were trained on, and the token sample is taken from, the source and documentation of the Python standard library,
used under the Python Software Foundation License Version 2 ({LICENCE}). {sys.copyright.splitlines()[0]}
All Rights Reserved. `LICENSE-PYTHON.txt`, copied from that Python, is the full text; some modules name further
copyright holders in their source. The text was changed: cut into tokens, and into pieces.
"""


class Settings(NamedTuple):
    """Everything a run depends on besides the seed and the Python it reads.

    Attributes:
        model: the language model.
        autoencoder: every autoencoder.
        transcoder: every transcoder.
        transcoder_layers: the layers that get one.
        activation_rows: rows of training text the dictionaries learn from.
        sample_rows: rows of the token sample.
        sample_length: tokens a row of the sample.
        characters: where to stop reading each split of the corpus; None reads all.
    """

    model: ModelSize = ModelSize()
    autoencoder: DictionarySize = DictionarySize()
    # At the autoencoders' rate a third of a transcoder's features fall silent for good.
    transcoder: DictionarySize = DictionarySize(k=48, learning_rate=1e-3)
    transcoder_layers: tuple[int, ...] = (1,)
    activation_rows: int = 8192
    sample_rows: int = 256
    sample_length: int = 64
    characters: int | None = None


SMOKE = Settings(
    model=ModelSize(vocab_size=320, d_model=32, layers=2, context=32, batch=8, steps=12),
    autoencoder=DictionarySize(features=64, k=4, batch=128, steps=25),
    transcoder=DictionarySize(features=64, k=4, batch=128, steps=25),
    transcoder_layers=(1,),
    activation_rows=64,
    sample_rows=16,
    sample_length=16,
    characters=60_000,
)


def train(out: Path, settings: Settings | None = None, seed: int = 0, work: Path | None = None) -> dict[str, Any]:
    """Trains everything, writes it to `out` and returns the report that stands there too.

    Args:
        out: folder for the assets; files of an earlier run are replaced.
        settings: sizes and lengths; by default those of the shipped assets.
        seed: fixes weights and batches. The same seed, Python, library versions, processor and number of threads give
            the same files.
        work: folder for unfinished work, removed at the end; by default beside `out`.

    Returns:
        The report: corpus, language model, dictionaries, versions, sizes and times.
    """
    began = time.perf_counter()
    settings = settings or Settings()
    documents = _first(standard_library(), settings.characters)
    digest = hashlib.sha256("\0".join(part for d in documents for part in (d.name, d.text)).encode()).hexdigest()
    # Named by all it depends on, so that a run can only go on from its own work.
    run = hashlib.sha256(repr((settings, seed, digest)).encode()).hexdigest()[:12]
    work = (work or out.with_name(out.name + ".work")) / run
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    logger.info("unfinished work is kept in %s", work)

    text = _prepare_text(documents, settings.model, out / "model")
    sample = spread_sample(text.held_out, settings.sample_rows, settings.sample_length)
    tensors = {"tokens": sample, "valid_mask": torch.ones_like(sample, dtype=torch.bool)}
    save_file(tensors, out / "tokens.safetensors")

    model = new_model(settings.model, end_id=0, pad_id=1, seed=seed)
    fit = train_model(model, text.train, settings.model, seed, work / "language_model.pt")
    model.half().save_pretrained(out / "model")
    model = read_model(out / "model")
    language_model = language_model_report(model, text, sample) | {"curve": fit.curve, "seconds": fit.seconds}
    logger.info(
        "language model: held-out loss %.3f nats a token (training %.3f), bigram %.3f",
        *(language_model[name] for name in ("held_out_loss", "train_loss", "bigram_held_out_loss")),
    )
    dictionaries = _train_dictionaries(model, text, sample, settings, seed, out, work)
    report = {
        "model_name": MODEL_NAME,
        "seed": seed,
        "settings": plain(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "threads": torch.get_num_threads(),
        "corpus": corpus_report(text, digest),
        "language_model": language_model,
        "dictionaries": dictionaries,
        "training_seconds": fit.seconds + sum(each["seconds"] for each in dictionaries.values()),
        "wall_seconds_of_last_start": time.perf_counter() - began,
    }
    (out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")
    _write_notice(out)
    shutil.rmtree(work)
    if not any(work.parent.iterdir()):
        work.parent.rmdir()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    logger.info("wrote %s (%.1f MB)", out, size / 1e6)
    return report


def read_model(folder: Path) -> GPT2LMHeadModel:
    """The language model of a folder, in float32 and evaluation mode."""
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[return-value]


def _first(documents: list[Document], characters: int | None) -> list[Document]:
    """The documents of each split up to the given number of characters."""
    if characters is None:
        return documents
    taken, kept = {True: 0, False: 0}, []
    for document in documents:
        if taken[document.held_out] < characters:
            kept.append(document._replace(text=document.text[: characters - taken[document.held_out]]))
            taken[document.held_out] += len(kept[-1].text)
    return kept


def _prepare_text(documents: list[Document], size: ModelSize, tokenizer_folder: Path) -> Text:
    """Trains and saves the tokenizer, tokenises both splits and fits the bigram model."""
    train_texts = [d.text for d in documents if not d.held_out]
    tokenizer = train_tokenizer(train_texts, size.vocab_size, size.context)
    if tokenizer.convert_tokens_to_ids([END, PAD]) != [0, 1]:
        raise RuntimeError(f"the tokenizer did not give {END} and {PAD} the ids 0 and 1")
    tokenizer.save_pretrained(tokenizer_folder)
    stream = token_stream(tokenizer, train_texts, "training")
    held_out = token_stream(tokenizer, [d.text for d in documents if d.held_out], "held-out")
    logger.info("%d training tokens, %d held-out tokens, %d documents", len(stream), len(held_out), len(documents))
    return Text(documents, stream, held_out, fit_bigram(stream, size.vocab_size))


def _train_dictionaries(
    model: GPT2LMHeadModel, text: Text, sample: Tensor, settings: Settings, seed: int, out: Path, work: Path
) -> dict[str, Any]:
    """Trains, saves and measures every dictionary: folder name to its figures."""
    context, layers = model.config.n_positions, model.config.n_layer
    plan: list[tuple[str, str, str | None]] = [
        (f"sae_layer{layer}", f"blocks.{layer}.hook_resid_post", None) for layer in range(layers)
    ]
    for layer in settings.transcoder_layers:
        plan.append((f"transcoder_layer{layer}", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"))

    hooks = sorted({name for _, *hook_names in plan for name in hook_names if name})
    rows = chunks(text.train, context)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: settings.activation_rows]]
    known, held_out = (activations(model, part, hooks) for part in (rows, chunks(text.held_out, context)))
    report = {}
    for number, (name, hook, hook_out) in enumerate(plan):
        size = settings.transcoder if hook_out else settings.autoencoder
        began, saved = time.perf_counter(), work / f"{name}.pt"
        if saved.exists():
            fields, seconds = torch.load(saved, weights_only=True)
            dictionary = Dictionary(*fields)
        else:
            inputs, targets = without_first(known[hook]), without_first(known[hook_out or hook])
            dictionary = train_dictionary(inputs, targets, hook, hook_out, size, seed + 1 + number)
            seconds = time.perf_counter() - began
            torch.save((tuple(dictionary), seconds), saved)
        save_dictionary(dictionary, out / name, MODEL_NAME)
        figures = dictionary_report(read_dictionary(out / name), known, held_out)
        figures |= splice_report(model, read_dictionary(out / name), sample)
        report[name] = {"k": size.k, **figures, "seconds": seconds}
        logger.info(
            "%s: L0 %.1f, explained variance %.3f, dead %.2f %%, loss recovered %.3f",
            name,
            figures["l0"],
            figures["explained_variance"],
            100 * figures["dead_fraction"],
            figures["loss_recovered"],
        )
    return report


def _write_notice(out: Path) -> None:
    """Writes the notice, and the licence where this Python carries its text."""
    (out / "README.md").write_text(NOTICE)
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        (out / "LICENSE-PYTHON.txt").write_text(licence.read_text())
    else:
        logger.warning("this Python carries no LICENSE.txt: add the text of its licence to %s", out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded example from Python's own standard library.")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the assets (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for unfinished work (default: beside --out)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")
    parser.add_argument("--smoke", action="store_true", help="a tiny run of a few seconds, to see that it works")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options.out, SMOKE if options.smoke else None, options.seed, options.work)


if __name__ == "__main__":
    main()
