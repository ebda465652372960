"""Damaged and hostile dictionary files: an error that names the file, soon, and never code, a hang or a full memory."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import querylens_fast as ql
from querylens_fast.dictionaries.feature_lists import Feature, convert_features, load_features

N, D = 6, 4
WEIGHTS = {"W_dec": torch.randn(N, D), "W_enc": torch.randn(D, N), "b_enc": torch.zeros(N), "b_dec": torch.zeros(D)}


def pt(content: bytes) -> bytes:
    """A ``.pt`` file around a pickle, as torch lays it out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", b"\0" * 64)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def nested_tuples(depth: int) -> bytes:
    """((((), ()), ((), ())), …) by memo, as a dictionary's key: its hash visits 2^depth tuples."""
    return b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * depth + b"K\x01s."


def rebuilt(size: tuple[int, ...], numel: int, offset: int = 0, stride: tuple[int, ...] = (0, 0)) -> bytes:
    """A pickle of {"W_dec": a tensor} that claims this size and storage."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"W_dec": Tensor()})
    return buffer.getvalue()


PICKLES = {
    "empty": b"",
    "stop alone": b".",
    "no stop": b"\x80\x02}",
    "pop of nothing": b"\x80\x020.",
    "mark missing": b"\x80\x02u.",
    "memo missing": b"\x80\x02h\x07.",
    "setitem on a number": b"\x80\x02K\x01K\x02K\x03s.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
    "build of a number": b"\x80\x02K\x01}b.",
    "reduce of a number": b"\x80\x02K\x01)R.",
    "reduce without a tuple": b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
    "unknown global": b"\x80\x02cos\nsystem\n)R.",
    "eval": b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
    "bytearray by call": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "bytearray by opcode": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",
    "bad protocol": b"\x80\x7f}.",
    "persistent id of a number": b"\x80\x02K\x01Q.",
    "persistent id too short": b"\x80\x02X\x07\x00\x00\x00storage\x85Q.",
    "rebuild without arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a dtype called": b"\x80\x02ctorch\nfloat32\n)R.",
    "a list": b"\x80\x02]q\x00.",
    "a number": b"\x80\x02K\x01.",
    "text keys missing": b"\x80\x02}K\x01K\x02s.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "ordered dict of a number": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "long string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "hash bomb": nested_tuples(60),
    "hash bomb in a set": b"\x80\x04\x8f(" + b")" + b"q\x00h\x00\x86" * 60 + b"\x90.",
    "tensor beyond its storage": rebuilt((10, 10), 16, stride=(10, 1)),
    "storage beyond the file": rebuilt((10, 10), 1 << 40, stride=(10, 1)),
    "negative size": rebuilt((-1, 4), 16),
    "expanded view": rebuilt((1 << 30, 1 << 10), 16),
    "offset beyond the storage": rebuilt((2, 2), 16, offset=1 << 50, stride=(2, 1)),
    "storage of nothing": rebuilt((4, 4), -3, stride=(4, 1)),
    "sizes that overflow": rebuilt((1 << 62, 1 << 62), 16),
}
FILES: dict[str, Callable[[], bytes]] = {
    "not an archive": lambda: b"garbage" * 9,
    "archive of nothing": lambda: zip_of({}),
    "archive without a pickle": lambda: zip_of({"archive/version": b"3"}),
    "two pickles": lambda: zip_of({"a/data.pkl": b"N.", "b/data.pkl": b"N."}),
    "compressed": lambda: zip_of({"archive/data.pkl": b"N.", "archive/data/0": b"\0" * 9999}, zipfile.ZIP_DEFLATED),
    "legacy magic only": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "legacy hash bomb": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + nested_tuples(60),
    "tar": lambda: b"storages" + b"\0" * 505,
}


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("case", [*PICKLES, *FILES])
@pytest.mark.parametrize("name", ["ae.pt", "layer1.sae.pt", "x.pth"])
def test_pt_files(tmp_path: Path, case: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pt(PICKLES[case]) if case in PICKLES else FILES[case]())
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


def deep(opening: str, closing: str) -> str:
    return opening * 100_000 + closing * 100_000


CONFIGS: dict[str, str] = {
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "not JSON": "{",
    "deep": deep("[", "]"),
    "deep mapping": deep('{"a":', "}")[:-1],
    "not text": "\ufffe",
    "metadata a number": '{"metadata": 3}',
    "metadata a list": '{"metadata": ["hook_name"]}',
    "hook a number": '{"hook_name": 5}',
    "hook a mapping": '{"hook_name": {"a": 1}}',
    "layer a text": '{"layer": "one"}',
    "layer a mapping": '{"layer": {"a": 1}}',
    "layer a fraction": '{"layer": 1.5}',
    "layer below 0": '{"layer": -1}',
    "layer true": '{"layer": true}',
    "version a list": '{"sae_lens_version": [6]}',
    "version a word": '{"sae_lens_version": "six"}',
    "options a list": '{"activation_fn_kwargs": [1], "activation_fn": "topk"}',
    "trainer a list": '{"trainer": [1, 2]}',
    "trainer a word": '{"trainer": "x"}',
    "buffer a number": '{"trainer": {"layer": 1}, "buffer": 7}',
    "io unknown": '{"trainer": {"layer": 1}, "buffer": {"io": "sideways"}}',
    "class a list": '{"trainer": {"layer": 1, "dict_class": [1]}}',
    "layer of the trainer a word": '{"trainer": {"layer": "x"}}',
}


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
