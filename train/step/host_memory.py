"""Host memory that a GPU copies to and from while it computes, and the streams that do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def page_locked(size: int, device: torch.device) -> torch.Tensor:
    """``size`` bytes of host memory, page-locked where the device is a GPU.

    torch's own ``pin_memory`` rounds up to a power of two: 16 GiB for the 10.4
    of 5B's weights. So ordinary memory is registered with the driver; where
    that is refused (a low ``ulimit -l``), torch's way is taken. It stays
    registered for the life of the process, as its owners here do.
    """
    import torch

    plain = torch.empty(size, dtype=torch.uint8)
    if device.type != "cuda" or size == 0:
        return plain
    if int(torch.cuda.cudart().cudaHostRegister(plain.data_ptr(), size, 0)) != 0:
        plain = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    _locked.append(plain)
    return plain


def locked_bytes() -> int:
    """Host memory that this process has locked here."""
    return sum(tensor.numel() for tensor in _locked)


_locked: list[torch.Tensor] = []  # freeing memory that the driver still knows would leave it a dangling range


class CopyStream:
    """A CUDA stream for copies beside the computation; on a CPU copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None = None) -> Any:
        """Queue a copy, behind all that the computation has queued so far and behind ``after``.

        Returns:
            The event of its end, for `compute_after` and ``after``.
        """
        import torch

        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Hold the host until ``event``."""
        if event is not None:
            event.synchronize()

    def compute_after(self, event: Any) -> None:
        """Hold the computation until ``event``; the host does not wait."""
        import torch

        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
