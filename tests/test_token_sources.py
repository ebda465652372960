"""Tokens as people pass them: strings, encodings, data sets, tables, ragged lists; what is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import querylens_fast as ql

TEXTS = [" ".join(f"w{3 + (i + j) % 50}" for i in range(40)) for j in range(4)]


def test_strings_encodings_and_ragged_lists(gpt2: ql.Model) -> None:
    strings = ql.load_tokens(["w5 w6 w7", "w8"], model=gpt2)  # type: ignore[arg-type]
    assert strings.valid_mask.tolist() == [[True, True, True], [True, False, False]]
    encoded = gpt2.tokenizer(["w5 w6 w7", "w8"], padding=True)
    assert ql.load_tokens(encoded, model=gpt2).valid_mask.sum() == 4
    ragged = ql.load_tokens([[5, 6, 7], [8]], model=gpt2)  # type: ignore[arg-type]
    assert torch.equal(ragged.valid_mask, strings.valid_mask) and ragged.ids[0].tolist() == [5, 6, 7]


def test_tables_and_data_sets(gpt2: ql.Model, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    lines = tmp_path / "c.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.to_parquet(str(tmp_path / "c.parquet"))
    found = [ql.load_tokens(s, model=gpt2, max_length=8) for s in (lines, tmp_path / "c.parquet", table)]
    assert all(torch.equal(f.ids, found[0].ids) for f in found)
    with pytest.raises(ValueError, match="text column 'body'"):
        ql.load_tokens(lines, model=gpt2, column="body")


def test_what_is_refused(gpt2: ql.Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="expected integer token ids"):
            ql.load_tokens(wrong, model=gpt2)
    with pytest.raises(ValueError, match="33 long, but model .* has 32 positions"):
        ql.load_tokens(torch.full((1, 33), 5), model=gpt2)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 w5")
    with pytest.raises(ValueError, match="is not UTF-8"):
        ql.load_tokens(tmp_path / "latin.txt", model=gpt2)
    with caplog.at_level(logging.WARNING):
        assert ql.load_tokens(torch.tensor([5, 6, 7]), model=gpt2, num_samples=3).ids.shape == (3, 3)
    assert "num_samples is 3, but the corpus has 1 sequences" in caplog.text


def test_what_is_no_ids_is_refused(gpt2: ql.Model) -> None:
    for given, message in (
        (5, r"are \[\]; expected ids \[B, S\]"),
        (torch.ones(1, 2, 3, dtype=torch.int64), r"are \[1, 2, 3\]; expected ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 0.5]]}, "the mask holds 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ql.load_tokens(given, model=gpt2)  # type: ignore[arg-type]
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    found = ql.load_tokens(rows, model=gpt2)  # type: ignore[arg-type]
    assert found.ids[0].tolist() == [1, 2] and found.valid_mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("strange", [0.5, 2.0, -1.0, -1e9])
def test_masks_are_zeros_and_ones(strange: float, gpt2: ql.Model, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert ql.Tokens(ids, mask).valid_mask.tolist() == ql.Tokens(ids, mask.long()).valid_mask.tolist()
    assert ql.Tokens(ids, mask).valid_mask.dtype == torch.bool
    mask[0, 1] = strange
    save_file({"tokens": ids, "valid_mask": mask}, str(tmp_path / "t.safetensors"))
    for given in (ids, {"input_ids": ids, "attention_mask": mask}, tmp_path / "t.safetensors"):
        with pytest.raises(ValueError, match="the mask holds .*expected only 1"):
            ql.Tokens(ids, mask) if given is ids else ql.load_tokens(given, model=gpt2)  # type: ignore[arg-type]


def test_datasets_that_are_tokenized_already(gpt2: ql.Model) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [[5, 6, 7], [8, 9, 0]]
    mask = [[1, 1, 1], [1, 1, 0]]
    table = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": mask})
    found = ql.load_tokens(table, model=gpt2)
    assert found.ids.tolist() == rows and found.valid_mask.int().tolist() == mask
    ragged = ql.load_tokens(datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]}), model=gpt2, num_samples=1)
    assert ragged.ids.shape == (1, 3)
    fitted = ql.fit_transport(gpt2, table, sides=("key",), orders=("first_order",), progress=False)
    assert fitted.n_valid == 5
