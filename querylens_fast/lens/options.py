"""`LensOptions`: the options of `signatures`, of `run` and of the command line, written and checked once."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from torch import Tensor

from querylens_fast.lens.presets import Preset, find_preset
from querylens_fast.lens.tuned_lens import TunedLens
from querylens_fast.models.tokens import Tokens
from querylens_fast.runs.arguments import finite_number, whole_number
from querylens_fast.topk.arguments import MAX_BINS
from querylens_fast.transport.jacobians import Submodule
from querylens_fast.transport.transport import Transport

Stats = Literal["auto", "none", "rel_var", "exact"]
FileFormat = Literal["parquet", "jsonl"]
Unembedding = Literal["raw", "folded"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "stats": ("auto", "none", "rel_var", "exact"),
    "submodule": ("both", "attn", "mlp", None),
    "backend": ("auto", "torch", "triton"),
    "format": ("parquet", "jsonl", None),
    "unembedding": ("raw", "folded"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LensOptions:
    """Which lens to look through, over which sample, and where the result goes.

    Attributes:
        preset: A name in `PRESETS`, or (feature_vector, stream_transition, readout).
        transport: From `fit_transport` or `load_transport`, a file of a transport or of a Jacobian lens (.pt), or the
            name of a published lens's model (needs transformer-lens). Without one, give ``tokens``: fewer features
            than d_model are then carried through the model one by one, more through a transport fitted for the call.
        k: Tokens on each side.
        features: None or "all", a slice, a range "start:stop", or feature ids.
        out: A ``.parquet`` or ``.jsonl`` file to stream to; a killed run resumes when the call is repeated.
        tokens: The token sample, for token_change, zero_out, ``stats="exact"``, or in place of a transport.
        tuned_lens: The parameter file of the tuned-lens library, for the preset tuned_lens.
        stats: "auto" gives what costs nothing; "rel_var" requires the transport's energies; "exact" gives all of the
            reference's statistics, at the cost of carrying each feature through the model; "none".
        layers: For first-order presets: each layer's own tokens and energy too.
        histogram: Bins of a histogram of all scores of each feature, from its lowest to its highest; 0: none.
        token_change_value: The activation that token_change sets.
        adaptive_threshold: None: query_lens_value_adaptive mixes the full transport with the direct path by the
            relative variance. A number: it takes the most faithful transition with at most this variance instead.
        final_norm: Apply the final norm before the unembedding.
        unit_norm: Divide each feature's vector by its length first. None: for the preset dashboard, as dashboards do.
        unembedding: Of the preset dashboard: "raw", or "folded" with the final norm's scale and centered, as
            transformer-lens processes it.
        submodule: "attn" or "mlp" counts the Jacobians of those modules alone; "both". None: as the transport was
            fitted, or both.
        through_norms: Take Jacobians through the modules' norms. None: as the transport was fitted, or yes.
        backend: Of the streamed top-k: "auto", "torch" or "triton".
        max_memory_gib: Bound on the working memory of passes through the model, GiB.
        vectors: Keep the vectors that are read out in the result in memory.
        format: "parquet" or "jsonl"; by default from the ending of ``out``.
        token_strings: Write token strings beside ids (needs a tokenizer).
        block_rows: Features computed at a time, and lost when the run is killed. By default as many as keep a block's
            vectors and its result under 32 MiB each (128 MiB without ``out``), at most 32,768; 256 where each feature
            costs a pass through the model.
        resume: Continue what an earlier, killed run wrote to ``out``; False: refuse to touch it.
        progress: Show a progress bar; by default with ``out``.
    """

    preset: str | Preset | Sequence[str | None] = "query_lens_value"
    transport: Transport | str | Path | None = None
    k: int = 25
    features: Any = None
    out: str | Path | None = None
    tokens: Tokens | Tensor | str | Path | None = None
    tuned_lens: TunedLens | str | Path | None = None
    stats: Stats = "auto"
    layers: bool = False
    histogram: int = 0
    token_change_value: float = 10.0
    adaptive_threshold: float | None = None
    final_norm: bool = True
    unit_norm: bool | None = None
    unembedding: Unembedding = "raw"
    submodule: Submodule | None = None
    through_norms: bool | None = None
    backend: str = "auto"
    max_memory_gib: float = 2.0
    vectors: bool = False
    format: FileFormat | None = None
    token_strings: bool = True
    block_rows: int | None = None
    resume: bool = True
    progress: bool | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> LensOptions:
        """Options from keyword arguments. Raises TypeError for a name that is none, with those that are."""
        return from_keywords(cls, given)

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ValueError: An option, by its name, its value and what was expected.
        """
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; expected {', '.join(str(c) for c in choices)}")
        for name, least in (("k", 1), ("block_rows", 1)):
            value = getattr(self, name)
            if value is not None or name == "k":
                whole_number(name, value, least)
        if whole_number("histogram", self.histogram, 0) > MAX_BINS:
            raise ValueError(f"histogram is {self.histogram}; expected a number of bins from 0 (none) to {MAX_BINS}")
        finite_number("max_memory_gib", self.max_memory_gib, above=0)
        finite_number("token_change_value", self.token_change_value)
        if self.adaptive_threshold is not None and finite_number("adaptive_threshold", self.adaptive_threshold, 0) > 1:
            raise ValueError(
                f"adaptive_threshold is {self.adaptive_threshold}; expected a relative variance from 0 to 1"
            )
        self._check_preset()

    def _check_preset(self) -> None:
        lens = self.lens
        if lens.is_ablation and self.tokens is None:
            raise ValueError(f"preset {lens.name!r} runs the model on a sample: pass tokens=")
        if lens.needs_transport and self.transport is None and self.tokens is None:
            raise ValueError(
                f"preset {lens.name!r} needs transport= (from fit_transport or load_transport), or it needs tokens= to "
                "carry features through the model"
            )
        if self.stats == "exact" and lens.needs_transport and self.tokens is None:
            raise ValueError("stats='exact' carries the chosen features through the model: pass tokens=")
        if lens.stream_transition == "tuned_lens" and self.tuned_lens is None:
            raise ValueError(
                f"preset {lens.name!r} needs tuned_lens='params.pt', a file of the tuned-lens library (a configuration "
                "needs params_path=)"
            )
        if lens.stream_transition != "tuned_lens" and self.tuned_lens is not None:
            raise ValueError(f"tuned_lens is given, but preset {lens.name!r} does not use one")
        if self.unembedding != "raw" and not lens.is_dashboard:
            raise ValueError(f"unembedding={self.unembedding!r} is for preset 'dashboard'; preset is {lens.name!r}")
        if self.layers and lens.stream_transition != "first_order":
            raise ValueError(f"layers=True is for first-order presets; {lens.name!r} has no terms by layer")

    @property
    def at_unit_length(self) -> bool:
        """Whether vectors are divided by their length: as given, or as the preset has it."""
        return self.lens.is_dashboard if self.unit_norm is None else self.unit_norm

    @property
    def lens(self) -> Preset:
        """The preset's three components."""
        return find_preset(self.preset)


