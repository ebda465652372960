"""Ways to name a feature by tokens, for comparison: presets computed on the fly, and result files.

A method is named by what makes it: a preset ("query_lens_key"), an ablation at an activation ("token_change@5"), or a
result file of `signatures` ("layer6.parquet").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.lens.compute import signatures
from querylens_fast.lens.presets import Preset, find_preset
from querylens_fast.lens.storage import StoredSignatures, read_identity, refuse_other_columns
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens
from querylens_fast.runs.run_record import agree
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.jacobians import Order, Side
from querylens_fast.transport.transport import ORDERS, Transport


@dataclass(frozen=True)
class Context:
    """What presets may need, for one model: each is passed only to the presets that use it."""

    model: Model
    transport: Transport | None = None
    tokens: Tokens | None = None
    """The sample of token_change and zero_out."""
    tuned_lens: str | Path | None = None
    max_memory_gib: float = 2.0


@dataclass(frozen=True)
class Method:
    """One way to name features. ``preset`` or ``path`` is set, not both."""

    name: str
    preset: Preset | None = None
    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def token_ids(self, context: Context, dictionary: Dictionary, features: Tensor, k: int) -> Tensor:
        """The k top token ids of each feature [n], [n, k] int64.

        Raises:
            ValueError: The file is of another dictionary, or lacks features or tokens; a preset lacks what it needs.
        """
        if self.preset is not None:
            return self._computed(context, dictionary, features, k)
        return self._stored(context.model, features, k)

    def serves(self, dictionary: Dictionary) -> bool:
        """Whether the method is about this dictionary: a preset is about any, a file about its own."""
        if self.path is None:
            return True
        return agree(read_identity(self.path).get("dictionary_fingerprint"), dictionary.fingerprint)

    @property
    def side(self) -> Side:
        """Whether its tokens are read out by the embedding ("key") or by the unembedding or logits ("value")."""
        preset = self.preset
        if self.path is not None:
            identity = read_identity(self.path)
            preset = find_preset([identity[name] for name in ("feature_vector", "stream_transition", "readout")])
        assert preset is not None
        return "key" if (preset.readout or "").startswith("embed") else "value"

    def sizes(self, ks: Sequence[int]) -> list[int]:
        """Those of the signature sizes that the method has: a file's own k is its largest.

        Raises:
            ValueError: The file has none of them.
        """
        largest = max(ks) if self.path is None else read_identity(self.path).get("k", 0)
        if largest < min(ks):
            raise ValueError(f"{str(self.path)!r} holds {largest} tokens a feature; expected at least k = {min(ks)}")
        return [k for k in ks if k <= largest]

    def _computed(self, context: Context, dictionary: Dictionary, features: Tensor, k: int) -> Tensor:
        preset = self.preset
        assert preset is not None
        given: dict[str, Any] = dict(self.options)
        if preset.needs_transport:
            given["transport"] = context.transport
        if preset.is_ablation:
            given["tokens"] = context.tokens
        if preset.stream_transition == "tuned_lens":
            given["tuned_lens"] = context.tuned_lens
        return signatures(
            dictionary,
            context.model,
            preset=preset,
            k=k,
            features=features,
            stats="none",
            max_memory_gib=context.max_memory_gib,
            progress=False,
            **given,
        ).top_ids

    def _stored(self, model: Model, features: Tensor, k: int) -> Tensor:
        path = self.path
        assert path is not None
        refuse_other_columns(path)
        table = StoredSignatures(path, 0, "jsonl" if path.suffix == ".jsonl" else "parquet").table()
        if not len(table):
            raise ValueError(f"{str(path)!r} holds no signatures; write one with features='all'")
        stored = torch.from_numpy(table["feature"].to_numpy().copy())
        order = stored.argsort()
        place = torch.searchsorted(stored[order], features).clamp_max(len(stored) - 1)
        place = order[place]
        absent = stored[place] != features
        if bool(absent.any()):
            missing = int(features[absent][0])
            raise ValueError(f"{str(path)!r} holds no signature of feature {missing}; write one with features='all'")
        chosen = table["top_ids"].combine_chunks().take(place.numpy())
        found = torch.tensor([ids[:k] for ids in chosen.to_pylist()], dtype=torch.int64).reshape(-1, k)
        if not 0 <= int(found.min()) <= int(found.max()) < model.vocab_size:
            raise ValueError(
                f"{str(path)!r} holds token ids from {int(found.min())} to {int(found.max())}; expected those of "
                f"{model.name!r}, below {model.vocab_size}"
            )
        return found


def find_methods(names: Sequence[str | Path]) -> list[Method]:
    """The methods of names.

    Raises:
        ValueError: An unknown preset, an activation for a preset that has none, or the same name twice.
        FileNotFoundError: A result file that does not exist.
    """
    found = [_find(str(name)) for name in names]
    twice = sorted({m.name for m in found if [x.name for x in found].count(m.name) > 1})
    if twice or not found:
        raise ValueError(f"methods are {[m.name for m in found]}; expected at least one, and each once")
    return found


def fit_for(methods: Sequence[Method], model: Model, tokens: Tokens) -> Transport | None:
    """The transport that the presets among methods need, fitted on tokens; None where they need none."""
    moving = {m.preset.stream_transition for m in methods if m.preset is not None and m.preset.needs_transport}
    if not moving:
        return None
    adaptive = "adaptive" in moving
    orders: list[Order] = [order for order in ORDERS if adaptive or order in moving]
    return fit_transport(model, tokens, orders=orders, energy="probes" if adaptive else "none")


def _find(name: str) -> Method:
    if name.endswith((".parquet", ".jsonl")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"result file {name!r} does not exist")
        return Method(Path(name).name, path=Path(name))
    base, at, value = name.partition("@")
    preset = find_preset(base)
    if not at:
        return Method(name, preset)
    if preset.stream_transition != "token_change":
        raise ValueError(f"method {name!r} names an activation, which only token_change takes")
    try:
        return Method(name, preset, options={"token_change_value": float(value)})
    except ValueError:
        raise ValueError(f"method {name!r}: {value!r} is no activation; write for instance token_change@5") from None
