"""The demo: transport and signatures of the embedded model and dictionaries, offline, in under a minute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from querylens_fast.demo import ASSETS
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample
from querylens_fast.lens.compute import Signatures, signatures
from querylens_fast.models.load import load_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, load_tokens
from querylens_fast.relations.flow import feature_flow
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.transport import Transport

FOLDER = Path("querylens_demo")
PRESETS = ("logit_lens_key", "query_lens_key", "logit_lens_value", "query_lens_value")
FIT_SEQUENCES = 16
N_PROBES = 16
BINS = 40
QUARTILE_EXAMPLES = 20


@dataclass(frozen=True)
class Example:
    """The embedded model, its dictionaries by layer, and the held-out sample in two parts: to fit on, to look at."""

    model: Model
    dictionaries: list[Dictionary]
    fit_tokens: Tokens
    held_out: Tokens


@dataclass
class Shown:
    """One row of the demo's table."""

    dictionary: str
    layer: int
    feature: int
    activating: list[str]
    tokens: dict[str, list[str]]


class DemoResult(NamedTuple):
    """What the demo did."""

    folder: Path
    files: list[Path]
    seconds: dict[str, float]
    """By step."""
    rows: list[Shown]
    """Of the table."""
    n_features: int


def load_example(assets: Path = ASSETS) -> Example:
    """The embedded model, dictionaries and tokens.

    Raises:
        FileNotFoundError: The package was installed without its assets.
    """
    if not (assets / "tokens.safetensors").is_file():
        raise FileNotFoundError(f"the demo's files are missing from {str(assets)!r}; reinstall the package")
    model = load_model(assets / "model")
    folders = sorted(assets.glob("sae_layer*")) + sorted(assets.glob("transcoder_layer*"))
    tokens = load_tokens(assets / "tokens.safetensors", model=model)
    cut = FIT_SEQUENCES
    return Example(
        model,
        [load_dictionary(folder) for folder in folders],
        tokens.head(cut),
        Tokens(tokens.ids[cut:], tokens.valid_mask[cut:], tokens.source),
    )


def run_demo(out: Path | None = None, k: int = 25, assets: Path = ASSETS, browsable: bool = False) -> DemoResult:
    """Fit the transport, write four signatures of every feature of every layer, and choose three features to show.

    With ``browsable`` the feature samples, their tokens and the feature flow are written too, for `serve`. Shown are,
    among the features of a dictionary that are active in at least 20 held-out sequences, those at the quartiles (25,
    50, 75 %) of their strongest activation.

    Args:
        out: Folder; None: `FOLDER`, or where that holds results of an earlier version or with another k, the first of
            FOLDER-2, FOLDER-3, … that does not.
        k: Tokens on each side.
        assets: The model and its dictionaries.
        browsable: Write what only pages show, too.

    Raises:
        FileExistsError: ``out`` holds other results.
    """
    clock = _Clock()
    example = load_example(assets)
    clock.lap("load")
    transport = fit_transport(example.model, example.fit_tokens, orders=("full",), energy="probes", n_probes=N_PROBES)
    clock.lap("transport")
    folder, files = _write_signatures(out, example, transport, k)
    transport.save(folder / "transport.safetensors")
    example.fit_tokens.save(folder / "tokens.safetensors")
    files += [folder / "transport.safetensors", folder / "tokens.safetensors"]
    clock.lap("signatures")
    rows = []
    for dictionary in example.dictionaries:
        kept = folder / f"sample-{Path(dictionary.name).name}.parquet" if browsable else None
        sample = feature_sample(dictionary, example.model, example.held_out, out=kept, progress=False)
        rows += _shown(example.model, dictionary, transport, sample)
    clock.lap("activations")
    if browsable:
        example.held_out.save(folder / "held_out.safetensors")
        feature_flow(example.dictionaries, k=5, out=folder / "flow.parquet", progress=False)
        clock.lap("flow")
    return DemoResult(folder, files, clock.seconds, rows, sum(d.n_features for d in example.dictionaries))


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step], self._last = now - self._last, now


def _write_signatures(out: Path | None, example: Example, transport: Transport, k: int) -> tuple[Path, list[Path]]:
    """(Folder, files). Results that are there are compared first, so that nothing is written beside other ones."""
    for n in count(1):
        folder = out or (FOLDER if n == 1 else Path(f"{FOLDER}-{n}"))
        wanted = [
            (folder / f"{Path(dictionary.name).name}.{preset}.parquet", dictionary, preset)
            for dictionary in example.dictionaries
            for preset in PRESETS
        ]
        options: dict[str, Any] = {"transport": transport, "k": k, "histogram": BINS, "progress": False}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for path, dictionary, preset in sorted(wanted, key=lambda job: not job[0].exists()):
                signatures(dictionary, example.model, preset=preset, out=path, **options)
        except FileExistsError as error:
            if out is None:
                continue
            raise FileExistsError(
                f"{str(out)!r} holds results of another demo, of an earlier version or with another k: delete the "
                f"folder or give another --out ({error})"
            ) from error
        return folder, [path for path, _, _ in wanted]
    raise AssertionError("unreachable")


def _shown(model: Model, dictionary: Dictionary, transport: Transport, sample: FeatureSample) -> list[Shown]:
    active = (sample.counts >= QUARTILE_EXAMPLES).nonzero()[:, 0]
    by_strength = active[sample.values[active, 0].argsort(stable=True)]
    chosen = by_strength[[len(by_strength) * q // 4 for q in (1, 2, 3)]]
    found: dict[str, Signatures] = {
        preset: signatures(dictionary, model, preset=preset, transport=transport, k=5, features=chosen)
        for preset in PRESETS
    }
    rows = []
    for i, feature in enumerate(chosen.tolist()):
        ids = [t for t in sample.tokens[feature].tolist() if t >= 0]
        by_count = sorted(set(ids), key=lambda t: (-ids.count(t), ids.index(t)))[:4]
        tokens = {preset: signature.top_tokens[i] for preset, signature in found.items()}
        name = Path(dictionary.name).name
        rows.append(Shown(name, dictionary.layer, feature, model.str_tokens(by_count), tokens))
    return rows


def visible(tokens: Sequence[str]) -> str:
    """Tokens on one line; spaces and line ends are shown by marks."""
    marks = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
    return "  ".join(t.translate(marks) or "∅" for t in tokens)


def total_seconds(result: DemoResult) -> float:
    """Wall time of all steps."""
    return sum(result.seconds.values())


def threads() -> int:
    """CPU threads torch used."""
    return torch.get_num_threads()
