"""Token strings for people's eyes: every character visible, and none that changes what stands beside it."""

from __future__ import annotations

import unicodedata
from typing import Literal

MARKS = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
"""Marks for white space; what pages explain in their legend."""
EMPTY = "∅"
_JOINERS = "\u200c\u200d"


def shown(text: str) -> str:
    """A token with its spaces and line ends as `MARKS` and other invisible characters as ⟨U+XXXX⟩.

    Control and format characters (those that switch the direction of text too), lone surrogates, private-use and
    unassigned characters get their code; zero-width joiners keep their meaning between two characters. A combining
    mark that comes first is put on a dotted circle. The empty string is ∅. Bytes that are no whole character were
    decoded to U+FFFD (�) when the result was written, and stay that.
    """
    if not text:
        return EMPTY
    parts = []
    for i, character in enumerate(text):
        category = unicodedata.category(character)
        if character in MARKS:
            parts.append(MARKS[character])
        elif character in _JOINERS and 0 < i < len(text) - 1:
            parts.append(character)
        elif category[0] == "C" or category in ("Zs", "Zl", "Zp"):
            parts.append(f"⟨U+{ord(character):04X}⟩")
        elif i == 0 and category[0] == "M":
            parts.append(f"◌{character}")
        else:
            parts.append(character)
    return "".join(parts)


def direction(text: str) -> Literal["ltr", "rtl"]:
    """The direction of a token's first letter."""
    for character in text:
        found = unicodedata.bidirectional(character)
        if found in ("R", "AL"):
            return "rtl"
        if found == "L":
            return "ltr"
    return "ltr"


def printable(text: str) -> str:
    """Text that is valid UTF-8: lone surrogates become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
