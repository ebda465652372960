"""Hostile bytes: pickles, archives, configurations and headers that readers have met."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch


def pt(content: bytes) -> bytes:
    """A ``.pt`` file around a pickle, as torch lays it out."""
    members = {"data.pkl": content, "byteorder": b"little", "data/0": b"\0" * 64, "version": b"3\n"}
    return zip_of({f"archive/{name}": data for name, data in members.items()})


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
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
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, OrderedDict())  # type: ignore

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"W_dec": Tensor()})
    return buffer.getvalue()


def running(command: str) -> bytes:
    """A pickle that runs a shell command when it is loaded without care."""
    return b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(command)) + command.encode() + b"\x85R."


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
PT_FILES: dict[str, Callable[[], bytes]] = {
    "not an archive": lambda: b"garbage" * 9,
    "archive of nothing": lambda: zip_of({}),
    "archive without a pickle": lambda: zip_of({"archive/version": b"3"}),
    "two pickles": lambda: zip_of({"a/data.pkl": b"N.", "b/data.pkl": b"N."}),
    "compressed": lambda: zip_of({"archive/data.pkl": b"N.", "archive/data/0": b"\0" * 9999}, zipfile.ZIP_DEFLATED),
    "legacy magic only": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "legacy hash bomb": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + nested_tuples(60),
    "tar": lambda: b"storages" + b"\0" * 505,
}


def deep(opening: str, closing: str) -> str:
    return opening * 100_000 + closing * 100_000


NOT_OBJECTS: dict[str, str] = {
    "empty": "",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "a text": '"x"',
    "not JSON": "{",
    "NaN": '{"a": NaN}',
    "deep": deep("[", "]"),
    "deep mapping": deep('{"a":', "}")[:-1],
    "not text": "\ufffe",
    "long number": '{"layer": ' + "9" * 5000 + "}",
}
"""JSON files that hold no object, or none that can be read."""
SAE_CONFIGS: dict[str, str] = {
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
    "a resolver": '{"hook_name": "${oc.env:QUERYLENS_SECRET}"}',
}
YAMLS = {
    "a list": "- a",
    "aliases in themselves": "&a [*a]",
    "deep": deep("[", "]"),
    "not YAML": "a: b: c",
    "an object": "a: !!python/object:os.system x",
    "an object by new": "model: !!python/object/apply:os.system ['touch {canary}']",
    "doubled aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "an environment variable": "model: ${oc.env:QUERYLENS_SECRET}",
    "a nested resolver": "model: ${oc.decode:${oc.env:QUERYLENS_SECRET}}",
    "a list of resolvers": "layer: ['${oc.env:QUERYLENS_SECRET}']",
    "a reference in circles": "model: ${dtype}\ndtype: ${model}",
    "a number for a name": "model: 3.5",
    "a fraction of a layer": "layer: 1.5",
    "k below 0": "k: -5",
    "itself as default": "defaults: [config]\nmodel: x",
    "a number as default": "defaults: 3",
    "an unknown key": "modle: x",
    "a mapping for a number": "k: {a: 1}",
}


def header(text: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def claimed(name: str, dtype: str, shape: str, offsets: str, data: int = 64) -> bytes:
    """A safetensors file of one tensor with these claims."""
    text = f'{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    return header(text, b"\0" * data)


def safetensors_files(name: str) -> dict[str, bytes]:
    """Damaged and lying safetensors files of one tensor."""
    return {
        "empty": b"",
        "eight bytes": b"\xff" * 8,
        "a header of a terabyte": header(b"{}", size=1 << 40),
        "a list": header(b"[]"),
        "no tensors": header(b"{}"),
        "deep header": header(deep("[", "]").encode()),
        "data beyond the end": claimed(name, "F32", "[4,4]", "[0,9999]"),
        "data before the start": claimed(name, "F32", "[4,4]", "[-64,0]"),
        "shape and size differ": claimed(name, "F32", "[5,5]", "[0,64]"),
        "shape that overflows": claimed(name, "F32", "[4611686018427387904,4611686018427387904]", "[0,64]"),
        "an unknown dtype": claimed(name, "F31", "[4,4]", "[0,64]"),
        "integers": claimed(name, "I32", "[4,4]", "[0,64]"),
        "booleans": claimed(name, "BOOL", "[8,8]", "[0,64]"),
        "a number": claimed(name, "F32", "[]", "[0,4]", 4),
        "no rows": claimed(name, "F32", "[0,16]", "[0,0]", 0),
        "three axes": claimed(name, "F32", "[1,1,16]", "[0,64]"),
        "another name": claimed("x" * 1000, "F32", "[1,16]", "[0,64]"),
        "metadata a number": header(b'{"__metadata__":3}'),
        "not text": header(b'{"\xff\xfe":1}'),
        "text instead": b"hello, world" * 20,
    }
