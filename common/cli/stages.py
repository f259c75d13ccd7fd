"""A stage of long work, and the line that says how far it is: what goes first where the terminal is narrow."""

from __future__ import annotations

import time
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from ..words import counted, in_bytes, in_words
from .names import plain

_CHUNKS = 20  # the last ones, of which the median decides what is left
_CHUNK_S = 0.05  # units that are done within it count as one chunk: batches finish together
_BAR = 20
_SPINNER, _FULL, _EMPTY = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "━", "─"
DRAWN_WITH = _SPINNER + _FULL + _EMPTY + "…"  # beside names; a terminal without these gets ASCII
_ASCII_SPINNER, _ASCII_FULL, _ASCII_EMPTY = "-\\|/", "=", "-"

_checks: list[Callable[[], None]] = []


def before_each(check: Callable[[], None]) -> None:
    """Call ``check`` whenever a unit of any stage is done; what it raises ends the work."""
    if check not in _checks:
        _checks.append(check)


class Stage:
    """A piece of work, of units that can be counted where ``total`` is given.

    Args:
        name: what is being done, as "loading T5".
        total: units in all.
        noun: what a unit is, as "clip" or "byte".
        done: units that were done before.
    """

    def __init__(
        self, name: str, total: int | None = None, noun: str = "", done: int = 0, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.name, self.total, self.noun, self.done = name, total, noun, done
        self.notes: Sequence[str] = ()
        self.announced = False
        self.measured: float | None = None  # seconds a unit, where who does the work measures them itself
        self._clock = clock
        self.begun = self._marked = clock()
        self._unmarked = 0
        self._chunks: deque[float] = deque(maxlen=_CHUNKS)  # seconds a unit

    def advance(self, *notes: str, by: int = 1) -> None:
        """A unit is done, or several.

        Args:
            notes: what else to show beside the count, the most important first; none: those of before stay.
        """
        for check in _checks:
            check()
        self.done += by
        self._unmarked += by
        self.notes = tuple(filter(None, notes)) or self.notes
        now = self._clock()
        if now - self._marked >= _CHUNK_S and self._unmarked:
            self._chunks.append((now - self._marked) / self._unmarked)
            self._marked, self._unmarked = now, 0

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self._clock() - self.begun

    @property
    def a_unit(self) -> float | None:
        """Seconds that a unit takes: what was measured, else the median of the last ones; None: not known."""
        return self.measured if self.measured is not None or not self._chunks else median(self._chunks)

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes; None: not known."""
        a_unit = self.a_unit
        if self.total is None or a_unit is None:
            return None
        since = min(self._clock() - self._marked, a_unit)
        return max(0.0, a_unit * (self.total - self.done) - since)

    @property
    def rate(self) -> str:
        """``12 clips/min``; nothing of what has no noun."""
        a_unit = self.a_unit
        if a_unit is None or not self.noun:
            return ""
        per_s = 1 / max(a_unit, 1e-9)
        if self.noun == "byte":
            return f"{in_bytes(per_s)}/s"
        return f"{60 * per_s:,.{0 if per_s > 2 else 1}f} {self.noun}s/min"

    def __str__(self) -> str:
        """``encoding: 3/8 clips``"""
        if self.total is None:
            return self.name
        if self.noun == "byte":
            return f"{self.name}: {in_bytes(self.done)}/{in_bytes(self.total)}"
        total = counted(self.total, self.noun) if self.noun else f"{self.total:,}"
        return f"{self.name}: {self.done:,}/{total}"

    def in_plain(self) -> str:
        """A line of a log."""
        if not self.announced:
            return f"{self}" if self.total else f"{self} ..."
        left = self.left
        said = [str(self), f"elapsed {in_words(self.elapsed)}"]
        said += ["" if left is None else f"left {in_words(left)}", self.rate, *self.notes[:4]]
        return ", ".join(filter(None, said))


def live_line(stages: Sequence[Stage], width: int, turn: int = 0, *, ascii_only: bool = False) -> str:
    """The line of the innermost stage, at most ``width`` columns: the least important goes first."""
    spinner, full, empty = (
        (_ASCII_SPINNER, _ASCII_FULL, _ASCII_EMPTY) if ascii_only else (_SPINNER, _FULL, _EMPTY)
    )  # fmt: skip
    stage, width = stages[-1], width - 2
    turning = spinner[turn % len(spinner)] + " "
    outer = [str(one) for one in stages[:-1] if one.total is not None][-1:]
    parts = [*((8, f"{one} >") for one in outer), (0, str(stage))]
    if stage.total:
        filled = _BAR * min(stage.done, stage.total) // stage.total
        parts.append((9, full * filled + empty * (_BAR - filled)))
    parts.append((2, f"elapsed {clock_time(stage.elapsed)}"))
    if (left := stage.left) is not None:
        parts.append((1, f"left {clock_time(left)}"))
    parts += [(3 + place, note) for place, note in enumerate(filter(None, [*stage.notes[:4], stage.rate]))]
    parts = [(rank, " ".join(plain(text).split())) for rank, text in parts]
    while len(parts) > 1 and text_width("  ".join(text for _, text in parts)) > width:
        parts.remove(max(parts))
    line = "  ".join(text for _, text in parts)
    if text_width(line) <= width:
        return turning + line
    while line and text_width(line) > width - (1 if ascii_only else text_width("…")):
        line = line[:-1]
    return turning + line + ("." if ascii_only else "…")


def text_width(text: str) -> int:
    """What a text takes of a terminal's line."""
    return sum(
        0 if unicodedata.combining(mark) else 2 if unicodedata.east_asian_width(mark) in "WF" else 1 for mark in text
    )


def clock_time(seconds: float) -> str:
    """``0:34``, ``1:02:03``"""
    whole = int(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole % 3600 // 60:0{2 if hours else 1}d}:{whole % 60:02d}"
