"""How much memory each process of a run may take: measured by all of them before any takes some."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cogcommon.files.memory import free_gpu_memory, free_host_memory

from ..distributed.peers import Peers
from .cost import Speed
from .link import timed_speed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Room:
    """Bytes for each process of a run: of its host's memory, and of its GPU's (0 on a CPU); and how fast that is."""

    host: int
    gpu: int
    speed: Speed | None = None  # of the GPU and its link; None on a CPU


def common_room(peers: Peers, device: torch.device, dtype: torch.dtype) -> Room:
    """The least that any process of the run has, so that one plan is all of theirs; every rank calls it.

    Call it before a weight is loaded: what one process has taken, the next on its host would miss.

    Args:
        dtype: that the run computes in.
    """
    gpu = device.type == "cuda"
    free = free_gpu_memory(device) if gpu else 0
    least = smallest(peers.all_gather((peers.node.machine, free_host_memory(), free)))
    speeds = peers.all_gather(timed_speed(device, dtype)) if gpu else []
    return replace(least, speed=slowest(speeds)) if speeds else least


def smallest(measured: list[tuple[str, int, int]]) -> Room:
    """The least share of all processes; those of one machine share its memory.

    Args:
        measured: of each process its machine, and the free bytes of the host and of the GPU.
    """
    processes = Counter(machine for machine, _, _ in measured)
    return Room(
        host=min(host // processes[machine] for machine, host, _ in measured), gpu=min(gpu for _, _, gpu in measured)
    )


def slowest(speeds: list[Speed]) -> Speed:
    """What all processes have to wait for."""
    return Speed(max(speed.relative for speed in speeds), min(speed.link for speed in speeds))
