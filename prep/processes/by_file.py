"""Clips through the pool, those that are parts of one file together: it is opened, and read, once for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

from ..source.clip import ClipFault
from ..source.part import file_named
from ..source.remote import ahead
from .pool import Pool

R = TypeVar("R")

TOGETHER = 64  # parts in one task; a film of more keeps several processes busy


def run_by_file(
    pool: Pool, function: Callable[[Sequence[Path]], list[R | ClipFault]], root: Path, entries: Iterable[str]
) -> Iterator[tuple[str, R | ClipFault]]:
    """What a function finds out about clips.

    Where it comes to no end with several parts, it is tried with each of them alone, since one may be to blame.

    Args:
        function: of clips, giving a result for each; importable in a child.
        root: the data root.
        entries: the clips, distinct, as the lists name them, those of one file one after the other; read as the
            pool comes to them.

    Yields:
        A clip and its result, in any order.
    """
    alone: list[str] = []
    for task, found in _run(pool, function, root, _tasks(entries)):
        if not isinstance(found, ClipFault):
            yield from zip(task, found, strict=True)
        elif len(task) == 1:
            yield task[0], found
        else:
            alone += task
    for (entry,), found in _run(pool, function, root, ([entry] for entry in alone)):
        yield entry, found if isinstance(found, ClipFault) else found[0]


def _tasks(entries: Iterable[str]) -> Iterator[list[str]]:
    for _file, parts in groupby(entries, file_named):
        while task := list(islice(parts, TOGETHER)):
            yield task


def _run(
    pool: Pool, function: Callable[[Sequence[Path]], list[R | ClipFault]], root: Path, tasks: Iterable[list[str]]
) -> Iterator[tuple[list[str], list[R | ClipFault] | ClipFault]]:
    given: deque[list[str]] = deque()

    def arguments() -> Iterator[tuple[list[Path]]]:
        for task in ahead(tasks, lambda task: [root / file_named(task[0])]):
            given.append(task)
            yield ([root / entry for entry in task],)

    for found in pool.run(function, arguments()):
        yield given.popleft(), found
