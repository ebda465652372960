"""Hostile dictionaries and models: weights, configurations, tokenizers, and code that they bring along."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.faults.payloads import NOT_OBJECTS, PICKLES, PT_FILES, SAE_CONFIGS, pt, running, safetensors_files, zip_of

Found = tuple[str, str, list[str], str]
"""Kind, name, arguments, and what the message has to name."""


HARMLESS = ("code for a known type", "architectures a number", "an attention of its own", "NaN")
"""Configurations that load as if what is hostile in them were not there."""


def signatures(dictionary: Path | str, names: dict[str, str], *more: str) -> list[str]:
    preset = () if "--preset" in more else ("--preset", "logit_lens_value")
    call = ["signatures", str(dictionary), names["model"], *preset, "--k", "4"]
    return [*call, *more, "--out", names["out"] + ".parquet"]


def weights(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    pickles = {**PICKLES, "a command": running(f"touch {names['canary']}")}
    contents = {
        **{name: pt(content) for name, content in pickles.items()},
        **{n: make() for n, make in PT_FILES.items()},
    }
    for i, (name, content) in enumerate(contents.items()):
        path = folder / f"{i}.pt"
        path.write_bytes(content)
        yield "dictionary .pt", name, signatures(path, names, "--layer", "1"), path.name
    for i, (name, content) in enumerate(safetensors_files("W_dec").items()):
        path = folder / f"{i}.safetensors"
        path.write_bytes(content)
        yield "dictionary .safetensors", name, signatures(path, names, "--layer", "1"), path.name
    bomb = folder / "bomb.npz"
    _zip_bomb(bomb)
    yield "dictionary .npz", "a bomb", signatures(bomb, names, "--layer", "1"), bomb.name
    for i, content in enumerate((b"", b"PK\x03\x04", zip_of({"W_dec.npy": b"\x93NUMPY\x01\x00\xff\xff"}))):
        path = folder / f"{i}.npz"
        path.write_bytes(content)
        yield "dictionary .npz", f"damaged {i}", signatures(path, names, "--layer", "1"), path.name
    values = {"NaN": torch.nan, "infinity": torch.inf, "overflow": 3e38}
    for name, value in values.items():
        path = folder / f"{name}.safetensors"
        save_file({"W_dec": torch.full((20, 16), value)}, str(path))
        yield "dictionary values", name, signatures(path, names, "--layer", "1"), "W_dec" if name != "overflow" else ""


def _zip_bomb(path: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte."""
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (131072, 1024), }"
    head = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("W_dec.npy", "w") as entry:
        entry.write(head)
        for _ in range(512):
            entry.write(b"\0" * (1 << 20))


def configs(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    for i, (name, text) in enumerate((NOT_OBJECTS | SAE_CONFIGS).items()):
        sae = folder / f"sae{i}"
        shutil.copytree(names["sae"], sae, dirs_exist_ok=True)
        (sae / "cfg.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        # A config without what makes it wrong may be a right one.
        yield "sae-lens config", name, signatures(sae, names, "--layer", "1"), ""
        trained = folder / f"trained{i}"
        trained.mkdir(exist_ok=True)
        weights = {"encoder.weight": (20, 16), "decoder.weight": (16, 20), "encoder.bias": (20,), "bias": (16,)}
        torch.save({key: torch.randn(shape) for key, shape in weights.items()}, trained / "ae.pt")
        (trained / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        yield "dictionary_learning config", name, signatures(trained, names, "--layer", "1"), ""


def models(folder: Path, names: dict[str, str]) -> Iterator[Found]:
    good = Path(names["model"])
    config = json.loads((good / "config.json").read_text())
    evil = f"import os\nos.system('touch {names['canary']}')\n"
    texts, classes = dict(NOT_OBJECTS), {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    changes: dict[str, dict[str, object]] = {
        "an unknown type": {"model_type": "evil"},
        "code of its own": {"model_type": "evil", "auto_map": classes},
        "code for a known type": {"auto_map": classes},
        "code from the hub": {"model_type": "evil", "auto_map": {"AutoConfig": "someone/evil--evil.Config"}},
        "ten million layers": {"n_layer": 10**7},
        "no layers": {"n_layer": 0},
        "layers below 0": {"n_layer": -3},
        "layers a text": {"n_layer": "two"},
        "layers true": {"n_layer": True},
        "a wider model": {"n_embd": 10**6},
        "heads that do not divide": {"n_head": 7},
        "a huge vocabulary": {"vocab_size": 10**10},
        "a dtype that is none": {"dtype": "float7", "torch_dtype": "float7"},
        "an activation that is none": {"activation_function": "evil"},
        "a mapping for a number": {"n_embd": {"a": 1}},
        "an epsilon of text": {"layer_norm_epsilon": "small"},
        "architectures a number": {"architectures": 3},
        "an attention of its own": {"attn_implementation": "someone/evil", "_attn_implementation": "someone/evil"},
    }  # fmt: skip
    texts |= {name: json.dumps({**config, **change}) for name, change in changes.items()}
    for i, (name, text) in enumerate(texts.items()):
        model = _copied(good, folder / f"model{i}")
        (model / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        (model / "evil.py").write_text(evil)
        harmless = name in (
            "code for a known type",
            "architectures a number",
            "an attention of its own",
            "NaN",
            "a quantization",
        )
        yield "model config", name, _with_model(model, names), "" if harmless else f"model{i}"
    for i, (file, content) in enumerate(_model_files(good, names)):
        model = _copied(good, folder / f"damaged{i}")
        (model / file).write_bytes(content)
        if file.endswith(".bin"):
            (model / "model.safetensors").unlink()
        yield "model files", f"{file} {len(content)}", _with_model(model, names), ""


def _model_files(good: Path, names: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    weights = (good / "model.safetensors").read_bytes()
    yield "model.safetensors", weights[: len(weights) // 2]
    yield from (("model.safetensors", content) for content in safetensors_files("transformer.wte.weight").values())
    yield "pytorch_model.bin", pt(running(f"touch {names['canary']}"))
    yield "pytorch_model.bin", running(f"touch {names['canary']}")
    for text in (*NOT_OBJECTS.values(), '{"version": "1.0", "model": {"type": "Evil"}}'):
        yield "tokenizer.json", text.encode("utf-8", "surrogatepass")
    for text in (*NOT_OBJECTS.values(), '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", null]}}'):
        yield "tokenizer_config.json", text.encode("utf-8", "surrogatepass")


def _with_model(model: Path, names: dict[str, str]) -> list[str]:
    return signatures(names["sae"], {**names, "model": str(model)})


def _copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target
