"""How much memory may still be taken: of the host, as a container sees it, and of a GPU. Both in bytes.

A container's own limit is not in what the system calls available: on a host of 512 GB with 64 for the container, the
system says 512, and the process that takes 65 is killed. The limit is in the process's control group, or in one above
it (https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SELF = Path("/proc/self")
_M_MMAP_THRESHOLD = -3  # of malloc.h; once set, it no longer grows by itself
LARGE = 1 << 20  # bytes of a piece that goes back to the system as it is freed, see `give_back_what_is_freed`


@dataclass(frozen=True)
class _Names:
    """The files of a control group, by version."""

    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]  # lines of memory.stat: what is counted as used, and goes when memory is short


_V1 = _Names(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)  # fmt: skip
# Above memory.high a process is not killed, but hardly runs.
_V2 = _Names(
    ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable")
)  # fmt: skip


@dataclass(frozen=True)
class Headroom:
    """Bytes that may still be taken, and what says so."""

    bytes: int
    where: str


def free_host_memory(process: Path = _SELF) -> int:
    """Bytes of host memory that can be taken without swapping or being killed; all processes share them.

    Args:
        process: its folder under ``/proc``.
    """
    return host_memory_left(process).bytes


def host_memory_left(process: Path = _SELF) -> Headroom:
    """The same, with the tightest limit: this machine's own, or a control group's, named by its folder."""
    import psutil

    machine = Headroom(int(psutil.virtual_memory().available), "the memory of this machine")
    tightest = min([machine, *_left_by_groups(process)], key=lambda left: left.bytes)
    return Headroom(max(0, tightest.bytes), tightest.where)


def held_here() -> int:
    """Bytes of host memory that this process holds and shares with no other."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def give_back_what_is_freed() -> None:
    """Have the C library take large pieces from the system each time, and return them when they are freed.

    It keeps them otherwise, up to 32 MB each and in every thread's own store: a loader of samples of 9 MB held 219 MB
    instead of 43, and what a step takes could not be said beforehand. Smaller pieces stay in each thread's store.
    Does nothing where that library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)


def free_gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may still take; what torch has only cached is given back first."""
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device.index)  # None: the current GPU
    return max(0, min(free, int(total * share) - torch.cuda.memory_reserved(device)))


def _left_by_groups(process: Path) -> Iterator[Headroom]:
    """What each control group of a process, its own and those above it, leaves of its limit."""
    for folder, names in _groups(process):
        limits = [limit for file in names.limits if (limit := _number(folder / file)) is not None]
        used = _number(folder / names.used)
        if limits and used is not None:
            stat = _table(folder / "memory.stat")
            free = min(limits) - used + sum(stat.get(name, 0) for name in names.reclaimable)
            yield Headroom(free, f"the memory limit of this container or job: {folder}")


def _groups(process: Path) -> Iterator[tuple[Path, _Names]]:
    """The folders of a process's memory groups, from its own to the outermost that can be seen."""
    paths: dict[str, str] = {}
    for line in _lines(process / "cgroup"):  # 4:memory:/a/b, or of version 2 0::/a/b
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in _lines(process / "mountinfo"):
        before, _, after = line.partition(" - ")
        (_, _, _, root, point), (kind, _, options) = before.split()[:5], after.split()[:3]
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top = Path(_unescaped(point))
        # A container may see its own group as the root, or be told a path that only the host knows.
        below = os.path.relpath(paths[kind], _unescaped(root))
        group = top if below.startswith("..") else top / below
        for folder in (group, *group.parents):
            yield folder, _V1 if kind == "cgroup" else _V2
            if folder == top:
                break


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or not for us to read
        return []


def _number(file: Path) -> int | None:
    """None where there is no such file, or it says ``max``."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _table(file: Path) -> Mapping[str, int]:
    pairs = (line.split() for line in _lines(file))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _unescaped(path: str) -> str:
    """A path of mountinfo, in which a space is ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)
