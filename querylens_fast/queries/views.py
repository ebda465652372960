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
BOUNDS = ("score", *FIELDS)
"""What rows can be filtered by; the score of the token where one is searched for."""
ORDERS = ("score", "feature", *FIELDS)
MAX_LIMIT = 200
"""Rows of a page, at most."""


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary."""

    id: int
    """In the model's vocabulary."""
    text: str | None
    """As it is decoded; None where no result holds its string."""
    shown: str
    """For people: spaces, line ends and invisible characters as marks (`display.shown`); "#id" without a text."""
    direction: Literal["ltr", "rtl"] = "ltr"
    """Of its first letter."""

    def __hash__(self) -> int:
        return self.id


@dataclass(frozen=True)
class ScoredToken:
    """A token in a signature."""

    token: Token
    """The token."""
    score: float
    """A logit, or for keys the readout's product; not a probability."""
    se: float | None = None
    """Standard error over samples of text, of top tokens, where the result has it."""
    shared: tuple[str, ...] = ()
    """Other presets of the same side whose same end holds the token too."""


@dataclass(frozen=True)
class LayerTerm:
    """One layer's part of a first-order signature."""

    layer: int
    """Whose term it is, from 0."""
    energy: float
    """⟨m_l, m⟩/‖m‖²: the shares sum to 1."""
    top: tuple[Token, ...]
    """The term's highest tokens by themselves."""
    bottom: tuple[Token, ...]
    """And its lowest."""


@dataclass(frozen=True)
class Histogram:
    """How many tokens score between one edge and the next."""

    edges: tuple[float, ...]
    """Of the bins, one more than there are counts; from the lowest score to the highest."""
    counts: tuple[int, ...]
    """Tokens in each bin."""


@dataclass(frozen=True)
class SignatureView:
    """A feature's signature under one preset."""

    preset: str
    """The result's label within the dictionary: the preset's name, with ~2, ~3 … where there are several results."""
    side: Side
    """Which vector of the feature was read out."""
    transition: str
    """How it was carried to the readout: "identity" (Logit Lens), "full" (Query Lens), "first_order", …"""
    readout: str
    """"unembed", "embed" or "embed_cosine_centered"."""
    k: int
    """Tokens at each end."""
    top: tuple[ScoredToken, ...]
    """The highest tokens, the highest first."""
    bottom: tuple[ScoredToken, ...]
    """The lowest tokens, the lowest first."""
    statistics: dict[str, float]
    """rel_var, rel_var_se, stable_k, N, …: what the result holds; without those that are not finite."""
    choice: str | None = None
    """What the adaptive preset took for this feature."""
    stable_k: int | None = None
    """How many of the k top tokens stay without any one group of sequences."""
    layer_terms: tuple[LayerTerm, ...] | None = None
    """What each layer contributes, of first-order results that were written with layers."""
    histogram: Histogram | None = None
    """Of the scores of all tokens, where the result has it."""


@dataclass(frozen=True)
class Context:
    """A sequence of the feature sample in which the feature is active."""

    value: float
    """The activation at its peak."""
    sequence: int
    """Its number in the sample."""
    position: int
    """Of the peak in the sequence."""
    token: Token
    """At the peak."""
    before: tuple[Token, ...] | None = None
    """What stands around the peak; None where the sample's tokens are not among the results."""
    after: tuple[Token, ...] | None = None
    """What follows the peak."""


@dataclass(frozen=True)
class Activity:
    """Where a feature is active, on a feature sample."""

    density: float
    """Share of the sample's tokens at which it is active."""
    mean: float
    """Mean activation where it is active."""
    maximum: float
    """Its largest activation."""
    n_active: int
    """Tokens at which it is active."""
    n_sequences: int
    """Sequences in which it is active."""
    tokens: tuple[tuple[Token, int], ...]
    """The tokens at which it is active most often, with counts."""
    contexts: tuple[Context, ...]
    """Where it is most active, the strongest first."""
    sample: str
    """The token sample's name."""


@dataclass(frozen=True)
class Score:
    """How a method's signature of the feature fared in an evaluation."""

    method: str
    """The preset or baseline that was evaluated."""
    k: int
    """Tokens of the signature that were counted."""
    n_examples: int
    """Activating sequences that the scores are over."""
    input_score: float | None
    """Share of the tokens that activate the feature most which are in the signature."""
    output_score: float | None
    """How far the signature names what the feature promotes when it is steered."""
    string_coherence: float | None
    """How alike the signature's tokens are as strings."""
    embedding_coherence: float | None
    """And as embeddings."""


