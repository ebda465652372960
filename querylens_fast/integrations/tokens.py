"""Token strings as other tools spell them."""

from __future__ import annotations

from typing import Any

OUT_OF_RANGE = "<|outofrange|>"
"""SAEDashboard's string for ids that the model has and the tokenizer has not."""
STYLES = ("dashboard", "decoded")

_PIECES = {
    "âĢĶ": "—",
    "âĢĵ": "–",
    "âĢľ": "“",
    "âĢĿ": "”",
    "âĢĺ": "‘",
    "âĢĻ": "’",
    "âĢĭ": " ",
    "Ġ": " ",
    "Ċ": "\n",
    "ĉ": "\t",
}
"""What SAEDashboard replaces in vocabulary entries, in its order; other byte-level letters and ▁ stay."""


def token_strings(model: Any, style: str = "dashboard") -> list[str]:
    """A string for every token id of a model, as text that is valid UTF-8 without NUL.

    Args:
        model: A `Model` with a tokenizer.
        style: "dashboard", the vocabulary's entries as SAEDashboard spells them, or "decoded", each id decoded on its
            own.

    Raises:
        ValueError: Another style, or the model has no tokenizer.
    """
    if style not in STYLES:
        raise ValueError(f"token_style is {style!r}; expected {' or '.join(STYLES)}")
    if style == "decoded":
        return [clean(text) for text in model.str_tokens(range(model.vocab_size))]
    model.str_tokens([0])  # says what is missing
    strings = [OUT_OF_RANGE] * model.vocab_size
    for piece, index in model.tokenizer.get_vocab().items():
        if index < len(strings):
            strings[index] = clean(_spelled(piece))
    return strings


def clean(text: str) -> str:
    """Text that Postgres and every JSON reader takes: lone surrogates become U+FFFD, NUL a space."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", " ")


def _spelled(piece: Any) -> str:
    if isinstance(piece, bytes):
        piece = piece.decode("utf-8", "replace")
    for entry, replacement in _PIECES.items():
        piece = piece.replace(entry, replacement)
    return piece
