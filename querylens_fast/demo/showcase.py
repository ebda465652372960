"""The demo: transport and signatures of the embedded model and dictionaries, offline, in under a minute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from querylens_fast.demo import ASSETS
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.feature_sample import FeatureSample, feature_sample
from querylens_fast.lens.compute import Signatures, signatures
from querylens_fast.lens.storage import StoredSignatures
from querylens_fast.models.load import load_model
from querylens_fast.models.model import Model
from querylens_fast.models.tokens import Tokens, load_tokens
from querylens_fast.relations.flow import feature_flow
from querylens_fast.transport.fit import fit_transport
from querylens_fast.transport.transport import Transport

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


@dataclass
class DemoResult:
    """What the demo did: files written, seconds by step, the table's rows."""

    files: list[Path]
    seconds: dict[str, float] = field(default_factory=dict)
    rows: list[Shown] = field(default_factory=list)
    n_features: int = 0


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


def run_demo(out: Path, k: int = 25, assets: Path = ASSETS, browsable: bool = False) -> DemoResult:
    """Fit the transport, write four signatures of every feature of every layer, and choose three features to show.

    With ``browsable`` the feature samples, their tokens and the feature flow are written too, for `serve`. Shown are,
    among the features of a dictionary that are active in at least 20 held-out sequences, those at the quartiles (25,
    50, 75 %) of their strongest activation.
    """
    result, clock = DemoResult([]), time.perf_counter()

    def lap(step: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        result.seconds[step], clock = now - clock, now

    example = load_example(assets)
    model = example.model
    lap("load")
    transport = fit_transport(model, example.fit_tokens, orders=("full",), energy="probes", n_probes=N_PROBES)
    out.mkdir(parents=True, exist_ok=True)
    result.files.append(transport.save(out / "transport.safetensors"))
    example.fit_tokens.save(out / "tokens.safetensors")
    result.files.append(out / "tokens.safetensors")
    lap("transport")
    for dictionary in example.dictionaries:
        for preset in PRESETS:
            path = out / f"{Path(dictionary.name).name}.{preset}.parquet"
            stored: StoredSignatures = signatures(
                dictionary, model, preset=preset, transport=transport, k=k, histogram=BINS, out=path, progress=False
            )
            result.files.append(stored.path)
        result.n_features += dictionary.n_features
    lap("signatures")
    for dictionary in example.dictionaries:
        kept = out / f"sample-{Path(dictionary.name).name}.parquet" if browsable else None
        sample = feature_sample(dictionary, model, example.held_out, out=kept, progress=False)
        result.rows += _shown(model, dictionary, transport, sample)
    lap("activations")
    if browsable:
        example.held_out.save(out / "held_out.safetensors")
        feature_flow(example.dictionaries, k=5, out=out / "flow.parquet", progress=False)
        lap("flow")
    return result


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
