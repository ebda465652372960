"""What queries answer: frozen dataclasses of strings, numbers and tuples, the same for pages, JSON and Python.

Two words are kept apart: a `side` is "value" or "key" (which vector of the feature was read out), an `end` is "top" or
"bottom" (the highest or the lowest tokens of a signature).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Side = Literal["value", "key"]
End = Literal["top", "bottom"]
SIDES: tuple[Side, ...] = ("value", "key")
ENDS: tuple[End, ...] = ("top", "bottom")
FIELDS = ("rel_var", "stable_k", "input_score", "output_score", "density", "maximum")
"""Numbers of a feature that rows can be filtered and ordered by."""
ORDERS = ("score", "feature", *FIELDS)
MAX_LIMIT = 200
"""Rows of a page, at most."""


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary."""

    id: int
    text: str | None
    """As it is decoded; None where no result holds its string."""
    shown: str
    """For people: spaces, line ends and invisible characters as marks (`display.shown`); "#id" without a text."""
    direction: Literal["ltr", "rtl"] = "ltr"

    def __hash__(self) -> int:
        return self.id


@dataclass(frozen=True)
class ScoredToken:
    """A token in a signature."""

    token: Token
    score: float
    se: float | None = None
    """Standard error over samples of text, of top tokens, where the result has it."""
    shared: tuple[str, ...] = ()
    """Other presets of the same side whose same end holds the token too."""


@dataclass(frozen=True)
class LayerTerm:
    """One layer's part of a first-order signature."""

    layer: int
    energy: float
    """⟨m_l, m⟩/‖m‖²: the shares sum to 1."""
    top: tuple[Token, ...]
    bottom: tuple[Token, ...]


@dataclass(frozen=True)
class Histogram:
    """How many tokens score between one edge and the next."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SignatureView:
    """A feature's signature under one preset."""

    preset: str
    """The result's label within the dictionary: the preset's name, with ~2, ~3 … where there are several results."""
    side: Side
    transition: str
    readout: str
    k: int
    top: tuple[ScoredToken, ...]
    bottom: tuple[ScoredToken, ...]
    statistics: dict[str, float]
    """rel_var, rel_var_se, stable_k, N, …: what the result holds; without those that are not finite."""
    choice: str | None = None
    """What the adaptive preset took for this feature."""
    stable_k: int | None = None
    """How many of the k top tokens stay without any one group of sequences."""
    layer_terms: tuple[LayerTerm, ...] | None = None
    histogram: Histogram | None = None
    """Of the scores of all tokens, where the result has it."""


@dataclass(frozen=True)
class Context:
    """A sequence of the feature sample in which the feature is active."""

    value: float
    """The activation at its peak."""
    sequence: int
    position: int
    token: Token
    """At the peak."""
    before: tuple[Token, ...] | None = None
    """What stands around the peak; None where the sample's tokens are not among the results."""
    after: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class Activity:
    """Where a feature is active, on a feature sample."""

    density: float
    mean: float
    maximum: float
    n_active: int
    n_sequences: int
    tokens: tuple[tuple[Token, int], ...]
    """The tokens at which it is active most often, with counts."""
    contexts: tuple[Context, ...]
    sample: str
    """The token sample's name."""


@dataclass(frozen=True)
class Score:
    """How a method's signature of the feature fared in an evaluation."""

    method: str
    k: int
    n_examples: int
    input_score: float | None
    output_score: float | None
    string_coherence: float | None
    embedding_coherence: float | None


@dataclass(frozen=True)
class Link:
    """A related feature, from a table of relations among the results."""

    relation: str
    """"itself" (neighbours in the same dictionary), "previous residual", "attention", "mlp", "downstream", …"""
    dictionary: str | None
    """Slug of the dictionary the feature is in; None where that is not among the results (or no dictionary)."""
    name: str
    layer: int | None
    feature: int
    score: float


