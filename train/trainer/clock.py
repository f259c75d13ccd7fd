"""How long each part of a step took, without making the host wait for the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..blocks.compiler import seconds_so_far

if TYPE_CHECKING:
    import torch

Phase = Literal["data", "forward", "backward", "optimizer"]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step; compiling is not in the other parts."""

    data: float  # waiting for a batch
    forward: float
    backward: float
    optimizer: float
    compile: float
    kept: int  # bytes of GPU memory held when the last forward pass ended; 0 on a CPU

    @property
    def step(self) -> float:
        return self.data + self.forward + self.backward + self.optimizer


class StepClock:
    """Made when a step starts; `end` ends each part of it. On a GPU the times are CUDA events'."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._now: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self._kept = 0
        self._marks: list[tuple[Phase | None, Any, float]] = []
        self._mark(None)

    def end(self, part: Phase) -> None:
        """The time since the last call, or the start, belongs to this part."""
        self._mark(part)
        if part == "forward" and self._device.type == "cuda":
            import torch

            self._kept = torch.cuda.memory_allocated(self._device)  # the allocator's own count: no GPU is asked

    def _mark(self, part: Phase | None) -> None:
        self._marks.append((part, self._now(), seconds_so_far()))

    def read(self) -> StepTimes:
        """The seconds of each part. On a GPU call it only once the last event has passed."""
        parts: dict[str, float] = {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        compiling = 0.0
        for (_, began, before), (part, ended, after) in zip(self._marks, self._marks[1:], strict=False):
            assert part is not None
            seconds = ended - began if isinstance(ended, float) else began.elapsed_time(ended) / 1000
            parts[part] += max(0.0, seconds - (after - before))
            compiling += after - before
        return StepTimes(**parts, compile=compiling, kept=self._kept)


def _event() -> Any:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
