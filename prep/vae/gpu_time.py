"""How long the GPU worked on clips and how long it stood idle between them, by its own clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Span:
    """One clip's work on the GPU, between two events."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    follows: bool  # no other work was queued between the previous clip and this one


@dataclass
class GpuTime:
    """Seconds that the GPU worked on clips, and that it was idle between them."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    _last: Span | None = field(default=None, repr=False)

    def add(self, span: Span | None) -> None:
        """Count a clip that has ended; None, from a CPU, counts nothing."""
        if span is None:
            return
        self.busy_s += span.begin.elapsed_time(span.end) / 1000
        if self._last is not None and span.follows:
            self.idle_s += self._last.end.elapsed_time(span.begin) / 1000
        self._last = span

    def pause(self) -> None:
        """Do not count the time until the next clip: there is other work between."""
        self._last = None

    @property
    def share(self) -> float | None:
        """Busy / (busy + idle); None without a GPU."""
        total = self.busy_s + self.idle_s
        return self.busy_s / total if total else None


def record(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all work queued so far; None on a CPU, where all of it is done."""
    import torch

    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
