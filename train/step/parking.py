"""What blocks keep for the backward pass waits in host memory.

For 5B at 49x480x720 that is 0.10 GiB a block for its input, and as much for its
attention's output: 9 GiB that need not be on the GPU, for which a PCIe 4 link
takes less time than the blocks beside them. Copies run on streams of their own:
out while the next block computes, back while the block after it goes backward.
A tensor on its way out is held until the computation has been told to wait for
the copy, never by the allocator's own bookkeeping: that frees memory when the
host looks, and the host is a whole step ahead of the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.copies import CopyStream

from .host_memory import page_locked, unlock

if TYPE_CHECKING:
    import torch

_SMALLEST = 4 << 20  # bytes; less than that is not worth a copy


@dataclass
class Parked:
    """A tensor in host memory, and on the GPU as long as it has not left or has come back."""

    block: int
    host: torch.Tensor  # as it lies in memory, flat
    stays: torch.Tensor | None  # on the GPU
    shape: torch.Size
    stride: tuple[int, ...]  # compiled code asks for the same again
    event: Any  # of its last copy
    taken: bool = False  # the backward pass has had it


class Parking:
    """Host memory for what each block keeps; the same buffers step after step."""

    def __init__(self, device: torch.device, smallest: int = _SMALLEST) -> None:
        self._device = device
        self._smallest = smallest
        self._out, self._back = CopyStream(device), CopyStream(device)
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}
        self._parked: dict[int, list[Parked]] = {}

    def begin(self, block: int) -> None:
        """A forward pass enters a block: forget what its last one parked.

        What the block two before parked has left while the block before was computing, and is let
        go of; the block before's own copy has only begun, and the computation would wait for it.
        """
        self._parked[block] = []
        self._let_go(block - 2)

    def takes(self, tensor: torch.Tensor) -> bool:
        size = tensor.numel() * tensor.element_size()
        here = tensor.device.type == self._device.type
        return here and tensor.is_floating_point() and size >= self._smallest and _dense(tensor)

    def park(self, block: int, tensor: torch.Tensor) -> Parked:
        """Start a tensor on its way out."""
        beside = self._parked[block]
        size = tensor.numel() * tensor.element_size()
        place = (block, len(beside))
        if place not in self._buffers or self._buffers[place].numel() < size:
            if place in self._buffers:  # of a smaller resolution
                unlock(self._buffers.pop(place))
            self._buffers[place] = page_locked(size, self._device)
        host = self._buffers[place][:size].view(tensor.dtype)
        # Behind the computation, and so behind the last step's way back from the same buffer.
        event = self._out.copy(host, tensor.as_strided((tensor.numel(),), (1,)))
        parked = Parked(block, host, tensor, tensor.shape, tensor.stride(), event)
        beside.append(parked)
        return parked

    def fetch(self, block: int) -> None:
        """Start a block's tensors on their way back.

        Not those that the backward pass has taken already: a second copy of each would stay until
        the next step, 8.6 GiB for 5B.
        """
        for parked in self._parked.get(block, ()):
            if not parked.taken:
                self._bring(parked)

    def take(self, parked: Parked) -> torch.Tensor:
        """The tensor, for the computation to use. Its memory is free again when the caller drops it."""
        self._bring(parked)
        self._back.compute_after(parked.event)
        tensor, parked.stays, parked.taken = parked.stays, None, True
        assert tensor is not None
        return tensor

    def _bring(self, parked: Parked) -> None:
        import torch

        if parked.stays is None:
            # From the computation's memory, whose last user is queued before the copy.
            flat = torch.empty(parked.host.shape, dtype=parked.host.dtype, device=self._device)
            parked.event = self._back.copy(flat, parked.host, after=parked.event)
            parked.stays = flat.as_strided(parked.shape, parked.stride)

    def _let_go(self, block: int) -> None:
        for parked in self._parked.get(block, ()):
            self._out.compute_after(parked.event)
            parked.stays = None


def _dense(tensor: torch.Tensor) -> bool:
    """It fills one stretch of memory, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
