"""Text that every Python installation carries, its tokenizer, its token streams and a bigram baseline.

The text is the standard library's source with its docstrings, and the language reference that `pydoc` shows
(Python Software Foundation License Version 2). Files are split into train and held-out by a hash of their path, so that
the split depends neither on the order of the files nor on a seed.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END, PAD = "<|endoftext|>", "<|pad|>"
LICENCE = "PSF-2.0"

# Tests are left out because much of them is data; the others because they are tables made by machines, or, as
# _sysconfigdata, describe the machine that built this Python.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "msilib",
}
_SKIPPED_FILES = {"html/entities.py", "lib2to3/pygram.py", "__phello__.foo.py", "sitecustomize.py"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "__phello__")
_TOPICS = "pydoc_data/topics.py"


class Document(NamedTuple):
    """One text of the corpus.

    Attributes:
        name: path relative to the standard library, with the topic after `#` for the language reference.
        text: the whole text.
        held_out: True where the language model never trains on it.
    """

    name: str
    text: str
    held_out: bool


class Bigram(NamedTuple):
    """An interpolated Kneser-Ney bigram model over V tokens.

    Attributes:
        pairs: [P] int64, sorted; `first * V + second` for every pair seen.
        discounted: [P] float64, the discounted relative frequency of each pair given its first token.
        backoff: [V] float64, the probability mass each first token leaves to `continuation`.
        continuation: [V] float64, sums to one: how many different tokens each token follows, plus one.
    """

    pairs: Tensor
    discounted: Tensor
    backoff: Tensor
    continuation: Tensor


def is_held_out(name: str, percent: int = 5) -> bool:
    """Whether the document of this name belongs to the held-out split (about `percent` of all names)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


def standard_library(root: Path | None = None) -> list[Document]:
    """Reads the standard library, sorted by name.

    Args:
        root: the folder to read; by default the standard library of the running Python.

    Raises:
        FileNotFoundError: if the folder holds no readable source (a Python shipped without its sources).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = [Document(name, text, is_held_out(name)) for name, text in _texts(root) if text.strip()]
    if not documents:
        raise FileNotFoundError(f"no Python source under {root}: run this with a Python that ships its library as .py")
    return documents


def _texts(root: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of the files to read."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        skipped = _SKIPPED_FOLDERS.intersection(name.split("/")[:-1]) or name in _SKIPPED_FILES
        if skipped or name.startswith(_SKIPPED_PREFIXES):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            logger.warning("left out %s: %s", name, error)
            continue
        # The language reference is stored as escaped string literals: what they say is text, not how they are written.
        yield from _topics(text) if name == _TOPICS else [(name, text)]


def _topics(source: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the language reference's topics, from the source of `pydoc_data.topics`."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            topics = ast.literal_eval(statement.value)
            yield from ((f"{_TOPICS}#{topic}", topics[topic]) for topic in sorted(topics))


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer.

    Args:
        texts: the training texts.
        vocab_size: tokens in all, the 256 bytes and the two special tokens included.
        max_length: the model's context, in tokens.

    Returns:
        A tokenizer whose bos and eos token is `<|endoftext|>` (id 0) and whose pad token is `<|pad|>` (id 1).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], name: str) -> Tensor:
    """Token ids of the texts one after the other, `<|endoftext|>` after each: [N] int64."""
    ids: list[int] = []
    for text in tqdm(texts, desc=f"tokens, {name}", unit="text"):
        ids += tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids.append(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    return torch.tensor(ids)


def chunks(stream: Tensor, length: int) -> Tensor:
    """The stream cut into rows, [N // length, length]; what is left over at the end is dropped.

    Raises:
        ValueError: if the stream is shorter than one row.
    """
    rows = len(stream) // length
    if rows == 0:
        raise ValueError(f"the stream holds {len(stream)} tokens, fewer than one row of {length}: give it more text")
    return stream[: rows * length].view(rows, length)


def spread_sample(stream: Tensor, rows: int, length: int) -> Tensor:
    """At most `rows` contiguous pieces of `length` tokens, evenly spread over the stream: [rows, length]."""
    pieces = chunks(stream, length)
    picked = torch.linspace(0, len(pieces) - 1, min(rows, len(pieces))).long()
    return pieces[picked].contiguous()


def fit_bigram(stream: Tensor, vocab_size: int, discount: float = 0.75) -> Bigram:
    """Fits an interpolated Kneser-Ney bigram model.

    Args:
        stream: [N] int64 training tokens.
        vocab_size: V.
        discount: taken off every pair's count and given to the continuation distribution.
    """
    pairs, counts = torch.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    totals = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, first, counts.double())
    followers = torch.bincount(first, minlength=vocab_size).double()
    # One more than seen for every token, so that none has probability zero.
    continuation = torch.bincount(second, minlength=vocab_size).double() + 1
    backoff = torch.where(totals > 0, discount * followers / totals.clamp(min=1), 1.0)
    return Bigram(pairs, (counts - discount) / totals[first], backoff, continuation / continuation.sum())


def bigram_loss(bigram: Bigram, rows: Tensor) -> float:
    """Mean negative log-likelihood, in nats a token, of every token but the first in each row of [B, S]."""
    first, second = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    keys = first * len(bigram.continuation) + second
    place = torch.searchsorted(bigram.pairs, keys).clamp(max=len(bigram.pairs) - 1)
    seen = torch.where(bigram.pairs[place] == keys, bigram.discounted[place], 0.0)
    return float(-(seen + bigram.backoff[first] * bigram.continuation[second]).log().mean())
