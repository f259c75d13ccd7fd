"""How fast this GPU computes and how fast its link to the host copies, timed in less than a second."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from cogcommon.model import copies

from ..offload.pinned import page_locked, unlock
from .cost import PRODUCTS, Speed

if TYPE_CHECKING:
    import torch

_COPIED = 64 << 20  # bytes; large enough for a link's full rate, small beside what a plan locks
_WIDE = 4096  # of the square matrices: 0.14 TFLOP a product
_MILLISECONDS = 50.0  # of the last round of each of the three trials, after as much to warm up


@lru_cache
def timed_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Of a GPU: its matrix products beside an H200's, and the slower direction of its link.

    Other processes that copy at the same time share the host's memory, as they will while they train.
    """
    import torch

    there, host = torch.empty(_COPIED, dtype=torch.uint8, device=device), page_locked(_COPIED, device)
    try:
        out = _per_second(lambda: copies.queue_copy(host, there))
        back = _per_second(lambda: copies.queue_copy(there, host))
    finally:
        unlock(host)
    matrix = torch.ones(_WIDE, _WIDE, dtype=dtype, device=device)
    products = _per_second(lambda: torch.mm(matrix, matrix)) * 2 * _WIDE**3
    return Speed(relative=PRODUCTS / products, link=_COPIED * min(out, back))


def _per_second(act: Callable[[], object]) -> float:
    """How often a GPU does something in a second, once it is warm.

    The first time does not count: it loads the kernel, for longer than all the others may take.
    """
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times, took = 1, 0.0
    while took < _MILLISECONDS:
        begin.record()
        for _ in range(times):
            act()
        end.record()
        end.synchronize()
        took = begin.elapsed_time(end) if times > 1 else 0.0
        times *= 2
    return times / 2 / took * 1000
