"""What this machine must have for a run, found out before a weight is loaded: packages, compilers, host memory."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from cogcommon.errors import RunError
from cogcommon.files.memory import Headroom, free_gpu_memory, held_here, host_memory_left
from cogcommon.model.device import visible_gpus
from cogcommon.words import in_gib

from ..distributed.optimizer import check_optimizer_installed
from ..distributed.strategies import STRATEGIES
from ..runs.run import Run
from ..settings.training import Memory
from .estimate import estimate
from .host import itself
from .weights import text_encoder_bytes

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
    check_optimizer_installed(run.settings.optimizer, run.strategy)
    check_host_memory(run, processes, device)
    check_text_encoder(run, processes, device)
    if STRATEGIES[run.strategy].offloads:
        from ..distributed.zero import check_deepspeed_cpu_adam

        check_deepspeed_cpu_adam()
    if device is not None and run.settings.compile == "on":
        from ..blocks.trial import check_compiler

        check_compiler(device)


def check_host_memory(run: Run, processes: int, device: torch.device | None = None) -> None:
    """Refuse what the host has no memory for under any plan: processes would be killed without a word.

    Args:
        processes: of the run, on this machine.
        device: that this process trains on; None: it does not train, and must leave the GPUs alone.

    Raises:
        RunError: with what it takes, what is there, and what to type.
    """
    left, there, asked = *_host_memory(processes, device), run.settings.batch_size
    gpu = visible_gpus() > 0
    card = free_gpu_memory(device) if device is not None and device.type == "cuda" else sys.maxsize

    def takes(
        batch: int = asked, memory: Memory = run.settings.memory, of: Run = run, count: int = processes
    ) -> int:  # fmt: skip
        needs = estimate(of, card=card, host=there, processes=count, batch=batch, memory=memory, gpu=gpu)
        return needs.host_at_most(count)

    needed = takes()
    if needed <= there:
        return
    ways = ["--memory low"] if takes(memory="low") <= there else []
    if smaller := next((batch for batch in range(asked - 1, 0, -1) if takes(batch) <= there), 0):
        ways.append(f"--batch-size {smaller}")
    if run.settings.keep_best:  # at whose end a base is loaded again
        without = dataclasses.replace(run, settings=dataclasses.replace(run.settings, keep_best=False))
        ways += ["leave --keep-best out"] * (takes(of=without) <= there)
    for count in range(processes - 1, 0, -1):
        fewer = dataclasses.replace(run, world=max(1, run.world // processes) * count)
        if takes(of=fewer, count=count) <= there:
            ways.append(f"--nproc {count}")
            break
    ways += ["another --strategy"] * STRATEGIES[run.strategy].offloads
    each = f", {in_gib(needed / processes)} for each of {processes} processes" if processes > 1 else ""
    raise RunError(
        f"this run takes {in_gib(needed)} of host memory{each}, and {in_gib(there)} are there",
        where=left.where,
        fix=", ".join([*ways, "or a host, or a limit, with more"]).removeprefix("or ")
        + "; `cogtrain plan` says what each way to train takes",
    )


def check_text_encoder(run: Run, processes: int, device: torch.device | None = None) -> None:
    """Refuse prompts to embed where the host has no memory for T5, which one process loads before the transformer.

    Args:
        processes, device: as for `check_host_memory`.

    Raises:
        RunError: with what it takes, what is there, and what to do.
    """
    if not run.new_prompts:
        return
    left, there = _host_memory(processes, device)
    each = itself(gpu=visible_gpus() > 0, strategy=run.strategy)
    needed = text_encoder_bytes(run.checkpoint.text_config, run.precision) + processes * each
    if needed > there:
        raise RunError(
            f"T5, which embeds the prompts of --validate-prompt, takes {in_gib(needed)} of host memory with the "
            f"processes of the run, and {in_gib(there)} are there",
            where=left.where,
            fix="begin on a host with more: the run's folder keeps the embeddings; or leave --validate-prompt out",
        )


def _host_memory(processes: int, device: torch.device | None) -> tuple[Headroom, int]:
    """What is left of the host's memory, and the bytes of it that a run may take."""
    left = host_memory_left()
    # What a process is already is counted as the run's; one that only starts the others stays beside them.
    return left, left.bytes + (processes * held_here() if device is not None else 0)
