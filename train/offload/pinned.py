"""Page-locked host memory, which a GPU copies to and from while it computes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_PAGE = 4096  # bytes; the driver locks whole pages, and refuses one that it has locked
_SMALL = 1 << 20  # bytes; of less, torch's rounding wastes little


def page_locked(size: int, device: torch.device) -> torch.Tensor:
    """``size`` bytes of host memory, page-locked where the device is a GPU.

    torch's own ``pin_memory`` rounds up to a power of two: 16 GiB for the 10.4
    of 5B's weights. So ordinary memory is registered with the driver; where
    that is refused (a low ``ulimit -l``), torch's way is taken. It stays locked
    until `unlock`, or for the life of the process.
    """
    import torch

    if device.type != "cuda" or size == 0:
        return torch.empty(size, dtype=torch.uint8)
    registered = _registered(size, device) if size >= _SMALL else None
    given = torch.empty(size, dtype=torch.uint8, pin_memory=True) if registered is None else registered
    _locked[given.data_ptr()] = _Locked(given, registered is not None)
    return given


def unlock(given: torch.Tensor) -> None:
    """Make what `page_locked` gave ordinary memory again, once the GPU is done with it."""
    import torch

    if given.data_ptr() not in _locked:  # ordinary memory, as for a CPU
        return
    torch.cuda.synchronize()
    if _locked.pop(given.data_ptr()).registered:
        torch.cuda.cudart().cudaHostUnregister(given.data_ptr())


def locked_bytes() -> int:
    """Host memory that this process has locked here."""
    return sum(locked.memory.numel() for locked in _locked.values())


@dataclass(frozen=True)
class _Locked:
    memory: torch.Tensor  # held: freeing memory that the driver still knows would leave it a dangling range
    registered: bool


_locked: dict[int, _Locked] = {}  # by address


def _registered(size: int, device: torch.device) -> torch.Tensor | None:
    """Page-aligned ordinary memory, registered with the driver; None where the driver refuses."""
    import torch

    whole = torch.empty(size + 2 * _PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE
    given = whole[start : start + size]
    if int(torch.cuda.cudart().cudaHostRegister(given.data_ptr(), -(-size // _PAGE) * _PAGE, 0)) == 0:
        return given
    # The driver reports the error to the next kernel, so launch one here and drop its error.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
    return None
