"""Token samples: every source, the seed, the mask, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import querylens_fast as ql
from querylens_fast.models.tokens import tokenize_and_concatenate


def write(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, str(path))
    return path


def test_safetensors_and_the_pad_mask(gpt2: ql.Model, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 2], [7, 2, 8]])
    path = write(tmp_path / "t.safetensors", tokens=ids)
    tokens = ql.load_tokens(path, model=gpt2)
    assert torch.equal(tokens.ids, ids) and torch.equal(tokens.valid_mask, ids != 2) and tokens.n_valid == 4
    assert ql.load_tokens(path).valid_mask.all()
    given = torch.tensor([[True, True, True], [True, True, False]])
    path = write(tmp_path / "m.safetensors", tokens=ids.int(), valid_mask=given)
    assert torch.equal(ql.load_tokens(path, model=gpt2).valid_mask, given)


def test_save_round_trip_and_digest(sample: ql.Tokens, tmp_path: Path) -> None:
    sample.save(tmp_path / "s.safetensors")
    again = ql.load_tokens(tmp_path / "s.safetensors")
    assert again.digest == sample.digest and torch.equal(again.valid_mask, sample.valid_mask)
    assert again.head(2).digest != sample.digest


def test_the_draw_is_the_seeds(tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors", tokens=torch.arange(200).view(50, 4))
    first = ql.load_tokens(path, num_samples=20, seed=1)
    assert torch.equal(first.ids, ql.load_tokens(path, num_samples=20, seed=1).ids)
    assert not torch.equal(first.ids, ql.load_tokens(path, num_samples=20, seed=2).ids)


def test_text(gpt2: ql.Model, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(" ".join(f"w{3 + i % 50}" for i in range(1000)))
    tokens = ql.load_tokens(tmp_path / "c.txt", model=gpt2, max_length=8, num_samples=16)
    assert tokens.ids.shape == (16, 8) and tokens.details["seed"] == "42"
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        ql.load_tokens(tmp_path / "c.txt")
    (tmp_path / "short.txt").write_text("w5 w6")
    with pytest.raises(ValueError, match="fewer than 8 tokens"):
        ql.load_tokens(tmp_path / "short.txt", model=gpt2, max_length=8)


def test_concatenation_is_the_references(gpt2: ql.Model) -> None:
    """transformer-lens's own tokenize_and_concatenate gives the same rows for the same documents."""
    datasets = pytest.importorskip("datasets")
    utils = pytest.importorskip("transformer_lens.utils")
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(f"w{int(i)}" for i in torch.randint(3, 61, (30,), generator=generator)) for _ in range(40)
    ]  # fmt: skip
    data = datasets.Dataset.from_dict({"text": texts})
    theirs = utils.tokenize_and_concatenate(
        data, gpt2.tokenizer, streaming=False, max_length=8, column_name="text", add_bos_token=False, num_proc=1
    )
    ours = tokenize_and_concatenate(texts, gpt2.tokenizer, 8)
    assert torch.equal(ours, torch.as_tensor(theirs[:]["tokens"]))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.zeros(2, 2)}, "expected a tensor named 'tokens'"),
        ({"tokens": torch.zeros(2, 2)}, "dtype torch.float32 and shape .* expected integer token ids"),
        ({"tokens": torch.full((1, 2), 61)}, "id 61 is outside the model's vocabulary of 61"),
        ({"tokens": torch.tensor([[3, -4]])}, "id -4 is outside"),
        ({"tokens": torch.full((2, 2), 2)}, "every position is padding"),
        ({"tokens": torch.zeros(0, 4, dtype=torch.int64)}, r"\[0, 4\]; expected \[B, S\]"),
        (
            {"tokens": torch.ones(2, 2, dtype=torch.int64), "valid_mask": torch.ones(2, 3) > 0},
            r"valid_mask is \[2, 3\]",
        ),
    ],
)
def test_refused_files(gpt2: ql.Model, tmp_path: Path, tensors: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ql.load_tokens(write(tmp_path / "t.safetensors", **tensors), model=gpt2)


def test_missing_damaged_and_unreachable(gpt2: ql.Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.load_tokens(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ql.load_tokens(tmp_path / "no.txt", model=gpt2)
    path = write(tmp_path / "cut.safetensors", tokens=torch.ones(50, 50, dtype=torch.int64))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        ql.load_tokens(path)
    (tmp_path / "data.csv").write_text("x")
    with pytest.raises(ValueError, match="token files are .safetensors"):
        ql.load_tokens(tmp_path / "data.csv")
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="corpus 'nobody/no-such-corpus' could not be loaded"):
        ql.load_tokens("nobody/no-such-corpus", model=gpt2)


def test_ids_in_memory(gpt2: ql.Model) -> None:
    assert ql.load_tokens(torch.ones(2, 3, dtype=torch.int32)).ids.dtype == torch.int64
    with pytest.raises(ValueError, match="expected integer token ids"):
        ql.load_tokens(torch.ones(2, 3))
    with pytest.raises(ValueError, match="num_samples is 0"):
        ql.models.tokens._draw(torch.ones(2, 2), None, 0, 0)


def test_the_model_says_what_is_padding_where_nobody_has(gpt2: ql.Model, tmp_path: Path) -> None:
    """A file of ids alone, read before there is a model."""
    from safetensors.torch import save_file

    pad = gpt2.pad_token_id
    assert pad is not None
    ids = torch.randint(3, gpt2.vocab_size, (3, 8))
    ids[1, 5:] = pad
    save_file({"tokens": ids}, str(tmp_path / "ids.safetensors"))
    unknown = ql.load_tokens(tmp_path / "ids.safetensors")
    known = ql.load_tokens(tmp_path / "ids.safetensors", model=gpt2)
    assert unknown.n_valid == 24 and known.n_valid == 21
    fitted = ql.fit_transport(gpt2, unknown, sides=("value",), orders=("first_order",), progress=False)
    assert fitted.n_valid == 21 and fitted.metadata["tokens_digest"] == known.digest
    unknown.head(2).save(tmp_path / "again.safetensors")
    assert ql.load_tokens(tmp_path / "again.safetensors", model=gpt2).n_valid == 13
    given = ql.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    assert ql.fit_transport(gpt2, given, sides="value", orders="first_order", progress=False).n_valid == 24


def test_ids_outside_the_vocabulary_are_named_by_the_fit(gpt2: ql.Model) -> None:
    tokens = ql.Tokens(torch.tensor([[1, gpt2.vocab_size]]), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"id {gpt2.vocab_size} is outside the model's vocabulary"):
        ql.fit_transport(gpt2, tokens, progress=False)
