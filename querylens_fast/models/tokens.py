"""Token samples: the corpus over which Jacobians are averaged.

A sample is `Tokens`: ids [B, S] int64 and a mask of the valid (non-pad) positions. `load_tokens` reads a safetensors
file of ids, a text file, or a `datasets` name; whatever is drawn at random is drawn from a seed, and the sample can be
saved beside the result it belongs to. A corpus that cannot be loaded is an error, never a random stand-in.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.runs.input_file import fits_memory, read_text
from querylens_fast.runs.sealed_tensors import check_seal, write_tensors

logger = logging.getLogger(__name__)

DOCUMENTS_PER_JOIN = 1000
REFERENCE_HOLDOUT = 1000


@dataclass(frozen=True)
class Tokens:
    """A token sample: ids [B, S] int64 and valid_mask [B, S] bool (or zeros and ones), both on the CPU."""

    ids: Tensor
    valid_mask: Tensor
    source: str = "memory"
    details: dict[str, str] = field(default_factory=dict)
    mask_is_known: bool = True
    """False: nobody has said what is padding, so `as_tokens` asks the model."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.numel() == 0:
            raise ValueError(
                f"tokens from {self.source} are {list(self.ids.shape)}; expected [B, S] with at least one token"
            )
        _check_ids(self.ids, f"tokens from {self.source}")
        object.__setattr__(self, "valid_mask", _as_mask(self.valid_mask, self.source))
        if self.valid_mask.shape != self.ids.shape:
            raise ValueError(
                f"tokens from {self.source}: valid_mask is {list(self.valid_mask.shape)} but tokens are "
                f"{list(self.ids.shape)}"
            )
        if not bool(self.valid_mask.any()):
            raise ValueError(f"tokens from {self.source}: every position is padding, so there is nothing to average")

    @property
    def n_valid(self) -> int:
        """N, the number of valid positions."""
        return int(self.valid_mask.sum())

    @property
    def digest(self) -> str:
        """A hash of ids and mask, recorded with every transport fitted on them."""
        data = self.ids.contiguous().numpy().tobytes() + self.valid_mask.contiguous().numpy().tobytes()
        return hashlib.sha256(str(tuple(self.ids.shape)).encode() + data).hexdigest()[:32]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load_tokens` reads back, whole or not at all."""
        tensors = {"tokens": self.ids}
        if self.mask_is_known:
            tensors["valid_mask"] = self.valid_mask
        write_tensors(Path(path), tensors, {"source": self.source, **self.details})

    def head(self, n: int) -> Tokens:
        """The first n sequences."""
        return replace(self, ids=self.ids[:n], valid_mask=self.valid_mask[:n])


def as_tokens(tokens: Any, model: Any = None) -> Tokens:
    """`Tokens` from `Tokens`, an id tensor [B, S], or nested lists of ids; pads by the model's pad token."""
    if isinstance(tokens, Tokens):
        mask = tokens.valid_mask if tokens.mask_is_known else None
        checked = _checked(tokens.ids, mask, model, tokens.source, tokens.details)
        return tokens if checked.mask_is_known == tokens.mask_is_known else checked
    if isinstance(tokens, (str, Path)):
        return load_tokens(tokens, model=model)
    if isinstance(tokens, Mapping) and "input_ids" in tokens:  # a tokenizer's BatchEncoding
        ids, mask = _rows(tokens["input_ids"])
        given = tokens.get("attention_mask")
        if given is not None:
            mask = _as_mask(_rows(given, "attention_mask")[0], "memory")
        return _checked(ids, mask, model, "memory", {})
    if isinstance(tokens, list | tuple) and tokens and all(isinstance(t, str) for t in tokens):
        encoded = _tokenizer(model)(list(tokens), add_special_tokens=False)["input_ids"]
        return _checked(*_rows(encoded), model, "memory", {})
    return _checked(*_rows(tokens), model, "memory", {})


def _rows(tokens: Any, name: str = "tokens") -> tuple[Tensor, Tensor | None]:
    """Ids [B, S] int64 of a tensor, nested lists or a list of tensors; unequal rows are padded, with a mask [B, S]."""
    mask = None
    if isinstance(tokens, list | tuple):
        tokens = [t.tolist() if isinstance(t, Tensor) else t for t in tokens]
    if isinstance(tokens, list | tuple) and len({len(t) for t in tokens if isinstance(t, list | tuple)}) > 1:
        width = max(len(row) for row in tokens)
        mask = torch.tensor([[i < len(row) for i in range(width)] for row in tokens])
        tokens = [[*row, *[0] * (width - len(row))] for row in tokens]
    try:
        ids = torch.as_tensor(tokens).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is a {type(tokens).__name__} that is no [B, S] of integer ids ({error})") from error
    if name == "tokens":
        _check_ids(ids, name)
        ids = ids.long()
    return ids, mask


def _check_ids(ids: Tensor, name: str) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype} and shape {list(ids.shape)}; expected integer token ids")


def _as_mask(given: Any, source: str) -> Tensor:
    """A mask as bool. Raises ValueError where it holds more than zeros and ones, as additive or soft masks do."""
    mask = torch.as_tensor(given).detach().cpu()
    strange = mask[(mask != 0) & (mask != 1)]
    if len(strange):
        raise ValueError(
            f"tokens from {source}: the mask holds {strange[0].item()}; expected only 1 (valid) and 0 (padding)"
        )
    return mask.bool()


def load_tokens(
    source: str | Path | Tensor,
    *,
    model: Any = None,
    num_samples: int | None = None,
    max_length: int = 32,
    seed: int = 42,
    split: str = "train",
    column: str = "text",
) -> Tokens:
    """Load a token sample.

    Args:
        source: A safetensors file with ``tokens`` [B, S] and optionally ``valid_mask`` [B, S]; a text file; a
            `datasets` name (as in the reference: "NeelNanda/pile-10k"); or ids already in memory.
        model: The model, for its tokenizer, pad token and vocabulary. Needed for text and datasets.
        num_samples: Sequences to draw with the seed. Default: all of a file, 1024 of a dataset.
        max_length: Tokens a sequence, for text and datasets.
        seed: Of the draw.
        split: The dataset's split.
        column: The dataset's text column.

    Raises:
        FileNotFoundError: The file or dataset cannot be had.
        ValueError: The file is damaged, holds no tokens, or ids outside the model's vocabulary.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; expected at least 1")
    if not isinstance(source, (str, Path)):
        if _is_dataset(source):
            dataset: Any = source
            if column not in dataset.column_names:
                raise ValueError(f"the dataset has columns {dataset.column_names}; none is named {column!r}")
            rows = tokenize_and_concatenate(dataset[column], _tokenizer(model), max_length)
            if not len(rows):
                raise ValueError(f"the dataset has fewer than {max_length} tokens, not enough for one sequence")
            return _checked(*_draw(rows, None, num_samples, seed), model, "dataset", {"seed": str(seed)})
        known = as_tokens(source, model)
        ids, mask = _draw(known.ids, known.valid_mask, num_samples, seed)
        return known if num_samples is None else replace(known, ids=ids, valid_mask=mask)
    path, details = Path(source), {"seed": str(seed), "max_length": str(max_length)}
    if path.suffix == ".safetensors":
        ids, mask = _read_safetensors(path)
        ids, mask = _draw(ids, mask, num_samples, seed)
        return _checked(ids, mask, model, str(source), details)
    if path.suffix in (".txt", ".md", ".py", ".rst"):
        if not path.is_file():
            raise FileNotFoundError(f"text file {str(path)!r} does not exist")
        rows = tokenize_and_concatenate([read_text(path)], _tokenizer(model), max_length)
    elif path.suffix in (".jsonl", ".parquet"):
        rows = tokenize_and_concatenate(_column(path, column), _tokenizer(model), max_length)
    elif path.exists():
        raise ValueError(
            f"{str(path)!r}: token files are .safetensors, text files .txt, .md, .rst or .py, tables .jsonl or .parquet"
        )
    else:
        rows = tokenize_and_concatenate(_dataset_texts(str(source), split, column), _tokenizer(model), max_length)
        if len(rows) > 2 * REFERENCE_HOLDOUT:  # the reference leaves the last thousand rows out of its draw
            rows = rows[:-REFERENCE_HOLDOUT]
        num_samples = num_samples or 1024
        details |= {"split": split, "column": column}
    if not len(rows):
        raise ValueError(f"{str(source)!r} has fewer than {max_length} tokens, not enough for one sequence")
    ids, _ = _draw(rows, None, num_samples, seed)
    return _checked(ids, None, model, str(source), details)


def _read_safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"token file {str(path)!r} does not exist")
    try:
        with fits_memory(path):
            check_seal(path)
            tensors = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"token file {str(path)!r} is damaged or truncated: {error}") from error
    if "tokens" not in tensors:
        raise ValueError(f"token file {str(path)!r} holds {sorted(tensors)}; expected a tensor named 'tokens' [B, S]")
    ids, mask = tensors["tokens"], tensors.get("valid_mask")
    _check_ids(ids, f"token file {str(path)!r}: 'tokens'")
    ids = ids[None] if ids.ndim == 1 else ids
    mask = mask[None] if mask is not None and mask.ndim == 1 else mask
    return ids.long(), mask if mask is None else _as_mask(mask, str(path))


def _checked(ids: Tensor, mask: Tensor | None, model: Any, source: str, details: dict[str, str]) -> Tokens:
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"tokens from {source} are {list(ids.shape)}; expected ids [B, S]")
    vocab = getattr(model, "vocab_size", None)
    positions = getattr(model, "max_positions", None)
    if positions is not None and ids.shape[-1] > positions:
        raise ValueError(
            f"tokens from {source} are {ids.shape[-1]} long, but model {model.name!r} has {positions} positions; cut "
            "them shorter"
        )
    if ids.numel() and (int(ids.min()) < 0 or (vocab is not None and int(ids.max()) >= vocab)):
        worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(f"tokens from {source}: id {worst} is outside the model's vocabulary of {vocab}")
    if mask is not None:
        return Tokens(ids, mask, source, details)
    pad = getattr(model, "pad_token_id", None)
    valid = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids.ne(pad)
    return Tokens(ids, valid, source, details, mask_is_known=model is not None)


def _draw(ids: Tensor, mask: Tensor | None, n: int | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """n rows drawn with replacement by the seed (the reference's draw); all rows, in order, for n None."""
    if n is None:
        return ids, mask
    if n < 1:
        raise ValueError(f"num_samples is {n}; expected at least 1")
    if n > len(ids):
        logger.warning("num_samples is %d, but the corpus has %d sequences: some are drawn more than once", n, len(ids))
    picked = torch.randint(0, len(ids), (n,), generator=torch.Generator().manual_seed(seed))
    return ids[picked], None if mask is None else mask[picked]


def _is_dataset(source: Any) -> bool:
    """Whether it is a `datasets.Dataset`, recognised without importing the package."""
    return hasattr(source, "column_names") and type(source).__module__.startswith("datasets")


def _column(path: Path, column: str) -> list[str]:
    """The texts of one column of a .jsonl or Parquet file."""
    if not path.is_file():
        raise FileNotFoundError(f"text file {str(path)!r} does not exist")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            texts = pq.read_table(path, columns=[column])[column].to_pylist()
        else:
            texts = [json.loads(line)[column] for line in read_text(path).splitlines() if line.strip()]
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as rows with a text column {column!r} ({error})") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{str(path)!r}: column {column!r} holds other things than text")
    return texts


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("text needs a tokenizer: pass model=, loaded with one")
    return tokenizer


def _dataset_texts(name: str, split: str, column: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no local file, so it is taken for a dataset; reading one needs "
            "`pip install querylens-fast[datasets]`"
        ) from error
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise FileNotFoundError(
            f"corpus {name!r} could not be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); give a "
            "safetensors file of ids, a text file, or a dataset that can be reached from here"
        ) from error
    if column not in (data.column_names or []):
        raise ValueError(f"dataset {name!r} has columns {data.column_names}; none is named {column!r}")
    return iter(data[column])


def tokenize_and_concatenate(texts: Iterable[str], tokenizer: Any, length: int) -> Tensor:
    """Rows of ``length`` tokens [n, length] from texts, as the reference's loader (transformer-lens's) makes them.

    A thousand documents at a time are tokenised one by one, joined by the end-of-text token and cut into rows; what is
    left over at the end of each thousand is dropped.
    """
    rows: list[Tensor] = []
    batch: list[str] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def flush() -> None:
        encoded = tokenizer(batch, add_special_tokens=False)["input_ids"]
        ids = [i for document in encoded for i in (*document, *end)][: -len(end) or None]
        whole = len(ids) // length * length
        rows.append(torch.tensor(ids[:whole], dtype=torch.int64).reshape(-1, length))
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == DOCUMENTS_PER_JOIN:
            flush()
    if batch:
        flush()
    return torch.cat(rows) if rows else torch.empty(0, length, dtype=torch.int64)
