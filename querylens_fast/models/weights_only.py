"""Embedding, unembedding and final norm of a checkpoint, read without the rest: ``linearisation="none"``.

That is all that the identity presets, `token_features` and `neighbours` read, and with an imported Jacobian lens the
value side too. The architecture is built without memory (meta device) to find the names of the three, and only these
tensors are read from the safetensors files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from querylens_fast.models.blocks import Block
from querylens_fast.models.errors import UnsupportedModelError
from querylens_fast.models.folders import check_folder, load_config, load_tokenizer
from querylens_fast.models.frame import named_readout
from querylens_fast.models.model import Model
from querylens_fast.models.moe import NoSingleWeights
from querylens_fast.models.norms import OwnNorm


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
        UnsupportedModelError: Its readout cannot be named without running the model.
    """
    import transformers

    check_folder(name)
    config = load_config(name, revision)
    try:
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModelError(f"model {name!r} is no causal LM of transformers ({str(error)[:200]})") from error
    parts = named_readout(skeleton, dtype, name)
    wanted = {"W_E": skeleton.get_input_embeddings(), "W_U": skeleton.get_output_embeddings(), "norm": parts.final_norm}
    files = _Files(name, revision)
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    for part, module in wanted.items():
        if part == "W_U" and tied:
            module.weight = wanted["W_E"].weight
        elif module is not None:
            _fill(module, skeleton, files, dtype, device)
    embedding, head = wanted["W_E"], wanted["W_U"]
    n_layers = int(config.get_text_config().num_hidden_layers)
    unread = Unread(f"the layers of {name!r}")
    return Model(
        name=name,
        architecture=config.get_text_config().model_type,
        blocks=[Block(unread, unread)] * n_layers,
        final_norm=OwnNorm(wanted["norm"]),
        W_E=embedding.weight.detach(),
        W_U=head.weight.detach(),
        b_U=None if getattr(head, "bias", None) is None else head.bias.detach(),
        embed_scale=parts.embed_scale,
        position_embedding=None,
        logit_softcap=parts.softcap,
        logit_scale=parts.logit_scale,
        convention="raw lm_head",
        tokenizer=load_tokenizer(tokenizer or name, revision, required=bool(tokenizer)),
        source=None,
        linearisation="none",
        has_submodules=False,
    )


class _Files:
    """A checkpoint's safetensors files: which holds which tensor; shards of a hub model are fetched when read."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision
        self.folder = Path(name) if Path(name).is_dir() else None
        self.place = self._index()

    def read(self, key: str) -> Tensor:
        """One tensor."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._path(self.place[key])), framework="pt") as opened:
                return opened.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"model {self.name!r}: {self.place[key]} is damaged or truncated ({error})") from error

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


def _fill(module: nn.Module, skeleton: nn.Module, files: _Files, dtype: torch.dtype, device: torch.device) -> None:
    """Put the checkpoint's tensors in the module's place-holders."""
    aliases: dict[int, list[str]] = {}
    for path, parameter in skeleton.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(path)
    for own, parameter in list(module.named_parameters(recurse=False)):
        known = aliases.get(id(parameter), [own])
        key = _key(known, tuple(parameter.shape), files)
        setattr(module, own, nn.Parameter(files.read(key).to(device, dtype), requires_grad=False))


def _key(paths: list[str], shape: tuple[int, ...], files: _Files) -> str:
    """The checkpoint's name of a parameter: its own, one with another prefix, or that of the weight it is tied to."""
    for path in paths:
        if path in files.place:
            return path
    for path in paths:
        tail = path.split(".")[-2:]
        near = [k for k in files.place if k.split(".")[-2:] == tail and not any(p.isdigit() for p in k.split("."))]
        near = [k for k in near if not any(tower in k for tower in ("vision", "visual", "audio"))]
        if len(near) == 1:
            return near[0]
    raise UnsupportedModelError(
        f"model {files.name!r}: its files hold no tensor under any of {', '.join(paths)} ({list(shape)}), so the "
        "readout cannot be read by itself"
    )
