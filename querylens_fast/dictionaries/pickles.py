"""Pickles: plain data read from a pickle that may be hostile.

A pickle is a program. `PlainUnpickler` imports nothing, calls only what its caller admits, and takes no longer than the
file is long: a few bytes can otherwise build nested tuples whose hash takes for ever, or allocate gigabytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

MAX_EXPANDED = 1 << 24
"""Values that data written out in full may hold, where the file itself holds fewer."""


class RefusedPickleError(ValueError):
    """A pickle asks for something that plain data does not need."""


class PlainUnpickler(pickle._Unpickler):
    """Rebuilds containers, text and numbers, and what ``admitted`` maps (module, name) to; nothing else is called.

    Raises RefusedPickleError for other names, for containers as dictionary keys or set members (a flat tuple is taken),
    and for preallocated byte arrays; whatever the base class raises for a damaged file.
    """

    dispatch: dict[int, Any] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    stack: list[Any]

    def __init__(self, file: IO[bytes], admitted: Callable[[str, str], Any]) -> None:
        super().__init__(file)
        self.admitted = admitted

    def find_class(self, module: str, name: str) -> Any:
        """What the caller admits under that name."""
        return self.admitted(module, name)

    def load_setitem(self) -> None:
        """SETITEM with a plain key."""
        check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        """SETITEMS with plain keys."""
        check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        """DICT with plain keys."""
        check_keys(self.stack[::2])
        super().load_dict()  # type: ignore[misc]

    def load_members(self) -> None:
        """ADDITEMS and FROZENSET with plain members."""
        raise RefusedPickleError("holds a set, which plain data does not need")

    def load_extension(self) -> None:
        """The opcodes that allocate before they read or look up a registry of this process."""
        raise RefusedPickleError("uses preallocated byte arrays, buffers or registered extensions")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = dispatch[pickle.FROZENSET[0]] = load_members
    for _code in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.INST):
        dispatch[_code[0]] = load_extension
    del _code


def check_keys(keys: Iterable[Any]) -> None:
    """Raise RefusedPickleError for a dictionary key that is a container; a tuple of plain values is taken."""
    for key in keys:
        members = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        for member in members:
            if isinstance(member, (tuple, list, dict, set, frozenset)):
                raise RefusedPickleError("has a nested container as a dictionary key")


def check_expanded(found: Any, limit: int) -> None:
    """Raise RefusedPickleError when data that shares its parts is more than ``limit`` values once it is written out.

    Also for data that holds itself. Cost: one visit to each part.
    """
    sizes: dict[int, int] = {}
    waiting: list[tuple[Any, bool]] = [(found, False)]
    open_parts: set[int] = set()
    while waiting:
        part, done = waiting.pop()
        inside = _inside(part)
        if done:
            sizes[id(part)] = 1 + sum(sizes.get(id(child), 1) for child in inside)
            open_parts.discard(id(part))
            if sizes[id(part)] > max(limit, MAX_EXPANDED):
                raise RefusedPickleError(f"stands for more than {max(limit, MAX_EXPANDED)} values")
        elif inside and id(part) not in sizes:
            if id(part) in open_parts:
                raise RefusedPickleError("holds a container that contains itself")
            open_parts.add(id(part))
            waiting.append((part, True))
            waiting += [(child, False) for child in inside]


def _inside(part: Any) -> list[Any]:
    """The containers directly inside a value."""
    if isinstance(part, Mapping):
        return [*part.keys(), *part.values()]
    if isinstance(part, (list, tuple)):
        return list(part)
    state = getattr(part, "state", None)
    return [state] if isinstance(state, dict) else []
