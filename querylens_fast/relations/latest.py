"""Latest: what the blocks of a product share while they are about one target, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Keeps what was made for one owner until another asks; the old one is dropped before the new one is made."""

    def __init__(self) -> None:
        self._kept: tuple[object, T] | None = None

    def get(self, owner: object, make: Callable[[], T]) -> T:
        """What ``make`` gives for this owner (compared by identity)."""
        if self._kept is None or self._kept[0] is not owner:
            self._kept = None
            self._kept = owner, make()
        return self._kept[1]
