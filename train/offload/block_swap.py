"""Block swapping: frozen weights live in host memory; each block's are copied to the GPU while the previous computes.

5B's blocks are 10 GiB in bf16. Two of them on the GPU are 0.5. A step moves each
twice (forward, backward): 21 GB in more than two seconds of computation, which does
not saturate a PCIe 4 link. Unlike 8 or 4 bit quantisation it changes no weight.
Only what is trained stays on the GPU throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcommon.model.copies import CopyStream

from .pinned import page_locked, unlock

if TYPE_CHECKING:
    import torch

_ALIGN = 256  # bytes, as the GPU's allocator has it; compiled kernels ask for 16
_SLOTS = 2


@dataclass(frozen=True)
class PackedTensor:
    """Where a tensor lies among a block's bytes."""

    start: int
    size: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class SwappedView:
    """Stands for a view of a block's weights among the tensors that autograd saves."""

    block: int
    start: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class BlockSwap:
    """Frozen weights of all blocks, on the host, and two blocks' worth of GPU memory.

    Args:
        blocks: the frozen parameters of each block; they become views of page-locked memory,
            block by block, so that no more than one block exists twice.
        device: to compute on.
    """

    def __init__(self, blocks: Iterable[Sequence[torch.nn.Parameter]], device: torch.device) -> None:
        import torch

        self._device = device
        self._copies = CopyStream(device)
        self._places: list[list[PackedTensor]] = []
        self._host: list[torch.Tensor] = []
        for parameters in blocks:
            self._places.append(_places(parameters))
            self._host.append(_packed(parameters, self._places[-1], device))
        largest = max(host.numel() for host in self._host)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self._views = [
            [_view(self._slots[block % _SLOTS], place) for place in places] for block, places in enumerate(self._places)
        ]
        self._holds: list[int | None] = [None] * _SLOTS
        self._ready: list[Any] = [None] * _SLOTS

    def on_host(self, block: int) -> list[torch.Tensor]:
        """A block's weights where they live."""
        return [_view(self._host[block], place) for place in self._places[block]]

    def unlock(self) -> None:
        """The weights become ordinary memory, which goes with them."""
        for host in self._host:
            unlock(host)

    def invalidate(self) -> None:
        """Drop the GPU's copies, because the weights have changed on the host."""
        self._holds = [None] * _SLOTS

    def fetch(self, block: int) -> None:
        """Start copying a block's weights into its slot, over the block that held the slot before."""
        slot = block % _SLOTS
        if not 0 <= block < len(self._host) or self._holds[slot] == block:
            return
        host = self._host[block]
        # Queued behind the computation so far, and so behind the last use of the slot.
        self._ready[slot] = self._copies.copy(self._slots[slot][: host.numel()], host)
        self._holds[slot] = block

    def arrive(self, block: int, then: int) -> None:
        """Make the computation wait for a block's weights, and start copying those of ``then``."""
        self.fetch(block)
        self._copies.compute_after(self._ready[block % _SLOTS])
        self.fetch(then)

    def take(self, block: int, then: int) -> list[torch.Tensor]:
        """A block's weights, for the computation that is queued next; ``then`` is the block after that."""
        self.arrive(block, then)
        return self._views[block]

    def refer(self, tensor: torch.Tensor) -> SwappedView | None:
        """The reference that stands for a view of a slot; None for any other tensor."""
        pointer = tensor.data_ptr()
        for slot, holds in zip(self._slots, self._holds, strict=True):
            start = pointer - slot.data_ptr()
            if holds is not None and tensor.device == slot.device and 0 <= start < slot.numel():
                return SwappedView(holds, start, tensor.shape, tensor.stride(), tensor.dtype)
        return None

    def resolve(self, reference: SwappedView, then: int) -> torch.Tensor:
        """The view again, wherever the block is now."""
        self.arrive(reference.block, then)
        whole = self._slots[reference.block % _SLOTS]
        usable = whole[: whole.numel() // _ALIGN * _ALIGN].view(reference.dtype)
        return usable.as_strided(reference.shape, reference.stride, reference.start // reference.dtype.itemsize)


def _view(whole: torch.Tensor, place: PackedTensor) -> torch.Tensor:
    return whole[place.start : place.start + place.size].view(place.dtype).view(place.shape)


def _places(parameters: Sequence[torch.nn.Parameter]) -> list[PackedTensor]:
    places, start = [], 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        places.append(PackedTensor(start, size, parameter.shape, parameter.dtype))
        start += -(-size // _ALIGN) * _ALIGN
    return places


def _packed(
    parameters: Sequence[torch.nn.Parameter], places: Sequence[PackedTensor], device: torch.device
) -> torch.Tensor:
    last = places[-1]
    packed = page_locked(-(-(last.start + last.size) // _ALIGN) * _ALIGN, device)
    for parameter, place in zip(parameters, places, strict=True):
        view = _view(packed, place)
        view.copy_(parameter.detach())
        parameter.data = view
    return packed
