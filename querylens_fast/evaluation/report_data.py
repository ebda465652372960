"""What an evaluation report holds: the data its figures and its page are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from querylens_fast.evaluation.generation import SteeredText
from querylens_fast.evaluation.means import Gain, MeanScore
from querylens_fast.evaluation.stability import StabilityRow
from querylens_fast.relations.tables import RelationTable


@dataclass(frozen=True)
class Shown:
    """A feature on the page."""

    dictionary: str
    feature: int
    signatures: dict[str, list[tuple[str, float]]]
    """(token, score) of each preset."""
    contexts: list[list[tuple[str, float]]]
    """(token, activation) of the text around the strongest positions."""
    scores: dict[str, float]
    steered: SteeredText | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report holds.

    Attributes:
        folder: Where it lies; ``folder / "report.html"`` is the page.
        scores: One row per dictionary, method, feature and k.
        k: Signature size of the tables.
        n_layers: Of the model.
        means: `MeanScore` of every score, method and k.
        gains: Which features score or become coherent under Query Lens and not under Logit Lens.
        rel_var: Mean relative variance by dictionary, for (side, order).
        oracle: Output score by dictionary of the fixed transitions, the adaptive preset and the best per feature.
        stability: Agreement between the groups of the transport's sequences; empty for a transport without groups.
        shown: Features at the quartiles of activation strength, and the first that scores under Query Lens only.
    """

    folder: Path
    scores: RelationTable
    k: int
    n_layers: int
    means: list[MeanScore]
    gains: list[Gain]
    rel_var: dict[str, dict[str, float]]
    oracle: dict[str, dict[str, float]]
    stability: list[StabilityRow]
    shown: list[Shown]
