"""A cache of one entry: what consecutive blocks of a product share while they have the same target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Holds the value made for one owner. Another owner's request frees it before the new value is made."""

    def __init__(self) -> None:
        self._kept: tuple[object, T] | None = None

    def get(self, owner: object, make: Callable[[], T]) -> T:
        """The value of this owner (compared by identity): the held one, or ``make()``."""
        if self._kept is None or self._kept[0] is not owner:
            self._kept = None
            self._kept = owner, make()
        return self._kept[1]
