"""Progress of long work: a bar on a terminal, plain lines elsewhere. It goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from cogcommon.cli.terminal import Console
from cogcommon.words import counted, in_words

from ..processes import interrupt

_LINE_EVERY_S = 10.0


class Progress:
    """One stage of the work. Use as a context manager; call `advance` for every piece done.

    Args:
        what: the stage, as "Encoding".
        total: pieces in all.
        noun: what a piece is.
    """

    def __init__(self, what: str, total: int, noun: str = "clip") -> None:
        self._what, self._total, self._noun = what, total, noun
        self._done = 0
        self._note = ""
        self._started = self._printed = time.monotonic()
        self._console = Console(stderr=True, soft_wrap=True)
        self._bars: Bars | None = None
        if self._console.is_terminal:
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bars.add_task(what, total=total, rate="")

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif kind is None and self._total:
            self._print(
                f"{self._what}: {counted(self._done, self._noun)} in {in_words(time.monotonic() - self._started)}"
            )

    def advance(self, note: str = "", *, by: int = 1) -> None:
        """One more piece is done, or several; ``note`` says what the work is waiting for, if anything."""
        interrupt.check()
        self._done += by
        self._note = note or self._note
        now = time.monotonic()
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, rate=self._rate(now))
        elif now - self._printed >= _LINE_EVERY_S and self._done < self._total:
            self._printed = now
            self._print(f"{self._what}: {self._done}/{self._total} {self._noun}s, {self._rate(now)}")

    def _rate(self, now: float) -> str:
        per_s = self._done / max(now - self._started, 1e-9)
        left = in_words((self._total - self._done) / per_s)
        return ", ".join(
            filter(None, [f"{60 * per_s:,.{0 if per_s > 2 else 1}f} {self._noun}s/min", f"ETA {left}", self._note])
        )

    def _print(self, line: str) -> None:
        self._console.print(line)


@dataclass
class Clock:
    """Wall time by stage."""

    stages: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        return {**self.stages, "total": time.perf_counter() - self.started}


def say(line: str) -> None:
    """Print one line to stderr; stdout is for the result."""
    Console(stderr=True, soft_wrap=True).print(line)
