"""Embedding, unembedding and final norm of a checkpoint, read without its layers: ``linearisation="none"``.

That is all that the identity presets, `token_features` and `neighbours` read, and with an imported Jacobian lens the
value side too. The architecture is built with its large tensors on the meta device and its layers replaced by ones that
pass the stream on. One forward pass over that shows which modules lie around the layers; their tensors, and no others,
are read from the safetensors files, and the readout is measured as that of a whole model is (`frame`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from querylens_fast.models.blocks import Block
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.folders import check_folder, load_config, load_tokenizer
from querylens_fast.models.frame import measured_frame
from querylens_fast.models.model import Model
from querylens_fast.models.moe import NoSingleWeights
from querylens_fast.models.own_layers import OwnLayers, probe_ids

LARGE = 1 << 20
"""Elements from which a tensor of the architecture is left without memory."""
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class Unread(NoSingleWeights):
    """Stands for a layer whose weights were not read; running or linearising it is an error that says so."""

    adds_directly, routed = True, False

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise: there are no weights to run."""
        raise UnsupportedModelError(
            f"{self.name} was not read (linearisation='none'), so it cannot be run or differentiated; load the model "
            "without that option"
        )

    linearise = __call__


def load_weights_only(
    name: str, dtype: torch.dtype, device: torch.device, tokenizer: str | Path | None, revision: str | None
) -> Model:
    """A `Model` with embedding, unembedding and final norm alone.

    Raises:
        FileNotFoundError: The folder or hub id cannot be had, or holds no safetensors files.
        UnsupportedModelError: What lies around its layers cannot be run or read by itself.
    """
    import transformers

    check_folder(name)
    config = load_config(name, revision)
    try:
        with _LargeOnMeta():
            skeleton = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation="eager", dtype=dtype
            )
    except Exception as error:
        raise UnsupportedModelError(
            f"model {name!r}: its architecture cannot be built without its weights ({str(error)[:200]})"
        ) from error
    if skeleton.get_output_embeddings() is None:
        raise UnsupportedModelError(f"model {name!r} has no unembedding; load one with AutoModelForCausalLM's head")
    try:
        own = _around_layers(skeleton, name, _Filler(skeleton, _Files(name, revision), dtype, device))
        frame = measured_frame(skeleton, own, name, load_tokenizer(tokenizer or name, revision, bool(tokenizer)))
    except (RuntimeError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"model {name!r} ({type(skeleton).__name__}): what lies around its layers cannot be run by itself "
            f"({type(error).__name__}: {str(error)[:200]}); load the model with its layers"
        ) from error
    if skeleton.get_input_embeddings().weight.data_ptr() != frame.W_E.data_ptr():
        raise UnsupportedModelError(
            f"model {name!r} does more to its token embeddings than scale them; load the model with its layers"
        )
    unread = Unread(f"the layers of {name!r}")
    frame.blocks = [Block(unread, unread)] * len(own)
    frame.source, frame.linearisation, frame.has_submodules = None, "none", False
    return frame


