"""Activation offloading: what blocks keep for the backward pass waits in host memory until that needs it.

For 5B at 49x480x720 that is 0.10 GiB a block for its input, and as much for its
attention's output: 9 GiB that need not be on the GPU. A PCIe 4 link copies them in less
time than the blocks compute. Copies have their own streams: out while the next
block computes, back while the following block's backward pass runs. A tensor on
its way out stays referenced until the computation has been told to wait for the
copy. ``record_stream`` would not do: it frees memory only when the host looks, and
the host is a whole step ahead of the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.model.copies import CopyStream

from .pinned import page_locked, unlock

if TYPE_CHECKING:
    import torch

_SMALLEST = 4 << 20  # bytes; less than that is not worth a copy


@dataclass
class Offloaded:
    """A tensor in host memory; also on the GPU until it has left, and again once it is back."""

    block: int
    host: torch.Tensor  # as it lies in memory, flat
    stays: torch.Tensor | None  # on the GPU
    shape: torch.Size
    stride: tuple[int, ...]  # compiled code asks for the same again
    event: Any  # of its last copy
    taken: bool = False  # the backward pass has had it


class ActivationOffload:
    """Host buffers for the tensors that each block keeps, reused in every step."""

    def __init__(self, device: torch.device, smallest: int = _SMALLEST) -> None:
        self._device = device
        self._smallest = smallest
        self._out, self._back = CopyStream(device), CopyStream(device)
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}
        self._offloaded: dict[int, list[Offloaded]] = {}

    def begin(self, block: int) -> None:
        """Called when a forward pass enters a block; drops what the block offloaded in the step before.

        The copies of the block before the previous one ended while the previous one computed, so its
        GPU tensors are released here. The previous one's copies have only just begun.
        """
        self._offloaded[block] = []
        self._let_go(block - 2)

    def takes(self, tensor: torch.Tensor) -> bool:
        size = tensor.numel() * tensor.element_size()
        here = tensor.device.type == self._device.type
        return here and tensor.is_floating_point() and size >= self._smallest and _dense(tensor)

    def offload(self, block: int, tensor: torch.Tensor) -> Offloaded:
        """Start copying a tensor to the host."""
        beside = self._offloaded[block]
        size = tensor.numel() * tensor.element_size()
        place = (block, len(beside))
        if place not in self._buffers or self._buffers[place].numel() < size:
            if place in self._buffers:  # it was made for a smaller resolution
                unlock(self._buffers.pop(place))
            self._buffers[place] = page_locked(size, self._device)
        host = self._buffers[place][:size].view(tensor.dtype)
        # Queued behind the computation, and so behind the last step's copy back from the same buffer.
        event = self._out.copy(host, tensor.as_strided((tensor.numel(),), (1,)))
        offloaded = Offloaded(block, host, tensor, tensor.shape, tensor.stride(), event)
        beside.append(offloaded)
        return offloaded

    def fetch(self, block: int) -> None:
        """Start copying a block's tensors back to the GPU.

        Tensors that the backward pass has already used are left out: copies of them would stay on
        the GPU until the next step, 8.6 GiB for 5B.
        """
        for offloaded in self._offloaded.get(block, ()):
            if not offloaded.taken:
                self._bring(offloaded)

    def take(self, offloaded: Offloaded) -> torch.Tensor:
        """The tensor on the GPU, for the computation; its memory is freed when the caller drops it."""
        self._bring(offloaded)
        self._back.compute_after(offloaded.event)
        tensor, offloaded.stays, offloaded.taken = offloaded.stays, None, True
        assert tensor is not None
        return tensor

    def _bring(self, offloaded: Offloaded) -> None:
        import torch

        if offloaded.stays is None:
            # From the computation's memory, whose last user is queued before the copy.
            flat = torch.empty(offloaded.host.shape, dtype=offloaded.host.dtype, device=self._device)
            offloaded.event = self._back.copy(flat, offloaded.host, after=offloaded.event)
            offloaded.stays = flat.as_strided(offloaded.shape, offloaded.stride)

    def _let_go(self, block: int) -> None:
        for offloaded in self._offloaded.get(block, ()):
            self._out.compute_after(offloaded.event)
            offloaded.stays = None


def _dense(tensor: torch.Tensor) -> bool:
    """Whether it fills one contiguous stretch of memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
