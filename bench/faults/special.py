"""What is no ordinary file where one is read, tables of odd types, and answers of a judge that has lost its mind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.faults.sources import Found, signatures

TEBIBYTE = 1 << 40


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(TEBIBYTE)


KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a tebibyte of nothing": _sparse,
    "a folder": Path.mkdir,
    "empty": Path.touch,
}


def special(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    """Every kind of file where each command reads one."""
    out = names["out"]
    scored = ["evaluate", "scores", names["model"], names["sae"], "--tokens", names["tokens"], "--out", out]
    transported, tuned = ["--preset", "query_lens_value", "--transport"], ["--preset", "tuned_lens", "--tuned-lens"]
    exported = ["export", names["sae"], "--format", "neuronpedia", "--model", names["model"], "--out", out]
    exported += ["--model-id", "m", "--source-set", "s", "--k", "4"]

    def fitted(path: str) -> list[str]:
        return ["transport", names["model"], path, "--out", f"{out}.safetensors"]

    calls: dict[str, tuple[str, Callable[[str], list[str]]]] = {
        "prefixes": (".txt", lambda path: [*scored, "--prefixes", path]),
        "token sample": (".safetensors", fitted),
        "text": (".txt", fitted),
        "texts": (".parquet", fitted),
        "answers": (".jsonl", lambda path: ["judge", names["rows"], "--model", names["model"], "--answers", path]),
        "result": (".parquet", lambda path: ["show", path, "3"]),
        "rows": (".jsonl", lambda path: ["search", path, "--id", "3"]),
        "method": (".parquet", lambda path: [*scored, "--methods", path]),
        "transport": (".safetensors", lambda path: signatures(names["sae"], names, *transported, path)),
        "tuned lens": (".pt", lambda path: signatures(names["sae0"], names, *tuned, path)),
        "dictionary": (".safetensors", lambda path: signatures(path, names, "--layer", "1")),
        "features": (".pkl", lambda path: ["convert-features", path, f"{out}.json"]),
        "feature sample": (".parquet", lambda path: [*exported, "--sample", path]),
        "graph": (".json", lambda path: ["annotate-graph", path, "--model", names["model"], "--values", names["rows"]]),
        "verified": (".parquet", lambda path: ["verify", path]),
    }
    for i, (role, (ending, call)) in enumerate(calls.items()):
        for j, (kind, make) in enumerate(KINDS.items()):
            path = folder / f"{i}_{j}{ending}"
            if not os.path.lexists(path):
                make(path)
            yield f"special {role}", kind, call(str(path)), path.name
    yield from _tables(folder, names)
    yield from _answers(folder, names)


def _tables(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    """Results as another program may write them: right names, other types and values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = pq.read_table(names["rows"])
    n, ids, texts = len(good), pa.list_(pa.int32()), pa.list_(pa.string())
    columns = {
        "no lists": ("top_ids", pa.array([None] * n, ids)),
        "lists of any length": ("top_ids", pa.array([[1] * (i % 4) for i in range(n)], ids)),
        "no ids in lists": ("top_ids", pa.array([[None] * 4] * n, ids)),
        "decimals": ("top_ids", pa.array([[1] * 4] * n, pa.list_(pa.decimal128(9, 0)))),
        "structures": ("top_ids", pa.array([{"a": 1}] * n)),
        "no features": ("feature", pa.array([None] * n, pa.int64())),
        "features of text": ("feature", pa.array(["1"] * n)),
        "bytes": ("top_tokens", pa.array([[b"\xff"] * 4] * n, pa.list_(pa.binary()))),
        "too few strings": ("top_tokens", pa.array([["a"]] * n, texts)),
        "numbers for strings": ("top_tokens", pa.array([[1] * 4] * n)),
        "a map for the layer": ("layer", pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int32()))),
    }
    for i, (kind, (name, column)) in enumerate(columns.items()):
        table = good.set_column(good.column_names.index(name), name, column) if name in good.column_names else None
        path = folder / f"table{i}.parquet"
        pq.write_table(good.append_column(name, column) if table is None else table, path)
        yield "odd table", f"{kind}, show", ["show", str(path), "3"], path.name
        yield "odd table", f"{kind}, judge", ["judge", str(path), "--requests", f"{names['out']}.jsonl"], path.name
        call = ["export", str(path), "--format", "neuronpedia", "--model", names["model"], "--out", names["out"]]
        yield "odd table", f"{kind}, export", [*call, "--model-id", "m", "--source-set", "s", "--k", "4"], path.name


def _answers(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    """Answer files: those that hold no answers at all have to be named, the others count as unanswered."""
    contents: dict[str, bytes] = {
        "lone surrogates": b'{"custom_id": "a-0", "response": {"body": {"choices": [{"message": "\\ud800"}]}}}\n',
        "an object for an id": b'{"custom_id": {"a": 1}}\n',
        "deep": b"[" * 100_000 + b"\n",
        "UTF-16": "{}\n".encode("utf-16"),
        "zeros": b"\0" * 4096 + b"\n",
        "a long line": b'{"custom_id": "a-0", "x": "' + b"y" * (1 << 25) + b'"}\n',
    }  # fmt: skip
    for i, (kind, content) in enumerate(contents.items()):
        path = folder / f"answers{i}.jsonl"
        path.write_bytes(content)
        named = "" if i < 2 else path.name
        yield "odd answers", kind, ["judge", names["rows"], "--model", names["model"], "--answers", str(path)], named
    for url in ("http://[::1", "http://a b/", "http://127.0.0.1:1/v1\r\nX: y", "file:///etc/passwd", "http://\0/"):
        call = ["judge", names["rows"], "--model", names["model"], "--answers", f"{names['out']}.jsonl"]
        yield "odd address", json.dumps(url), [*call, "--base-url", url], ""
