"""Reading models and tokenizers from local folders and the hub; what is damaged or hostile is an error that names it.

No code that comes with a model is run (``trust_remote_code=False``), weights are read without unpickling objects, and
the size that a config claims is compared with its weights before anything of that size is made.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch

from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.runs.input_file import fits_memory

DTYPES = {
    "float64": torch.float64,
    "double": torch.float64,
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
SIZES = (*LAYER_COUNTS, "hidden_size", "n_embd", "vocab_size", "num_attention_heads", "n_head", "intermediate_size")
MOST_LAYERS = 2000
MOST_CONFIG_BYTES = 16 * 2**20
_loading_now = threading.Lock()
"""from_pretrained changes settings of the whole process: of two at a time one would miss its tied weights."""


def parse_device(device: str | torch.device) -> torch.device:
    """A device that is there, from its name."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; expected cpu, cuda, cuda:1, …") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs; use another")
    return found


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name. Raises ValueError for an unknown one."""
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return DTYPES[str(dtype).lower().removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}") from None


def load_source(name: str, dtype: torch.dtype, revision: str | None) -> Any:
    """The transformers causal LM of a folder or hub id, whole and with its own weights only.

    Raises:
        FileNotFoundError: It cannot be had.
        UnsupportedModelError: It is no causal LM of transformers, or would need code of its own or an adapter.
        ValueError: Its files are damaged or do not fit together.
    """
    import transformers

    check_folder(name)
    config = load_config(name, revision)
    try:
        with _loading_now:
            loading: Any = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                revision=revision,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
            )
    except Exception as error:
        raise _named(error, name) from error
    source, info = loading
    missing = sorted(info["missing_keys"])
    if missing:
        more = "" if len(missing) <= 4 else f" and {len(missing) - 4} more"
        raise ValueError(
            f"model {name!r}: its files lack {', '.join(missing[:4])}{more}, for which random numbers would stand; "
            "fetch them again"
        )
    return source


def load_config(name: str, revision: str | None) -> Any:
    """The transformers configuration of a folder or hub id. Raises as `load_source` does."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise _named(error, name) from error


def check_folder(name: str) -> None:
    """Look at a local folder before transformers does; a hub id passes.

    Raises:
        FileNotFoundError: It is no folder written by save_pretrained.
        UnsupportedModelError: It is an adapter, or brings its own code for an architecture.
        ValueError: Its config is no JSON object, or claims sizes that its weights do not have.
    """
    folder = Path(name)
    if not folder.exists():
        return
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise _adapter(name)
        raise FileNotFoundError(f"{name} has no config.json: it is not a folder written by save_pretrained")
    if (folder / "adapter_config.json").is_file():
        raise _adapter(name)
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError(f"model {name!r}: its {file.name} is a pipe or device; expected a regular file")
    config = _read_json(folder / "config.json", name)
    for owner in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in SIZES:
            value = owner.get(key)
            if value is None or isinstance(value, list):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"model {name!r}: its config.json has {key} = {value!r}; expected a positive integer")
            if key in LAYER_COUNTS and value > MOST_LAYERS:
                raise ValueError(
                    f"model {name!r}: its config.json has {key} = {value}, more than {MOST_LAYERS}; mend the file"
                )
    _check_sizes(folder, config, name)


def _check_sizes(folder: Path, config: dict[str, Any], name: str) -> None:
    """Compare the config's layers, width and vocabulary with the shapes in the weights' headers."""
    shapes = safetensors_shapes(folder, name)
    if not shapes:
        return
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    layers = next((text[k] for k in LAYER_COUNTS if isinstance(text.get(k), int)), 0)
    if layers > len(shapes):
        raise ValueError(
            f"model {name!r}: its config.json has {layers} layers, but its weights are {len(shapes)} tensors; they do "
            "not belong together"
        )
    dims = {d for shape in shapes.values() for d in shape}
    for key in ("hidden_size", "n_embd", "vocab_size"):
        value = text.get(key)
        if isinstance(value, int) and value not in dims and value > max(dims, default=0):
            raise ValueError(
                f"model {name!r}: its weights do not have its config's shapes ({key} = {value}, the largest of theirs "
                f"is {max(dims, default=0)})"
            )


def safetensors_shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor in a folder's safetensors files, from their headers; empty where there are none."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("adapter_"):
            raise _adapter(name)
        try:
            with fits_memory(file), safe_open(str(file), framework="pt") as opened:
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model {name!r}: its weights file {file.name} is damaged or truncated ({error})"
            ) from error
    return shapes


def load_tokenizer(source: str | Path, revision: str | None, required: bool) -> Any:
    """The tokenizer at source, or None where the model has none: asking for token strings is then an error."""
    import transformers

    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if required:
            raise FileNotFoundError(f"{str(folder)!r} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
        return None  # transformers would make up an empty tokenizer here
    try:
        return transformers.AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except Exception as error:
        if required:
            raise FileNotFoundError(f"no tokenizer could be loaded from {source!r}: {_first_line(error)}") from error
        if isinstance(error, OSError) and not folder.is_dir():
            return None  # a hub model without one
        # Without it the pad token would count as text.
        raise ValueError(
            f"the tokenizer of {str(source)!r} cannot be read ({type(error).__name__}: {_first_line(error)}); mend its "
            "files, or pass tokenizer='path-or-hub-id'"
        ) from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise ValueError(f"model {name!r}: its {path.name} is over {MOST_CONFIG_BYTES >> 20} MiB, too large for one")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {name!r}: its {path.name} is no valid JSON ({_first_line(error)})") from error
    if not isinstance(read, dict):
        raise ValueError(f"model {name!r}: its {path.name} holds a {type(read).__name__}; expected a JSON object")
    return read


def _adapter(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model {name!r} holds an adapter (adapter_config.json), not a whole model; load it with peft and save what "
        "merge_and_unload() returns"
    )


def _named(error: Exception, name: str) -> Exception:
    """What transformers raised, as an error that names the model and says what is wrong."""
    text = _first_line(error)
    if isinstance(error, UnsupportedModelError):
        return error
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return UnsupportedModelError(
            f"model {name!r} needs code of its own (auto_map in its config), which is never run; models of "
            "transformers' own architectures are supported"
        )
    if isinstance(error, ValueError) and any(
        said in str(error) for said in ("Unrecognized", "not recognized", "does not recognize")
    ):
        return UnsupportedModelError(f"model {name!r}: {text}")
    if isinstance(error, ImportError):
        return UnsupportedModelError(f"model {name!r} needs a package that is not installed ({text})")
    if type(error).__name__ == "SafetensorError":
        return ValueError(f"model {name!r}: its weights file is damaged or truncated ({text})")
    if isinstance(error, RuntimeError) and "size" in str(error):
        return ValueError(f"model {name!r}: its weights do not have its config's shapes ({text})")
    if isinstance(error, OSError) and not isinstance(error, UnicodeError):
        return FileNotFoundError(
            f"model {name!r} could not be loaded: it is neither a readable local folder nor a hub id that can be "
            f"reached from here ({text})"
        )
    return ValueError(f"model {name!r} could not be loaded ({type(error).__name__}: {text}); check its files")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
