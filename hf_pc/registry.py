"""Named, open sets: energies, solvers and placements are looked up here, so that users can add their own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, for error messages."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=count, cutoff=0.3) or sorted(known)[:count]
    return ", ".join(repr(k) for k in found)


class Registry(Generic[T]):
    """A dictionary that explains itself when a name is unknown."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry under `name`. Raises ValueError if the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already: choose another name")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        return sorted(self._entries)

    def name_of(self, entry: T) -> str:
        """The name that an entry is registered under. Raises ValueError if it is not."""
        for name, known in self._entries.items():
            if known is entry:
                return name
        raise ValueError(f"{entry!r} is no registered {self.kind}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ValueError(f"{self.kind}={name!r} is unknown; allowed: {', '.join(map(repr, self.names()))}")
        return self._entries[name]