_OPTIONS_LINE = re.compile(r"^( *)\*\*options: .*$", re.M)
P = ParamSpec("P")
R = TypeVar("R")


def takes(options: Callable[P, object]) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, Any, P], R]]:
    """Give a function (dictionary, model, **options) the keyword arguments of a dataclass.

    They then show in its signature, in its documentation (in place of the line "**options: …") and to type checkers.
    """

    def decorate(function: Callable[..., R]) -> Callable[Concatenate[Any, Any, P], R]:
        described_lines = (f"{name}: {text}".replace("\n", "\n    ") for name, text in described(options).items())
        lines = "\n".join(described_lines)
        function.__doc__ = _OPTIONS_LINE.sub(lambda m: textwrap.indent(lines, m[1]), function.__doc__ or "")
        own, added = inspect.signature(function), inspect.signature(options)
        parameters = [*list(own.parameters.values())[:-1], *added.parameters.values()]
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function  # type: ignore[return-value]

    return decorate


def from_keywords(options: type[R], given: dict[str, Any]) -> R:
    """A dataclass of options from keyword arguments. Raises TypeError for a name that is none, with those that are."""
    known = [f.name for f in fields(options)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise TypeError(f"unexpected option {name!r}; the options are {', '.join(known)}")
    return options(**given)


def described(documented: Any) -> dict[str, str]:
    """Argument → description, from the Args or Attributes section of a docstring. Empty without docstrings (-OO)."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(documented.__doc__ or "").splitlines():
        if not line.startswith(" "):
            inside = line in ("Args:", "Attributes:") or (inside and not line)
            continue
        if not inside:
            continue
        if not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        else:
            found[name] += "\n" + line.strip()
    return found


def plain_type(annotation: Any) -> Any:
    """What an option's type is in a configuration or on a command line: bool, int, float or text, or None too."""
    parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    kinds = {_plain(part) for part in parts if part is not type(None)}
    kind = next(k for k in (bool, int, float, str) if k in kinds)
    return kind | None if type(None) in parts else kind


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _plain(annotation: Any) -> type:
    return annotation if annotation in (bool, int, float) else str
