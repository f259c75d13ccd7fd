"""Copies between host and GPU that run beside the computation; on a CPU they are plain copies."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PIECE = 16 << 20  # bytes that are page-locked at a time, twice for each of so many threads
_THREADS = 6
_SMALL = 1 << 16  # bytes; what is smaller needs no pieces


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
            queue_copy(target, source)
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


def queue_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Queue a copy between host and GPU on the current stream: all of them but a batch's, its losses' and a load's.

    `workshop.bench_train --link` puts one in its place that takes as long as on a slower link.
    """
    target.copy_(source, non_blocking=True)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, without waiting: its values are there once an event recorded after this has passed."""
    import torch

    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _nothing() -> None:
    pass


def move(
    module: torch.nn.Module,
    device: torch.device,
    stay: Collection[int] = (),
    meanwhile: Callable[[], object] = _nothing,
) -> None:
    """Move a module's parameters and buffers to a device, as fast as memory and link allow.

    Weights that have just been loaded are still in their files: torch would fault in one page after the other, in one
    thread, and copy through a buffer of the driver's (5B: 5 s on an H200 of which the link needs 0.3).

    Args:
        stay: parameters that stay where they are, by id.
        meanwhile: called while other threads copy to a GPU: to import what comes next, say.
    """
    import torch

    moved = {id(parameter): parameter for parameter in module.parameters() if id(parameter) not in stay}
    parameters = list(moved.values())
    with torch.no_grad():
        there = uploaded([parameter.data for parameter in parameters], device, meanwhile)
        for parameter, data in zip(parameters, there, strict=True):
            parameter.data = data
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(device))


def uploaded(
    tensors: Sequence[torch.Tensor], device: torch.device, meanwhile: Callable[[], object] = _nothing
) -> list[torch.Tensor]:
    """The tensors on the device, all of them there.

    Several threads read pages, or files that lie behind them, into page-locked memory while earlier pieces travel.

    Args:
        meanwhile: see `move`.
    """
    import torch

    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    there = [
        torch.empty_like(tensor, device=device) if _in_pages(tensor) else tensor.to(device, non_blocking=True)
        for tensor in tensors
    ]
    pieces = [
        piece
        for tensor, moved in zip(tensors, there, strict=True)
        if _in_pages(tensor)
        for piece in _in_pieces(tensor, moved)
    ]
    _in_threads(_send, pieces, device, meanwhile)  # behind what is queued: memory that is used again may still be read
    torch.cuda.current_stream(device).synchronize()
    return there


def _in_pieces(source: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The bytes of two contiguous tensors of one type and shape, side by side, as many as are page-locked at a time."""
    import torch

    return zip(*(tensor.view(-1).view(torch.uint8).split(_PIECE) for tensor in (source, target)), strict=True)


def _in_threads(
    carry: Callable[[Sequence[tuple[torch.Tensor, torch.Tensor]], torch.device, torch.cuda.Event], None],
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    meanwhile: Callable[[], object] = _nothing,
) -> None:
    """Have several threads carry pieces, each behind all that is queued now; they have when this returns."""
    import torch

    threads = max(1, min(_THREADS, os.cpu_count() or 1, len(pieces)))
    behind = torch.cuda.current_stream(device).record_event()
    with ThreadPoolExecutor(threads) as pool:
        carried = pool.map(lambda number: carry(pieces[number::threads], device, behind), range(threads))
        meanwhile()
        list(carried)  # raises what a thread has raised


def _in_pages(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in ordinary host memory, in one piece."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() > 0 and not tensor.is_pinned()


def _send(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device, behind: torch.cuda.Event
) -> None:  # fmt: skip
    """Copy bytes to the GPU by way of two page-locked buffers: one is filled while the other travels."""
    import numpy as np
    import torch

    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_event(behind)
        buffers = [torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        free: list[torch.cuda.Event | None] = [None, None]
        for number, (source, target) in enumerate(pieces):
            turn = number % 2
            if (event := free[turn]) is not None:
                event.synchronize()
            buffer = buffers[turn][: len(source)]
            np.copyto(buffer.numpy(), source.numpy())  # in this thread alone, and without the interpreter's lock
            with torch.cuda.stream(stream):
                target.copy_(buffer, non_blocking=True)
            free[turn] = stream.record_event()
        stream.synchronize()


def downloaded(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the tensors in ordinary host memory, each of its own, all of them there: nothing changes them later.

    From a GPU they come by way of page-locked memory, and several threads fill the pages.
    """
    import torch

    sources = [tensor.detach() for tensor in tensors]
    pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
    here = []
    for source in sources:
        if source.device.type == "cuda" and source.is_contiguous() and source.nbytes >= _SMALL:
            copy = torch.empty(source.shape, dtype=source.dtype)
            pieces += _in_pieces(source, copy)
        else:
            copy = source.to("cpu", copy=True)
        here.append(copy)
    if pieces:
        _in_threads(_receive, pieces, pieces[0][0].device)
    return here


def _receive(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device, behind: torch.cuda.Event
) -> None:  # fmt: skip
    """Copy bytes from the GPU by way of two page-locked buffers: one is emptied while the other is filled."""
    import torch

    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_event(behind)
        buffers = [torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        arriving: list[tuple[torch.cuda.Event, torch.Tensor, torch.Tensor]] = []
        for number, (source, target) in enumerate(pieces):
            buffer = buffers[number % 2][: len(source)]
            with torch.cuda.stream(stream):
                buffer.copy_(source, non_blocking=True)
            arriving.append((stream.record_event(), buffer, target))
            if number:
                _empty(*arriving.pop(0))
        for piece in arriving:
            _empty(*piece)


def _empty(event: torch.cuda.Event, buffer: torch.Tensor, target: torch.Tensor) -> None:
    import numpy as np

    event.synchronize()
    np.copyto(target.numpy(), buffer.numpy())  # in this thread alone, and without the interpreter's lock
