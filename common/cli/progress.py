"""What is going on now: a live line on a terminal, plain lines now and then elsewhere. It goes to stderr.

Long work stands in a `stage`, wherever it is done. What is shown is the innermost one::

    with stage("encoding", total=8, noun="clip") as bar:
        for clip in clips:
            bar.advance()

    ⠹ encoding: 3/8 clips  ━━━━━━━─────────────  elapsed 0:15  left 0:25  12 clips/min

A thread draws the line, so that it lives while the work does not return. It runs only in a program (`shown`):
a library's user, or a test, sees nothing. This module imports no other library: its first word comes before theirs.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from ..words import in_words
from .names import plain
from .stages import DRAWN_WITH, Stage, live_line

_TICK_S = 0.25
_PLAIN_AFTER_S = 2.0  # a stage that is shorter has no plain line
_PLAIN_EVERY_S = 10.0


class Display:
    """Shows the stages of a process on stderr, from `start` to `stop`. One process has one (`stage`, `shown`).

    What others write to the terminal meanwhile stands above the live line: it is erased before their text, and
    drawn again when their line has ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stages: list[Stage] = []
        self._clock = clock
        self._lock = threading.RLock()  # a signal's handler may print while its thread draws
        self._ended: threading.Event | None = None  # of the thread; None: nothing is shown
        self._live = False
        self._drawn = False  # the line is on the terminal
        self._open = False  # somebody's line is not at its end
        self._printed = clock()
        self._turn = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None, noun: str = "", done: int = 0) -> Iterator[Stage]:
        new = Stage(name, total, noun, done, clock=self._clock)
        with self._lock:
            self.stages.append(new)
            self._open = False
            self.draw()
        try:
            yield new
        except BaseException:
            self._leave(new)
            raise
        else:
            if new.announced and new.total and self._ended:
                self._print(f"{new}, in {in_words(new.elapsed)}")
            self._leave(new)

    def _leave(self, stage: Stage) -> None:
        with self._lock:
            self.stages.remove(stage)
            if len(self.stages) == 1:  # what comes after it has no name; that it has begun, we know
                self.stages[0].name, self.stages[0].begun = stage.name, stage.begun
            self.draw()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show stages inside the ``with``; nothing on ranks other than 0."""
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            yield
            return
        self.start()
        try:
            yield
        finally:
            self.stop()

    def start(self, *, thread: bool = True) -> None:
        self._ended = threading.Event()
        self._printed = self._clock()
        stderr, stdout = sys.stderr, sys.stdout
        self._live = isinstance(stderr, io.TextIOWrapper) and stderr.isatty() and os.environ.get("TERM") != "dumb"
        for stream in (stdout, stderr):
            if self._live and isinstance(stream, io.TextIOWrapper) and stream.isatty():
                self._stand_above(stream)
        if thread:
            threading.Thread(target=self._run, args=[self._ended], name="progress", daemon=True).start()

    def stop(self) -> None:
        """Erase the line, and show nothing more."""
        with self._lock:
            if self._ended is not None:
                self._ended.set()
            self._erase()
            for stream in (sys.stdout, sys.stderr):
                getattr(stream, "__dict__", {}).pop("write", None)
            self._live, self._ended = False, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to a question, or to other processes, inside the ``with``."""
        with self._lock:
            ended, self._ended = self._ended, None
            self._erase()
        try:
            yield
        finally:
            with self._lock:
                self._ended, self._open = ended, False

    def tick(self) -> None:
        """Draw the line anew, or print one if it is time for it."""
        with self._lock:
            self._turn += 1
            if self._live:
                self.draw()
                return
            if self._ended is None or not self.stages:
                return
            stage, now = self.stages[-1], self._clock()
            first = len(self.stages) > 1 and not stage.announced and stage.elapsed >= _PLAIN_AFTER_S
            if first or now - max(self._printed, stage.begun) >= _PLAIN_EVERY_S:
                line = stage.in_plain()
                stage.announced = True
                self._print(line)

    def said(self) -> None:
        """Somebody has printed a line: where there is no terminal, another one is not needed for a while."""
        self._printed = self._clock()

    def draw(self) -> None:
        """Draw the line, where there is a terminal and no line of others is open."""
        with self._lock:
            if not self._live or self._ended is None or self._open or not self.stages:
                return
            stream = sys.stderr
            ascii_only = not _can_print(stream, DRAWN_WITH)
            line = live_line(self.stages, _width(stream) - 1, self._turn, ascii_only=ascii_only)
            self._write(stream, f"\r{line}\x1b[K\r")
            self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = False
            self._write(sys.stderr, "\r\x1b[K")

    def _stand_above(self, stream: TextIO) -> None:
        """Erase the live line before a text of others."""
        write = stream.write

        def above(text: str) -> int:
            with self._lock:
                self._erase()
                if text:
                    self._open = not text.endswith(("\n", "\r"))
                return write(text)

        stream.write = above  # type: ignore[method-assign]

    def _print(self, line: str) -> None:
        self.said()
        self._write(sys.stderr, plain(line) + "\n")

    def _write(self, stream: TextIO, text: str) -> None:
        """Write what is our own, not a text to stand above the line."""
        with suppress(OSError, ValueError):  # a full disk, a terminal that has closed: the work goes on
            if isinstance(stream, io.TextIOWrapper):
                io.TextIOWrapper.write(stream, text)
            else:
                stream.write(text)
            stream.flush()

    def _run(self, ended: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        while not ended.wait(_TICK_S):
            self.tick()

    def forget(self) -> None:
        """In a process that was forked, the line is the parent's; so are the locks that its threads may have held."""
        self._lock = threading.RLock()
        self._ended, self._drawn = None, False
        self.stop()

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork(self) -> None:
        self._lock.release()


def _width(stream: TextIO) -> int:
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def _can_print(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (LookupError, UnicodeError):
        return False
    return True


_display = Display()
stage, shown, paused, said = _display.stage, _display.shown, _display.paused, _display.said
os.register_at_fork(
    before=_display.before_fork, after_in_parent=_display.after_fork, after_in_child=_display.forget
)  # fmt: skip


def say(line: str) -> None:
    """Print one line to stderr; stdout is for the result."""
    from .terminal import Console

    said()
    Console(stderr=True, soft_wrap=True).print(line)
