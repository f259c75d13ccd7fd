"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask a run to save and stop; the same one again ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# SIGUSR1 is what `sbatch --signal` is told to send before the time is up; SIGHUP comes when a terminal closes.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Seconds in which the same signal is one wish: a scheduler sends it to every process of a job, and the launcher's
# passes it on as well.
_ONE_WISH = 2.0
_FIRST = 1  # the process of a container that has this number is ended by no signal that it does not handle
BY_A_PERSON = 1000  # added to a signal's number where a person asks, and no launcher; more than any signal's


class Stopped(Exception):
    """The run was asked to stop; it has saved.

    Attributes:
        code: to exit with.
        command: that resumes it.
        folder: of the run.
        for_good: a person asked for it, so no launcher is to start it again.
    """

    def __init__(self, code: int, command: str, folder: Path, *, for_good: bool = False) -> None:
        super().__init__(command)
        self.code, self.command, self.folder, self.for_good = code, command, folder, for_good


class StopRequest:
    """``signal`` is the number of the signal that arrived first, 0 before any."""

    def __init__(self) -> None:
        self.signal = 0
        self._arrived: dict[int, float] = {}  # each signal's first time

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals, where this is the main thread: Python lets no other do so (Ray, a notebook's own)."""
        previous = {number: signal.signal(number, self._asked) for number in taken()}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = now - self._arrived.setdefault(number, now) >= _ONE_WISH
        self.signal = self.signal or number
        self.take(number, again)

    def take(self, number: int, again: bool) -> None:
        """What a signal does here, beside being remembered.

        Args:
            again: it has come before, and somebody does not want to wait.
        """
        if again:
            end_by(number)


def taken() -> tuple[signal.Signals, ...]:
    """The signals that this thread may take: none outside the main thread; SIGHUP not where ``nohup`` silenced it."""
    if threading.current_thread() is not threading.main_thread():
        return ()
    return tuple(
        number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end this process, Ctrl-C as the others, whatever it waits for: there is nothing to save yet."""
    if signal.SIGINT not in taken():
        yield
        return
    if os.getpid() == _FIRST:
        previous = {number: signal.signal(number, lambda number, _frame: end_by(number)) for number in taken()}
    else:
        previous = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def end_by(number: int) -> None:
    """End this process as the signal does by itself."""
    if os.getpid() == _FIRST:
        os._exit(128 + number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