@dataclass(frozen=True)
class Link:
    """A related feature, from a table of relations among the results."""

    relation: str
    """"itself" (neighbours in the same dictionary), "previous residual", "attention", "mlp", "downstream", …"""
    dictionary: str | None
    """Slug of the dictionary the feature is in; None where that is not among the results (or no dictionary)."""
    name: str
    """The target as the table names it: a dictionary, or a matrix of the model."""
    layer: int | None
    """Of the target; None where it has none."""
    feature: int
    """The feature's number there, or the row of the matrix."""
    score: float
    """The product or cosine that the table holds."""


@dataclass(frozen=True)
class FeatureView:
    """All that the results hold of a feature."""

    dictionary: str
    """Its slug."""
    name: str
    """The dictionary's name, path or hub id."""
    layer: int
    """Where the dictionary is attached, from 0."""
    kind: str
    """"sae", "transcoder", "directions", …"""
    hook_point: str | None
    """Where the dictionary is attached, as it is named where it comes from."""
    feature: int
    """The feature's number."""
    signatures: tuple[SignatureView, ...]
    """One for each preset among the results."""
    activity: Activity | None
    """On a feature sample; None where there is none."""
    scores: tuple[Score, ...] | None
    """Of an evaluation; None where there is none."""
    links: tuple[Link, ...] | None
    """To related features; None where no table of the dictionary is among the results."""
    previous: int | None
    """The feature before it in the results; None at the first."""
    next: int | None
    """The feature after it; None at the last."""
    python: str
    """Code that opens the same results and gives this view."""


@dataclass(frozen=True)
class Row:
    """A feature in a list."""

    dictionary: str
    """Its slug."""
    layer: int
    """The dictionary's."""
    feature: int
    """The feature's number."""
    key_tokens: tuple[Token, ...]
    """The first tokens of its key signature (the preferred preset's top end); empty where there is none."""
    value_tokens: tuple[Token, ...]
    """And those of its value signature."""
    token: Token | None = None
    """The token that was found, with preset, side, end, score and rank (0 the most extreme); None without a token."""
    preset: str | None = None
    """Label of the result in which the token was found."""
    side: Side | None = None
    """Of that result."""
    end: End | None = None
    """At which end of the signature."""
    score: float | None = None
    """The token's."""
    rank: int | None = None
    """Its place in the signature, 0 the most extreme."""
    values: dict[str, float] = field(default_factory=dict)
    """The `FIELDS` that are known of the feature."""


@dataclass(frozen=True)
class Page:
    """Some rows of a list."""

    rows: tuple[Row, ...]
    """In the order that was asked for."""
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
    """Its slug."""
    layer: int
    """The dictionary's."""
    preset: str
    """Label of the result that was looked into."""
    side: Side
    """"key": features that read the token; "value": that write it."""
    end: End
    """Whether the token is among the highest or the lowest."""
    count: int
    """Features of the dictionary whose signatures hold the token."""
    rows: tuple[Row, ...]
    """The most extreme ones."""


@dataclass(frozen=True)
class TokenView:
    """A token's features in every dictionary."""

    token: Token
    """The token."""
    groups: tuple[TokenGroup, ...]
    """By dictionary, side and end; without those that hold no feature."""


@dataclass(frozen=True)
class Pair:
    """Two matched features, or one feature under two presets."""

    feature: int
    """In the first dictionary."""
    other: int
    """In the second, or the same feature."""
    cosine: float | None
    """From a stored table of neighbours or feature flow; None where they were matched otherwise."""
    overlap: float
    """Tokens that both top ends hold ÷ tokens that either holds."""
    tokens: tuple[Token, ...]
    """The first tokens of its signature."""
    other_tokens: tuple[Token, ...]
    """The first tokens of the other's."""
    shared: tuple[int, ...]
    """Ids of the tokens that both hold."""


@dataclass(frozen=True)
class Comparison:
    """A page of pairs."""

    dictionary: str
    """Slug of the first."""
    preset: str
    """Label of its result."""
    other: str
    """Slug of the second, which may be the same."""
    other_preset: str
    """Label of its result."""
    matched_by: Literal["feature", "cosine", "tokens"]
    """"feature": the same id under two presets. "cosine": a stored table. "tokens": most shared top tokens."""
    rows: tuple[Pair, ...]
    """By feature of the first."""
    next: str | None
    """Pass as after= for the pairs that follow; None at the end."""
