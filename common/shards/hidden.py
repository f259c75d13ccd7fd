"""Hides a module from libraries that would import it for work that nobody asks of them here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder


class _None(MetaPathFinder):
    """Finds nothing, and lets nobody else look, for one name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == self._name:
            raise ModuleNotFoundError(f"{fullname} is hidden", name=fullname)


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Who imports this module meanwhile is told that there is none, unless it has been imported already."""
    finder = _None(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