class _LargeOnMeta(TorchFunctionMode):
    """New large tensors are made on the meta device; small ones are real, as tables and scales have to be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MAKERS:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if torch.Size(size if not isinstance(size, int) else (size,)).numel() >= LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Passes(nn.Module):
    """Stands for a layer: gives the stream it is given, alone (``several`` 0) or first in a tuple of so many."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.several = 0
        self.layer = [layer]  # not a submodule

    def __getattr__(self, name: str) -> Any:
        """What the model asks of a layer (its type of attention, say)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *[None] * (self.several - 1)) if self.several else x


def _around_layers(skeleton: Any, name: str, fill: Callable[[nn.Module], None]) -> OwnLayers:
    """The skeleton with layers that do nothing; every module that is called has its tensors filled in before."""
    decoder = skeleton.get_decoder() if hasattr(skeleton, "get_decoder") else skeleton.base_model
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UnsupportedModelError(f"model {name!r} ({type(skeleton).__name__}) has no list of layers")
    layers = max(lists, key=len)
    originals = list(layers)
    for i, layer in enumerate(originals):
        layers[i] = _Passes(layer)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    for module in (embedding, head):
        fill(module)
    for module in skeleton.modules():
        module.register_forward_pre_hook(lambda module, _args: fill(module))
    own = OwnLayers.around(skeleton, list(layers), name)
    ids = probe_ids(len(embedding.weight), embedding.weight.device)
    failure: Exception | None = None
    for several in range(4):
        for layer in layers:
            layer.several = several  # type: ignore[assignment]
        try:
            if own.forward(ids).shape == (*ids.shape, len(head.weight)):
                return own
        except UnsupportedModelError:
            raise
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
            failure = failure or error
    raise RuntimeError("its layers return something else than the stream") from failure


class _Filler:
    """Puts the checkpoint's tensors in a module's own parameters, those that modules share once."""

    def __init__(self, skeleton: nn.Module, files: _Files, dtype: torch.dtype, device: torch.device) -> None:
        self.skeleton, self.files, self.dtype, self.device = skeleton, files, dtype, device
        self.paths: dict[nn.Parameter, list[str]] = {}
        for path, parameter in skeleton.named_parameters(remove_duplicate=False):
            self.paths.setdefault(parameter, []).append(path)
        self.read: dict[nn.Parameter, nn.Parameter] = {}

    def __call__(self, module: nn.Module) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in self.paths:
                continue
            if parameter not in self.read:
                found = self.files.read(self.paths[parameter], self.skeleton)
                if found.shape != parameter.shape:
                    raise ValueError(
                        f"model {self.files.name!r}: its files hold {self.paths[parameter][0]} as {list(found.shape)}, "
                        f"but its config says {list(parameter.shape)}"
                    )
                self.read[parameter] = nn.Parameter(found.to(self.device, self.dtype), requires_grad=False)
            setattr(module, own, self.read[parameter])


def _names_on_loading(skeleton: Any, keys: list[str]) -> dict[str, str]:
    """Parameter path → key, for keys of the files that transformers renames on loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # versions that rename nothing
        return {}
    known = dict.fromkeys(skeleton.state_dict(), True)
    renamings = [r for r in get_model_conversion_mapping(skeleton) if isinstance(r, WeightRenaming)]
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    return {rename_source_key(key, renamings, [], prefix, known)[0]: key for key in keys}


class _Files:
    """A checkpoint's safetensors files: which holds which tensor; shards of a hub model are fetched when read."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision
        self.folder = Path(name) if Path(name).is_dir() else None
        self.place = self._index()
        self._names: dict[str, str] | None = None

    def read(self, paths: list[str], skeleton: nn.Module) -> Tensor:
        """The tensor of a parameter of ``skeleton`` that has these paths (several where weights are tied).

        Raises:
            UnsupportedModelError: The files do not hold it, or hold something that becomes it on loading.
        """
        from safetensors import SafetensorError, safe_open

        key = next((p for p in paths if p in self.place), None)
        if key is None:
            key = next((self._renamed(skeleton)[p] for p in paths if p in self._renamed(skeleton)), None)
        if key is None:
            raise UnsupportedModelError(
                f"model {self.name!r}: its files hold no tensor that is {' or '.join(paths)}, so the readout cannot be "
                "read by itself; load the model with its layers"
            )
        try:
            with safe_open(str(self._path(self.place[key])), framework="pt") as opened:
                return opened.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"model {self.name!r}: {self.place[key]} is damaged or truncated ({error})") from error

    def _renamed(self, skeleton: nn.Module) -> dict[str, str]:
        """Parameter path → the name in the files that transformers loads it from."""
        if self._names is None:
            self._names = _names_on_loading(skeleton, list(self.place))
        return self._names

    def _index(self) -> dict[str, str]:
        """Tensor name → file name."""
        index = self._find("model.safetensors.index.json")
        if index is not None:
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"model {self.name!r}: {index.name} is no index of safetensors files") from error
        whole = self._find("model.safetensors")
        if whole is None:
            raise FileNotFoundError(
                f"model {self.name!r} has no model.safetensors (or index of such); linearisation='none' reads single "
                "tensors, which other formats do not allow"
            )
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(whole), framework="pt") as opened:
                return dict.fromkeys(opened.keys(), whole.name)
        except SafetensorError as error:
            raise ValueError(f"model {self.name!r}: {whole.name} is damaged or truncated ({error})") from error

    def _path(self, file: str) -> Path:
        found = self._find(Path(file).name)
        if found is None:
            raise FileNotFoundError(f"model {self.name!r} lacks {file}, which its index names")
        return found

    def _find(self, file: str) -> Path | None:
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        from transformers.utils import cached_file

        try:
            found = cached_file(self.name, file, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise FileNotFoundError(f"model {self.name!r}: {file} could not be fetched ({error})") from error
        return None if found is None else Path(found)
