"""Copies between host and GPU that neither waits for, and the GPU's own account of its time.

Frames lie in pinned memory and travel on a stream of their own while the clip before
is encoded; results travel back into pinned memory. On a CPU all of this is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Span:
    """The work of one clip on the GPU, between two of its events."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    follows: bool  # right after the clip before, as far as the GPU could know


@dataclass
class GpuTime:
    """Seconds that the GPU worked on clips, and that it waited between them, by its own clock."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    _last: Span | None = field(default=None, repr=False)

    def add(self, span: Span | None) -> None:
        """Count a clip whose end has been waited for."""
        if span is None:
            return
        self.busy_s += span.begin.elapsed_time(span.end) / 1000
        if self._last is not None and span.follows:
            self.idle_s += self._last.end.elapsed_time(span.begin) / 1000
        self._last = span

    def pause(self) -> None:
        """What follows is other work, or the first clip after it."""
        self._last = None

    @property
    def share(self) -> float | None:
        """Busy over busy and idle; None without a GPU."""
        total = self.busy_s + self.idle_s
        return self.busy_s / total if total else None


class Transfer:
    """The way to a device and back."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A tensor on the device; the work queued there so far goes on meanwhile."""
        import torch

        if self._side is None:
            return host.to(self._device)
        # The host allocator gives a pinned block away again only after the copy from it has ended.
        pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        with torch.cuda.stream(self._side):
            there = pinned.to(self._device, non_blocking=True)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._side)
        there.record_stream(compute)
        return there

    def to_host(self, there: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU, whole once an event recorded after this call has passed."""
        import torch

        if self._side is None:
            return there.cpu()
        return torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)

    def event(self) -> torch.cuda.Event | None:
        """A point in the device's work; None on a CPU, where all work so far is done."""
        import torch

        if self._side is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
