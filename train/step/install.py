"""The step's levers for one run: how much memory there is, which plan that means, one line about it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cogcommon.errors import SettingError

from .engine import Engine
from .plan import Load, choose, gib
from .trial import compiler_fault

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    from ..progress import RunLog
    from ..run import Run
    from ..strategy import Runtime


def install(transformer: CogVideoXTransformer3DModel, run: Run, runtime: Runtime, log: RunLog) -> Engine:
    """Put the blocks of a transformer under the plan that its run asks for, and the rest on the device.

    Args:
        transformer: on the CPU, in training mode, adapters attached.

    Raises:
        SettingError: ``--compile on`` without a compiler.
    """
    import psutil

    gpu = runtime.device.type == "cuda"
    load = load_of(run, runtime, transformer)
    free = _free(runtime.device) if gpu else 0
    host_free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    plan = choose(
        run.settings.memory, load, free=free, host_free=host_free, compiled=_compiles(run, runtime, log), gpu=gpu
    )
    engine = Engine(transformer, plan, runtime.device, runtime.dtype)
    if gpu:
        kernel = {"cudnn": "cuDNN", "flash": "FlashAttention", "torch": "torch"}[engine.kernel]
        log.say(
            f"memory {run.settings.memory}: {plan}, attention by {kernel}; "
            f"about {gib(plan.peak(load))} of {gib(free)} free"
        )
    return engine


def _free(device: torch.device) -> int:
    """Bytes of a GPU that nobody holds, within what this process may take."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device.index)  # None: the current GPU
    return min(free, int(total * share))


def load_of(run: Run, runtime: Runtime, transformer: CogVideoXTransformer3DModel) -> Load:
    """What a step of the run works on, in its largest bucket."""
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    # fp32: weight, gradient and two moments; DeepSpeed holds weight and gradient in half precision, and the rest
    # (12 bytes) on the host or spread over the processes.
    per_weight = 16.0
    if runtime.sharded:
        per_weight = 4 + (0 if run.strategy.endswith("-offload") else 12 / runtime.world)
    loads = [
        Load.of(
            run.checkpoint.transformer_config,
            bucket,
            batch=run.settings.batch_size,
            size=runtime.dtype.itemsize,
            trained=int(trained * per_weight),
            frozen=not run.method.full,
            streams=not runtime.sharded,
        )
        for bucket in run.shards.buckets
    ]
    return max(loads, key=lambda load: load.activation)


def _compiles(run: Run, runtime: Runtime, log: RunLog) -> bool:
    wanted = run.settings.compile
    if wanted == "off" or (wanted == "auto" and runtime.device.type == "cpu"):
        return False
    fault = compiler_fault(runtime.device)
    if fault and wanted == "on":
        raise SettingError(
            f"nothing can be compiled here: {fault}",
            where="--compile on",
            fix="install gcc and Triton (it comes with torch on Linux), or --compile auto",
        )
    if fault:
        log.say(f"note: blocks are not compiled, and a step takes about half as long again ({fault})")
    return fault is None
