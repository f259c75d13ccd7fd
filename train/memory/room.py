"""How much memory each process of a run may take: measured by all of them before any takes some."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cogcommon.files.memory import free_gpu_memory, free_host_memory, held_here

from ..blocks.plan import BlockPlan
from ..distributed.peers import Peers
from .cost import Speed
from .host import HostNeeds
from .link import timed_speed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Room:
    """What each process of a run finds: bytes of its host's memory, which ``together`` processes share, and of its
    GPU's (0 on a CPU); and how fast that is."""

    host: int
    gpu: int
    together: int = 1
    speed: Speed | None = None  # of the GPU and its link; None on a CPU


def common_room(peers: Peers, device: torch.device, dtype: torch.dtype) -> Room:
    """The least that any process of the run has, so that one plan is all of theirs; every rank calls it.

    Call it before a weight is loaded: what one process has taken, the next on its host would miss.

    Args:
        dtype: that the run computes in.
    """
    gpu = device.type == "cuda"
    free = free_gpu_memory(device) if gpu else 0
    host = free_host_memory() + peers.here * held_here()  # what they are already is counted as theirs
    least = smallest(peers.all_gather((peers.node.machine, host, free)))
    speeds = peers.all_gather(timed_speed(device, dtype)) if gpu else []
    return replace(least, speed=slowest(speeds)) if speeds else least


def smallest(measured: list[tuple[str, int, int]]) -> Room:
    """The least GPU memory, and the host on which a process has the least; those of one machine share its memory.

    Args:
        measured: of each process its machine, and the free bytes of the host and of the GPU.
    """
    processes = Counter(machine for machine, _, _ in measured)
    _, host, together = min((host // processes[machine], host, processes[machine]) for machine, host, _ in measured)
    return Room(host=host, gpu=min(gpu for _, _, gpu in measured), together=together)


def slowest(speeds: list[Speed]) -> Speed:
    """What all processes have to wait for."""
    return Speed(max(speed.relative for speed in speeds), min(speed.link for speed in speeds))


def left_beside(needs: HostNeeds, plan: BlockPlan, processes: int) -> int:
    """Bytes of this host's memory that are free now, beside all that the run's plan may yet take; below 0: none.

    Args:
        processes: of the run, on this host; they hold as much as this one.
    """
    return free_host_memory() + processes * held_here() - needs.at_most(plan, processes)
