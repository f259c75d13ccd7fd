"""What a row takes of the machine beside the GPU's time, and what the machine is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from cogcommon.files.memory import free_host_memory
from cogcommon.words import GIB
from cogtrain.distributed.strategies import STRATEGIES
from cogtrain.memory.host import offloaded_bytes
from cogtrain.memory.measured import gpu_here
from cogtrain.memory.weights import trained_weights
from cogtrain.runs.log import peak_gib
from cogtrain.runs.run import Run

_OURSELVES = 4 * GIB  # Python, torch, CUDA and the samples, for each process
_LIBRARIES = ("torch", "diffusers", "accelerate", "deepspeed", "triton", "flash-attn-4")


class BenchMachine:
    """Watches the host's memory from now on."""

    def __init__(self) -> None:
        self._before = _held()
        self._most = 0

    def look(self) -> None:
        self._most = max(self._most, _held() - self._before)

    def found(self, run: Run) -> Mapping[str, Any]:
        """What was held, in GiB, by all processes and by this one; on what; and as what."""
        import torch

        gpu = torch.cuda.is_available()
        share = torch.cuda.get_per_process_memory_fraction() if gpu else 1.0
        return {
            "host_gib": self._most / GIB,
            "rss_gib": peak_gib(torch.device("cpu")),
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB if gpu else 0.0,
            "gpu": gpu_here() or "CPU",
            "card_gib": share * torch.cuda.get_device_properties(0).total_memory / GIB if gpu else 0.0,
            "versions": _versions(),
            "precision": run.precision,
            "strategy": run.strategy,
            "method": run.method.name,
            "memory": run.settings.memory,
        }


def lacking(run: Run, pinned: bool = True) -> str | None:
    """Why the host's memory is not enough for what DeepSpeed offloads, by arithmetic; None if it is.

    It would be found out by the process being killed; what we move ourselves is planned by the memory that is there.

    Args:
        pinned: it is to be page-locked.
    """
    if not STRATEGIES[run.strategy].offloads:
        return None
    part = trained_weights(run) / run.world
    each = offloaded_bytes(part, run.strategy) if pinned else STRATEGIES[run.strategy].host_bytes * part
    needed, there = run.world * (each + _OURSELVES), free_host_memory()
    return f"{needed / GIB:.0f} GiB of host memory needed, {there / GIB:.0f} there" if needed > there else None


def _held() -> int:
    """Bytes of the host's memory that somebody holds; page-locked ones are in nobody's resident set."""
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def _versions() -> dict[str, str]:
    """Of all that a step's time depends on and that is installed; cuDNN's as one number (91900: 9.19.0)."""
    import torch

    found = {name: _version(name) for name in _LIBRARIES} | {"cuda": torch.version.cuda}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
