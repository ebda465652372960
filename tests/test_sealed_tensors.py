"""Transports, token samples and matrices in safetensors files: a changed byte is noticed, a kill leaves nothing."""

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import querylens_fast as ql
from querylens_fast.runs.run_record import DamagedFile
from querylens_fast.runs.sealed_tensors import check_seal, write_tensors

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "ids": torch.arange(7),
    "none": torch.zeros(0, 4),
    "number": torch.tensor(2.5, dtype=torch.float64),
    "turned": torch.randn(4, 6).T,
}


def test_other_readers_take_it(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, {"what": "ä test"})
    found = load_file(str(path))
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[k], t) for k, t in TENSORS.items())
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["what"] == "ä test"
    assert check_seal(path) and ql.verify(path) == [] and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path, draw = tmp_path / "t.safetensors", random.Random(0)
    write_tensors(path, TENSORS, {"what": "a test"})
    data = path.read_bytes()
    for place in [draw.randrange(8 * len(data)) for _ in range(150)]:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        assert ql.verify(path), f"bit {place} of {8 * len(data)}"
    for changed in (data[:-1], data + b"\0", data[:40], b""):
        path.write_bytes(changed)
        assert "t.safetensors" in ql.verify(path)[0]


def test_damaged_samples_are_refused_and_those_of_others_read(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    tokens = ql.Tokens(torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.bool))
    tokens.save(path)
    assert ql.load_tokens(path).digest == tokens.digest
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(DamagedFile, match=r"tokens.safetensors' is damaged"):
        ql.load_tokens(path)
    save_file({"tokens": tokens.ids}, str(path))
    assert torch.equal(ql.load_tokens(path).ids, tokens.ids) and not check_seal(path)


def test_one_sequence_with_its_mask(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.arange(4), "valid_mask": torch.tensor([True, True, False, True])}, str(path))
    found = ql.load_tokens(path)
    assert found.ids.tolist() == [[0, 1, 2, 3]] and found.n_valid == 3
