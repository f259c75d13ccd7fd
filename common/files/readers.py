"""Threads that read, and that no process waits for when it ends.

Python's own pool is joined at the interpreter's end, whatever its threads wait for: one in a socket that a server has
left open holds a run that is done, or has failed, for as long as a read is patient.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")
_A = TypeVar("_A")

THREADS = 16  # small files and their sizes: over a network the wait is what counts, and it can be waited for together
_LEAVE = 1.0  # seconds for threads that compute to end; one that is still there waits for a store


class Readers:
    """A few threads that take calls in the order in which they were submitted."""

    def __init__(self, number: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"{name}-{index}") for index in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[..., _T], *arguments: Any) -> Future[_T]:
        future: Future[_T] = Future()
        self._calls.put((future, lambda: call(*arguments)))
        return future

    def close(self) -> None:
        """Begin nothing more, and wait for what is begun, but not for long."""
        with contextlib.suppress(queue.Empty):
            while waiting := self._calls.get_nowait():
                waiting[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        until = time.monotonic() + _LEAVE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (taken := self._calls.get()) is not None:
            future, call = taken
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # raised where the result is asked for
                    future.set_exception(error)
            del taken, future, call  # they hold a batch, and the next call may be long in coming


def read_in_order(call: Callable[[_A], _T], items: Iterable[_A], *, threads: int = THREADS) -> Iterator[_T]:
    """``call(item)`` for every item, several at a time in threads, in the order of the items.

    Worth it where a call waits, for a disk or a network, or computes without Python (a hash, Parquet).

    Args:
        items: read in the caller's thread as the work moves on; at most two a thread are ahead of what is taken, so
            memory does not grow with their number.

    Raises:
        What a call raised, at its item's place.
    """
    under_way: deque[Future[_T]] = deque()
    source = iter(items)
    with contextlib.closing(Readers(threads, "reader")) as readers:
        while True:
            while len(under_way) < 2 * threads:
                try:
                    under_way.append(readers.submit(call, next(source)))
                except StopIteration:
                    break
            if not under_way:
                return
            yield under_way.popleft().result()