@dataclass(frozen=True)
class FeatureView:
    """All that the results hold of a feature."""

    dictionary: str
    name: str
    layer: int
    kind: str
    hook_point: str | None
    """Where the dictionary is attached, as it is named where it comes from."""
    feature: int
    signatures: tuple[SignatureView, ...]
    activity: Activity | None
    scores: tuple[Score, ...] | None
    links: tuple[Link, ...] | None
    previous: int | None
    next: int | None
    python: str
    """Code that opens the same results and gives this view."""


@dataclass(frozen=True)
class Row:
    """A feature in a list."""

    dictionary: str
    layer: int
    feature: int
    key_tokens: tuple[Token, ...]
    """The first tokens of its key signature (the preferred preset's top end); empty where there is none."""
    value_tokens: tuple[Token, ...]
    token: Token | None = None
    """The token that was found, with preset, side, end, score and rank (0 the most extreme); None without a token."""
    preset: str | None = None
    side: Side | None = None
    end: End | None = None
    score: float | None = None
    rank: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    """The `FIELDS` that are known of the feature."""


@dataclass(frozen=True)
class Page:
    """Some rows of a list."""

    rows: tuple[Row, ...]
    next: str | None
    """Pass as after= for the rows that follow; None at the end."""
    tokens: tuple[Token, ...] = ()
    """The tokens that were searched for; empty where the text is no token (and no text was given)."""
    suggestions: tuple[Token, ...] = ()
    """Tokens that contain the text, where it is none itself."""


@dataclass(frozen=True)
class TokenGroup:
    """A token's first features in one dictionary, on one side."""

    dictionary: str
    layer: int
    preset: str
    side: Side
    end: End
    count: int
    """Features of the dictionary whose signatures hold the token."""
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class TokenView:
    """A token's features in every dictionary."""

    token: Token
    groups: tuple[TokenGroup, ...]


@dataclass(frozen=True)
class Pair:
    """Two matched features, or one feature under two presets."""

    feature: int
    other: int
    cosine: float | None
    """From a stored table of neighbours or feature flow; None where they were matched otherwise."""
    overlap: float
    """Tokens that both top ends hold ÷ tokens that either holds."""
    tokens: tuple[Token, ...]
    other_tokens: tuple[Token, ...]
    shared: tuple[int, ...]
    """Ids of the tokens that both hold."""


@dataclass(frozen=True)
class Comparison:
    """A page of pairs."""

    dictionary: str
    preset: str
    other: str
    other_preset: str
    matched_by: Literal["feature", "cosine", "tokens"]
    """"feature": the same id under two presets. "cosine": a stored table. "tokens": most shared top tokens."""
    rows: tuple[Pair, ...]
    next: str | None


@dataclass(frozen=True)
class PresetInfo:
    """One result of `signatures`."""

    preset: str
    """Its label within the dictionary."""
    name: str
    """The preset's own name."""
    side: Side
    transition: str
    readout: str
    k: int
    n_features: int
    statistics: tuple[str, ...]
    has_errors: bool
    has_layer_terms: bool
    file: str
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
    layer: int
    kind: str
    n_features: int
    """The most features that one of its results holds."""
    hook_point: str | None
    model: str
    presets: tuple[PresetInfo, ...]
    fields: tuple[str, ...]
    """Which of `FIELDS` are known, for filters."""
    score_methods: tuple[str, ...]
    mean_scores: dict[str, float]
    """"input_score query_lens_key" → mean over features, of the largest k."""
    sample: str | None
    """Name of the token sample its activity is known on."""
    relations: tuple[str, ...]
    rel_var: dict[str, float]
    """Mean rel_var by preset label."""


@dataclass(frozen=True)
class Progress:
    """A result that is being written, or whose run was stopped."""

    file: str
    what: str
    """The preset, or the product of relations."""
    dictionary: str
    layer: int | None
    done: int
    total: int | None
    running: bool
    """Does a process hold the result's lock?"""
    changed: float
    """When its last part was written, seconds since the epoch."""


@dataclass(frozen=True)
class Skipped:
    """A file in a given folder that is not served, and why."""

    file: str
    reason: str
