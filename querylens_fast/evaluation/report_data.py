"""What an evaluation report holds: the data its figures and its page are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from querylens_fast.evaluation.generation import SteeredText
from querylens_fast.evaluation.scores import MeanScore
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


@dataclass(frozen=True)
class Report:
    """What a report holds.

    Attributes:
        folder: Where it lies; ``folder / "report.html"`` is the page.
        scores: One row per dictionary, method, feature and k.
        means: `MeanScore` of every score, method and k.
        rel_var: Mean relative variance by dictionary, for (side, order).
        oracle: Output score by dictionary of the fixed transitions, the adaptive preset and the best per feature.
        shown: Features at the quartiles of activation strength.
    """

    folder: Path
    scores: RelationTable
    means: list[MeanScore]
    rel_var: dict[str, dict[str, float]]
    oracle: dict[str, dict[str, float]]
    shown: list[Shown] = field(default_factory=list)
