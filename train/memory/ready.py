"""What this machine must have for a run, found out before a weight is loaded: packages, compilers, host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogcommon.errors import RunError
from cogcommon.files.memory import free_host_memory

from ..blocks.plan import gib
from ..distributed.optimizer import check_optimizer_installed
from ..runs.run import Run
from .estimate import estimate

if TYPE_CHECKING:
    import torch


def check_ready(run: Run, processes: int, device: torch.device | None = None) -> None:
    """Refuse a run that would fail here later; every process calls it, before any of them loads.

    Args:
        processes: of the run, on this machine.
        device: that this process trains on; None where it does not train, and must leave the GPUs alone.

    Raises:
        CogError: a package, a compiler or memory is missing.
    """
    check_optimizer_installed(run.settings.optimizer)
    check_host_memory(run, processes)
    if run.strategy.endswith("-offload"):
        from ..distributed.zero import check_deepspeed_cpu_adam

        check_deepspeed_cpu_adam()
    if device is not None and run.settings.compile == "on":
        from ..blocks.trial import check_compiler

        check_compiler(device)


def check_host_memory(run: Run, processes: int) -> None:
    """Refuse what the host has no memory for, whatever is planned: processes would be killed without a word.

    Raises:
        RunError: with what it takes.
    """
    free = free_host_memory()
    needs = estimate(run, host=free // processes)
    part, what = max((needs.loading, "to load the model"), (needs.offloaded, "for what DeepSpeed offloads"))
    if processes * part > free:
        each = f", {gib(part)} for each of {processes} processes" if processes > 1 else ""
        raise RunError(
            f"{gib(processes * part)} of host memory are needed {what}{each}, and {gib(free)} are free",
            where="the memory of this host, or of the container or job that this process runs in",
            fix=("--nproc with fewer processes, " if processes > 1 else "")
            + ("another --strategy, " if needs.offloaded >= needs.loading else "")
            + "or a host, or a limit, with more; `cogtrain plan` says what each way to train takes",
        )
