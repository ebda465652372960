"""Damaged and hostile dictionary files: an error that names the file, soon, and never code, a hang or a full memory."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import querylens_fast as ql
from bench.faults.payloads import NOT_OBJECTS, PICKLES, PT_FILES, SAE_CONFIGS, deep, pt, zip_of
from querylens_fast.dictionaries.feature_lists import Feature, convert_features, load_features

N, D = 6, 4
CONFIGS = {k: v for k, v in (NOT_OBJECTS | SAE_CONFIGS).items() if k not in ("NaN", "a resolver")}
WEIGHTS = {"W_dec": torch.randn(N, D), "W_enc": torch.randn(D, N), "b_enc": torch.zeros(N), "b_dec": torch.zeros(D)}


@pytest.mark.parametrize("case", [*PICKLES, *PT_FILES])
@pytest.mark.parametrize("name", ["ae.pt", "layer1.sae.pt", "x.pth"])
def test_pt_files(tmp_path: Path, case: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pt(PICKLES[case]) if case in PICKLES else PT_FILES[case]())
    with pytest.raises(ValueError, match=name):
        ql.load_dictionary(path, layer=1)


@pytest.mark.parametrize("case", [case for case in PICKLES if case != "a list"])
def test_feature_lists(tmp_path: Path, case: str) -> None:
    path = tmp_path / "features.pkl"
    path.write_bytes(PICKLES[case])
    with pytest.raises(ValueError, match="features.pkl"):
        load_features(path)


def steered(cache: bytes) -> bytes:
    """A pickled feature whose steering cache is what ``cache`` pushes."""
    whole = pickle.dumps([Feature("m", 1, 2, "res", steering_cache={"x": "HERE"})], 2)
    mark = b"X\x04\x00\x00\x00HERE"
    assert mark in whole
    start, end = whole.split(mark)
    return start + cache + end


def doubled_lists(depth: int) -> bytes:
    """[[[…], […]], [[…], […]]]: lists that hold one list twice, by memo."""
    at = [struct.pack("<I", 1000 + i) for i in range(depth + 1)]
    steps = (b"]r" + b + b"(j" + a + b"j" + a + b"e0" for a, b in zip(at, at[1:], strict=False))
    return b"]r" + at[0] + b"0" + b"".join(steps) + b"j" + at[-1]


LOOP = b"]r\xe8\x03\x00\x00j\xe8\x03\x00\x00a"


@pytest.mark.parametrize(("cache", "message"), [(doubled_lists(60), "stands for more than"), (LOOP, "contains itself")])
def test_a_small_pickle_that_stands_for_much(tmp_path: Path, cache: bytes, message: str) -> None:
    """2^60 values in some hundred bytes, or a list in itself."""
    (tmp_path / "f.pkl").write_bytes(steered(cache))
    with pytest.raises(ValueError, match=f"f.pkl' .*{message}"):
        convert_features(tmp_path / "f.pkl", tmp_path / "f.json")
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("weights", ["sae_weights.safetensors", "ae.pt"])
def test_configurations(tmp_path: Path, case: str, weights: str) -> None:
    """Of sae-lens and of dictionary_learning: an error, or what is wrong is not one this format reads."""
    config = tmp_path / ("cfg.json" if "safetensors" in weights else "config.json")
    config.write_text(CONFIGS[case], encoding="utf-8")
    if "safetensors" in weights:
        save_file(WEIGHTS, str(tmp_path / weights))
    else:
        linear = {
            "encoder.weight": torch.randn(N, D),
            "decoder.weight": torch.randn(D, N),
            "encoder.bias": torch.ones(N),
        }
        torch.save({**linear, "bias": torch.zeros(D)}, tmp_path / weights)
    with pytest.raises(ValueError) as error:
        dictionary = ql.load_dictionary(tmp_path)
        _ = dictionary.coder
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "text", ["- a", "&a [*a]", deep("[", "]"), "a: &x [1]\nb: *x", "a: !!python/object:os.system x"]
)
def test_yaml_configurations(tmp_path: Path, text: str) -> None:
    save_file({**WEIGHTS, "W_enc": torch.randn(N, D)}, str(tmp_path / "layer_3.safetensors"))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        ql.load_dictionary(tmp_path)


def npy(shape: tuple[int, ...], descr: str = "<f4", data: bytes = b"") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """512 MiB of zeros in half a megabyte."""
    path = tmp_path / "params.npz"
    rows = 1 << 17
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("W_dec.npy", "w") as entry:
        entry.write(npy((rows, 1024)))
        for _ in range(512):
            entry.write(b"\0" * (1 << 20))
    with pytest.raises(ValueError, match="W_dec unpacks to .* bytes from .*savez"):
        ql.load_dictionary(path, layer=1)


@pytest.mark.parametrize(
    "members",
    [
        {"W_dec.npy": b""},
        {"W_dec.npy": b"\x93NUMPY\x01\x00\xff\xff"},
        {"W_dec.npy": npy((1 << 40, 1 << 20))},
        {"W_dec.npy": npy((-1, 4))},
        {"W_dec.npy": npy((N, D), "|O", pickle.dumps([1]))},
        {"W_dec.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"__import__('os')    "},
        {"W_dec.npy": npy((N, D), "<f4", b"\0" * 4)},
        {"other.npy": npy((N, D), "<f4", b"\0" * 4 * N * D)},
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_files(tmp_path: Path, members: dict[str, bytes], compression: int) -> None:
    (tmp_path / "p.npz").write_bytes(zip_of(members, compression))
    with pytest.raises(ValueError, match="p.npz"):
        ql.load_dictionary(tmp_path / "p.npz", layer=1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        b'\x60\x00\x00\x00\x00\x00\x00\x00{"W_dec":{"dtype":"F32","shape":[4,4],"data_offsets":[0,9999]}}'.ljust(104),
    ],
)
def test_safetensors_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="d.safetensors"):
        ql.load_dictionary(tmp_path / "d.safetensors", layer=1)


@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors"])
def test_flipped_and_cut_bytes(tmp_path: Path, kind: str) -> None:
    """Whatever happens to a file, it is read (a flip within its numbers) or an error names it."""
    path, generator = tmp_path / f"d.{kind}", random.Random(3)
    if kind == "pt":
        torch.save(WEIGHTS, path)
    elif kind == "npz":
        np.savez(path, **{name: w.numpy() for name, w in WEIGHTS.items()})
    else:
        save_file(WEIGHTS, str(path))
    whole = path.read_bytes()
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 1, 3])):
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged[: generator.randrange(len(whole))] if generator.random() < 0.3 else damaged)
        try:
            dictionary = ql.load_dictionary(path, layer=1)
            dictionary.values(slice(None)), dictionary.keys(slice(None))
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_compressed_in_other_ways(tmp_path: Path, compression: int) -> None:
    """Their readers inflate what a few hundred bytes stand for at once, some in gigabytes."""
    (tmp_path / "d.npz").write_bytes(zip_of({"W_dec.npy": _npy(WEIGHTS["W_dec"])}, compression))
    with pytest.raises(ValueError, match="d.npz.*W_dec is compressed in another way than numpy does"):
        ql.load_dictionary(tmp_path / "d.npz", layer=1)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_npz_of_two_arrays_of_one_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        for factor in (1, 2):
            archive.writestr("W_dec.npy", _npy(factor * WEIGHTS["W_dec"]))
    with pytest.raises(ValueError, match="d.npz.*two of its entries have the same name"):
        ql.load_dictionary(tmp_path / "d.npz", layer=1)


def _npy(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def test_lazily_negated_tensors(tmp_path: Path) -> None:
    torch.save({"W_dec": torch._neg_view(WEIGHTS["W_dec"])}, tmp_path / "d.pt")
    dictionary = ql.load_dictionary(tmp_path / "d.pt", layer=1)
    assert torch.equal(dictionary.values(slice(None)), -WEIGHTS["W_dec"])
    assert dictionary.fingerprint


def test_vectors_that_are_missing(tmp_path: Path) -> None:
    save_file({"W_enc": WEIGHTS["W_enc"]}, str(tmp_path / "d.safetensors"))
    dictionary = ql.load_dictionary(tmp_path / "d.safetensors", layer=1)
    with pytest.raises(ValueError, match="d.safetensors.*holds no value vectors"):
        dictionary.check_finite("value", torch.arange(N))


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_running_a_dictionary_with_nan(tmp_path: Path, name: str) -> None:
    broken = WEIGHTS[name].clone()
    broken[1, 2] = torch.nan
    save_file({**WEIGHTS, name: broken}, str(tmp_path / "sae_weights.safetensors"))
    config = {"architecture": "standard", "d_in": D, "d_sae": N, "metadata": {"hook_name": "blocks.1.hook_resid_post"}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"cannot be run: its {name} holds NaN or inf"):
        _ = ql.load_dictionary(tmp_path).coder
