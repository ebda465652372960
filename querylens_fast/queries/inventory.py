"""What there is, as the overview shows it: dictionaries with their results, runs under way, files that are left out."""

from __future__ import annotations

from dataclasses import dataclass

from querylens_fast.queries.views import Side


@dataclass(frozen=True)
class PresetInfo:
    """One result of `signatures`."""

    preset: str
    """Its label within the dictionary."""
    name: str
    """The preset's own name."""
    side: Side
    """Which vector of the features was read out."""
    transition: str
    """How it was carried to the readout."""
    readout: str
    """How tokens were scored."""
    k: int
    """Tokens at each end."""
    n_features: int
    """Features that the result holds so far."""
    statistics: tuple[str, ...]
    """Numbers that it holds of each feature."""
    has_errors: bool
    """Are there standard errors of the scores?"""
    has_layer_terms: bool
    """Are there layers' own terms?"""
    file: str
    """Its path."""
    indexed: bool
    """Is its index ready? Answers are the same without, but a million features take some tenths of a second."""
    details: dict[str, str]
    """Options, model, transport, … as the file's metadata give them."""


@dataclass(frozen=True)
class DictionaryInfo:
    """A dictionary among the results."""

    slug: str
    """Its name in URLs and calls: letters, digits, ".", "_", "-"."""
    name: str
    """Name, path or hub id, as the results have it."""
    layer: int
    """Where it is attached, from 0."""
    kind: str
    """"sae", "transcoder", "directions", …"""
    n_features: int
    """The most features that one of its results holds."""
    hook_point: str | None
    """As it is named where the dictionary comes from; None in results of earlier versions."""
    model: str
    """The model's name, path or hub id."""
    presets: tuple[PresetInfo, ...]
    """Its results of `signatures`."""
    fields: tuple[str, ...]
    """Which of `FIELDS` are known, for filters."""
    score_methods: tuple[str, ...]
    """Methods that were evaluated."""
    mean_scores: dict[str, float]
    """"input_score query_lens_key" → mean over features, of the largest k."""
    sample: str | None
    """Name of the token sample its activity is known on."""
    relations: tuple[str, ...]
    """Tables of relations from its features."""
    rel_var: dict[str, float]
    """Mean rel_var by preset label."""
    stable_k: dict[str, float]
    """Mean number of top tokens that stay without any one part of the text, by preset label, where results have it."""


@dataclass(frozen=True)
class Progress:
    """A result that is being written, or whose run was stopped."""

    file: str
    """The result that it is going to be."""
    what: str
    """The preset, or the product of relations."""
    dictionary: str
    """Of whose features."""
    layer: int | None
    """The dictionary's."""
    done: int
    """Features (of relations: blocks) that are written."""
    total: int | None
    """Of how many; None where the run did not say."""
    running: bool
    """Does a process hold the result's lock?"""
    changed: float
    """When its last part was written, seconds since the epoch."""


@dataclass(frozen=True)
class Skipped:
    """A file in a given folder that is not served, and why."""

    file: str
    """Its path."""
    reason: str
    """What is wrong with it."""
