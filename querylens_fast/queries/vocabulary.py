"""The token strings that results hold: by id, by text, and by a part of the text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping

from querylens_fast.queries.display import direction, printable, shown
from querylens_fast.queries.views import Token


class Vocabulary:
    """The tokens of one model."""

    def __init__(self, strings: Mapping[int, str]) -> None:
        """Take token strings by id."""
        self._strings = {i: printable(text) for i, text in strings.items()}
        self._ids: dict[str, tuple[int, ...]] = {}
        for i, text in self._strings.items():
            self._ids[text] = (*self._ids.get(text, ()), i)
        self._tokens = _Made(self._token)
        # One long text, so that looking for a part is one pass of the regular expression engine.
        self._order = sorted(self._strings, key=lambda i: (len(self._strings[i]), i))
        folded = [self._strings[i].casefold().replace("\0", " ") for i in self._order]
        self._starts = [0]
        for text in folded:
            self._starts.append(self._starts[-1] + len(text) + 1)
        self._all = "\0".join(folded)

    def __len__(self) -> int:
        return len(self._strings)

    def token(self, index: int) -> Token:
        """A token, the same object each time."""
        return self._tokens[index]

    def tokens(self, ids: Iterable[int]) -> tuple[Token, ...]:
        """Several tokens."""
        return tuple(map(self._tokens.__getitem__, ids))

    def ids(self, text: str, exact: bool = False) -> list[int]:
        """The tokens that read as the text; without ``exact`` also those with a space before it."""
        spellings = [text] if exact or text.startswith(" ") else [text, f" {text}"]
        return sorted(i for spelling in spellings for i in self._ids.get(spelling, ()))

    def like(self, text: str, limit: int = 10) -> list[Token]:
        """Tokens that contain the text, in any case, the shortest first."""
        wanted, found = text.strip().casefold().replace("\0", " "), []
        if not wanted:
            return []
        last = -1
        for match in re.finditer(re.escape(wanted), self._all):
            place = bisect_right(self._starts, match.start()) - 1
            if place != last:
                found.append(self.token(self._order[place]))
                last = place
            if len(found) >= limit:
                break
        return found

    def _token(self, index: int) -> Token:
        text = self._strings.get(index)
        return Token(index, None, f"#{index}") if text is None else Token(index, text, shown(text), direction(text))


class _Made(dict[int, Token]):
    """Tokens by id, each made when it is first looked up."""

    def __init__(self, make: Callable[[int], Token]) -> None:
        self.make = make

    def __missing__(self, index: int) -> Token:
        return self.setdefault(index, self.make(index))
