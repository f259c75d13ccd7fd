"""Copies between host and GPU that run beside the computation; on a CPU they are plain copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class CopyStream:
    """A CUDA stream of copies beside the computation; on a CPU copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """The tensor on the device. The copy waits for nothing that is queued; what is queued next waits for it.

        The host does not wait either: a tensor that is not in page-locked memory is first copied there.
        """
        import torch

        if self._stream is None:
            return host.to(self._device)
        if not host.is_pinned():
            # The host allocator gives this block away again only after the copy from it has ended.
            host = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = host.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        moved.record_stream(computing)  # allocated on the copy stream: not reused before the computation is done
        return moved

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None = None) -> Any:
        """Queue a copy behind all that the computation has queued so far, and behind ``after``.

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
        """Make the host wait for ``event``."""
        if event is not None:
            event.synchronize()

    def compute_after(self, event: Any) -> None:
        """Make the computation wait for ``event``; the host does not wait."""
        import torch

        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, without waiting: its values are there once an event recorded after this has passed."""
    import torch

    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
