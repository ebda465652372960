"""Hostile files of every kind that a command reads, each with the call that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.faults.payloads import (
    NOT_OBJECTS,
    PICKLES,
    PT_FILES,
    YAMLS,
    pt,
    running,
    safetensors_files,
)
from bench.faults.sources import Found, configs, models, signatures, weights
from bench.faults.special import special
from querylens_fast.runs.sealed_tensors import SEAL_KEY


def hostile_files(place: Path, names: dict[str, str]) -> Iterator[Found]:
    """Write every hostile file under ``place`` and yield how it is read.

    Args:
        place: A folder.
        names: Good files by name, as in `hostile.CALLS`, and ``canary``, which code that is run would make.
    """
    makers = (weights, configs, models, _results, _transports, _samples, _lenses, _lists, _runs, special)
    for number, make in enumerate(makers):
        folder = place / f"files{number}"
        folder.mkdir(exist_ok=True)
        yield from make(folder, names)


def _results(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = Path(names["rows"]).read_bytes()
    other, listed = pa.table({"a": [1, 2]}), pq.read_table(names["rows"])
    kept: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: path.write_bytes(b""),
        "garbage": lambda path: path.write_bytes(b"PAR1" + b"x" * 500 + b"PAR1"),
        "a footer of a gigabyte": lambda path: path.write_bytes(good[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1"),
        "cut": lambda path: path.write_bytes(good[:-40]),
        "of another program": lambda path: pq.write_table(other, path),
        "another table under its name": lambda path: pq.write_table(_marked(other, b'{"preset": "x"}'), path),
        "a list for its identity": lambda path: pq.write_table(_marked(listed, b"[1]"), path),
        "no JSON for its identity": lambda path: pq.write_table(_marked(listed, b"{"), path),
        "deep identity": lambda path: pq.write_table(_marked(listed, NOT_OBJECTS["deep"].encode()), path),
        "numbers for names": lambda path: pq.write_table(_marked(listed, b'{"preset": 3, "n_features": "x"}'), path),
        "no features": lambda path: pq.write_table(listed.drop_columns(["feature"]), path),
        "text for ids": lambda path: pq.write_table(_replaced(listed, "top_ids"), path),
        "text for scores": lambda path: pq.write_table(_replaced(listed, "top_scores"), path),
        "no rows": lambda path: pq.write_table(listed.slice(0, 0), path),
    }
    for i, (name, write) in enumerate(kept.items()):
        path = folder / f"{i}.parquet"
        write(path)
        mentions = "" if name in ("no rows", "numbers for names") else path.name
        yield "result .parquet", f"{name}, show", ["show", str(path), "3"], mentions
        yield "result .parquet", f"{name}, search", ["search", str(path), "--id", "5"], mentions
        yield "result .parquet", f"{name}, judge", ["judge", str(path), "--requests", names["out"] + ".jsonl"], mentions
        yield "result .parquet", f"{name}, export", _exported(path, names), mentions
        yield "result .parquet", f"{name}, verify", ["verify", str(path)], ""
    yield from _lines(folder, names)


def _lines(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    good = Path(names["lines"])
    record = good.with_name(good.name + ".run.json").read_text()
    rows = {
        "empty": "",
        "a list": "[1]\n",
        "a number": "3\n",
        "no feature_index": '{"a": 1}\n',
        "a text for feature_index": '{"feature_index": "0"}\n',
        "a row of nothing": '{"feature_index": 0, "feature": 0}\n',
        "deep": NOT_OBJECTS["deep"] + "\n",
        "a long line": '{"feature_index": 0, "x": "' + "y" * (1 << 20) + '"}\n',
        "numbers for lists": '{"feature_index": 0, "feature": 3, "layer": 1, "top_ids": 5, "top_scores": 5}\n',
    }
    for i, (name, text) in enumerate(rows.items()):
        for j, kept in enumerate((record, "", "[1]", "{}", "3", NOT_OBJECTS["deep"])):
            path = folder / f"{i}_{j}.jsonl"
            path.write_text(text)
            path.with_name(path.name + ".run.json").write_text(kept)
            call = (["show", str(path), "3"], ["search", str(path), "--id", "5"], ["verify", str(path)])[(i + j) % 3]
            yield "result .jsonl", f"{name}, record {j}, {call[0]}", call, ""
    for i, content in enumerate(safetensors_files("x").values()):
        path = folder / f"t{i}.safetensors"
        path.write_bytes(content)
        yield "verify .safetensors", str(i), ["verify", str(path)], ""


def _marked(table, text: bytes):
    return table.replace_schema_metadata({b"querylens_fast": text})


def _replaced(table, name: str):
    import pyarrow as pa

    return table.set_column(table.column_names.index(name), name, pa.array(["x"] * len(table)))


def _exported(path: Path, names: dict[str, str], *given: str) -> list[str]:
    more = ["--format", "neuronpedia", "--model-id", "m", "--source-set", "s", "--k", "4"]
    return ["export", str(path), *more, *given, "--model", names["model"], "--out", names["out"]]


def _transports(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    from safetensors import safe_open

    with safe_open(names["transport"], framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != SEAL_KEY}
    tensors = load_file(names["transport"])
    matrix = next(name for name in sorted(tensors) if name.startswith("matrix.value"))
    changes: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "NaN": ({**tensors, matrix: tensors[matrix] * torch.nan}, metadata),
        "infinity": ({**tensors, matrix: tensors[matrix] * torch.inf}, metadata),
        "too large": ({**tensors, matrix: torch.full_like(tensors[matrix], 3e38)}, metadata),
        "integers": ({**tensors, matrix: tensors[matrix].long()}, metadata),
        "a layer less": ({**tensors, matrix: tensors[matrix][1:].clone()}, metadata),
        "narrower": ({**tensors, matrix: tensors[matrix][..., 1:].clone()}, metadata),
        "no tensors": ({"centre": tensors["centre"]} if "centre" in tensors else {}, metadata),
        "another tensor": ({**tensors, "evil": torch.ones(3)}, metadata),
        "another format": (tensors, {**metadata, "format": "x"}),
        "another model": (tensors, {**metadata, "fingerprint": "x" * 32}),
        "layers of text": (tensors, {**metadata, "n_layers": "two"}),
        "a billion layers": (tensors, {**metadata, "n_layers": "1000000000"}),
        "layers below 0": (tensors, {**metadata, "n_layers": "-1"}),
        "a width of text": (tensors, {**metadata, "d_model": "x"}),
        "a resolver": (tensors, {**metadata, "model": "${oc.env:QUERYLENS_SECRET}"}),
        "no metadata": (tensors, {}),
    }
    for i, (name, (changed, meta)) in enumerate(changes.items()):
        path = folder / f"{i}.safetensors"
        save_file(changed, str(path), metadata=meta or None)
        mentions = "" if name in ("too large", "a resolver", "another model") else path.name
        yield "transport", name, _carried(path, names), mentions
    for i, (name, content) in enumerate(safetensors_files("matrix.value.full").items()):
        path = folder / f"bytes{i}.safetensors"
        path.write_bytes(content)
        yield "transport", name, _carried(path, names), path.name
        yield "transport", f"{name}, converted", ["convert-transport", str(path), names["out"] + ".pt"], path.name


def _carried(path: Path, names: dict[str, str]) -> list[str]:
    return signatures(names["sae"], names, "--preset", "query_lens_value", "--transport", str(path))


def _samples(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    ids = torch.randint(3, 60, (4, 8))
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "floats": {"tokens": ids.float()},
        "booleans": {"tokens": ids > 9},
        "complex": {"tokens": ids.to(torch.complex64)},
        "below 0": {"tokens": ids - 50},
        "beyond the vocabulary": {"tokens": ids + 10**6},
        "beyond int32": {"tokens": ids + 2**40},
        "no sequences": {"tokens": ids[:0].clone()},
        "three axes": {"tokens": ids[None]},
        "a mask of another shape": {"tokens": ids, "valid_mask": torch.ones(3, 8, dtype=torch.bool)},
        "nothing valid": {"tokens": ids, "valid_mask": torch.zeros(4, 8, dtype=torch.bool)},
        "longer than the model": {"tokens": torch.ones(1, 5000, dtype=torch.int64)},
        "another name": {"ids": ids},
    }
    for i, (name, content) in enumerate(tensors.items()):
        path = folder / f"{i}.safetensors"
        save_file(content, str(path))
        yield "token sample", name, _fitted(path, names), "" if "beyond" in name or "longer" in name else path.name
    for i, (name, content) in enumerate(safetensors_files("tokens").items()):
        path = folder / f"bytes{i}.safetensors"
        path.write_bytes(content)
        yield "token sample", name, _fitted(path, names), "" if name in ("integers", "no rows") else path.name
    for i, content in enumerate((b"", b"\xff\xfe\x00", b"\0" * 1000, b"one")):
        path = folder / f"{i}.txt"
        path.write_bytes(content)
        yield "text sample", str(i), _fitted(path, names), path.name
    good = Path(names["sample"]).read_bytes()
    for i, content in enumerate(
        (b"", good[: len(good) // 2], b"PAR1" + b"x" * 90 + b"PAR1", Path(names["rows"]).read_bytes())
    ):
        path = folder / f"sample{i}.parquet"
        path.write_bytes(content)
        call = _exported(Path(names["sae"]), names, "--sample", str(path))
        yield "feature sample", str(i), call, path.name


def _fitted(path: Path, names: dict[str, str]) -> list[str]:
    return ["transport", names["model"], str(path), "--energy", "none", "--out", names["out"] + ".safetensors"]


def _lenses(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    pickles = {**PICKLES, "a command": running(f"touch {names['canary']}")}
    contents = {name: pt(content) for name, content in pickles.items()} | {n: make() for n, make in PT_FILES.items()}
    d = 16
    good = {f"{i}.weight": torch.zeros(d, d) for i in range(2)} | {f"{i}.bias": torch.zeros(d) for i in range(2)}
    tuned = {
        "NaN": {**good, "1.weight": torch.full((d, d), torch.nan), "0.weight": torch.full((d, d), torch.nan)},
        "a bias of one": {key: value[:1] if "bias" in key else value for key, value in good.items()},
        "narrow": {key: value[..., 1:] for key, value in good.items()},
        "integers": {key: value.long() for key, value in good.items()},
        "other names": {"a": torch.zeros(3)},
        "numbers": {"0.weight": 3, "0.bias": "x"},
    }
    for i, (name, content) in enumerate(contents.items()):
        path = folder / f"{i}.pt"
        path.write_bytes(content)
        yield "tuned lens", name, _tuned(path, names), path.name
        yield (
            "jacobian lens",
            name,
            _imported(path, names),
            path.name,
        )
    for i, (name, content) in enumerate(tuned.items()):
        path = folder / f"values{i}.pt"
        torch.save(content, path)
        yield "tuned lens", name, _tuned(path, names), path.name
    for i, content in enumerate(
        ({"J": 3}, {"J": {}}, {"J": {0: torch.full((d, d), torch.nan)}}, {"J": {"x": torch.ones(2)}}, [1])
    ):
        path = folder / f"jacobian{i}.pt"
        torch.save(content, path)
        yield (
            "jacobian lens",
            f"values {i}",
            _imported(path, names),
            path.name,
        )


def _imported(path: Path, names: dict[str, str]) -> list[str]:
    return ["convert-transport", str(path), names["out"] + ".safetensors", "--model", names["model"]]


def _tuned(path: Path, names: dict[str, str]) -> list[str]:
    return signatures(names["sae0"], names, "--preset", "tuned_lens", "--tuned-lens", str(path))


def _lists(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    for i, (name, content) in enumerate({**PICKLES, "a command": running(f"touch {names['canary']}")}.items()):
        path = folder / f"{i}.pkl"
        path.write_bytes(content)
        mentions = "" if name == "a list" else path.name
        yield "feature list .pkl", name, ["convert-features", str(path), names["out"] + ".json"], mentions
    row = {"model_id": "m", "feature": 1, "layer": 1, "type": "res", "sae_release": names["sae"]}
    rows = {"feature a text": {"feature": "x"}, "feature below 0": {"feature": -1}, "a fraction": {"feature": 1.5}} | {
        "layer a list": {"layer": [1]}, "release a number": {"sae_release": 3}, "true": {"feature": True}
    }  # fmt: skip
    texts = {**NOT_OBJECTS, **{name: json.dumps([{**row, **change}]) for name, change in rows.items()}}
    for i, (name, text) in enumerate(texts.items()):
        path = folder / f"{i}.json"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        call = [
            "run",
            "-cn",
            "base",
            f"model={names['model']}",
            f"features_pkl={path}",
            "baseline=logit_lens_value",
            "k=4",
        ]
        mentions = path.name if name in NOT_OBJECTS else ""
        yield "feature list .json", name, [*call, f"output_filename={names['out']}.jsonl"], mentions


def _runs(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    given = [f"model={names['model']}", f"dictionary={names['sae']}", "baseline=logit_lens_value", "k=4"]
    given += ["features=0:9", f"output_filename={names['out']}.jsonl"]
    for i, (name, text) in enumerate(YAMLS.items()):
        sub = folder / str(i)
        sub.mkdir(exist_ok=True)
        path = sub / "config.yaml"
        path.write_text(text.replace("{canary}", names["canary"]))
        key = text.split(":")[0]
        rest = [word for word in given if word.split("=")[0] != key]
        yield "run config", name, ["run", "-cn", "config", "-cp", str(sub), *rest], ""
    hostile = {
        "an environment variable": "${oc.env:QUERYLENS_SECRET}",
        "a default": "${oc.env:NO,${oc.env:QUERYLENS_SECRET}}",
        "a decoder": "${oc.decode:'[1]'}", "another key": "${seed}", "a list": "[1,2]", "deep": "[" * 5000,
        "NaN": "nan",
        "a fraction": "1.5", "below 0": "-5", "an object": "!!python/object/apply:os.system ['true']",
        "circles": "${k}",
    }  # fmt: skip
    for key in (
        "model",
        "dictionary",
        "k",
        "layer",
        "features",
        "num_samples",
        "baseline",
        "dtype",
        "tokens",
        "features_pkl",
    ):
        for name, value in hostile.items():
            rest = [word for word in given if not word.startswith(f"{key}=")]
            yield "run override", f"{key}: {name}", ["run", "-cn", "base", *rest, f"{key}={value}"], ""
