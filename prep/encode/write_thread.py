"""A thread that hashes and writes samples while the next ones are encoded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_WRITE_AHEAD = 4  # encoded samples that wait for the disk; 6 MB each at 49x480x720


class WriteThread:
    """Runs tasks in order in one thread; raises the first error in the calling thread.

    Args:
        ahead: tasks that wait, at most.
    """

    def __init__(self, ahead: int = _WRITE_AHEAD) -> None:
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cogprep-writer", daemon=True)

    def __enter__(self) -> WriteThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        self._tasks.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def submit(self, task: Callable[[], None]) -> None:
        """Hand over a task; waits while the queue is full. Raises what an earlier task raised."""
        if self._error is not None:
            raise self._error
        self._tasks.put(task)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._error is None:
                try:
                    task()
                except BaseException as error:
                    self._error = error
