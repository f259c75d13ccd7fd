"""The step's levers for one run: how much memory there is, which plan that means, one line about it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cogcommon.errors import RunError
from cogcommon.words import in_gib

from ..blocks.engine import BlockEngine
from ..blocks.load import Load
from ..blocks.plan import BlockPlan, choose_plan, fits
from ..blocks.trial import Missing, compiler_fault, missing_flash4, no_compiler
from ..distributed import zero
from .cost import Speed, plan_cost
from .estimate import host_needs
from .room import Room

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

    from ..distributed.strategy import Runtime
    from ..runs.log import RunLog
    from ..runs.run import Run


def install(
    transformer: CogVideoXTransformer3DModel, run: Run, runtime: Runtime, log: RunLog, room: Room
) -> BlockEngine:  # fmt: skip
    """Put the blocks of a transformer under the plan that its run asks for, and the rest on the device.

    Args:
        transformer: on the CPU, in training mode, adapters attached.
        room: that each process had before it was loaded.

    Raises:
        SettingError: ``--compile on`` without a compiler.
        RunError: neither the GPU nor the host has the memory to train all weights.
    """
    gpu = runtime.device.type == "cuda"
    free = room.gpu
    needs = host_needs(run, gpu=gpu)
    load = needs.load
    memory, compiled = run.settings.memory, _compiles(run, runtime, log)
    cost = plan_cost(run, load, room.speed) if room.speed else None

    def fits_host(plan: BlockPlan) -> bool:
        return needs.fits(plan, room.host, room.together)

    plan = choose_plan(memory, load, free=free, fits_host=fits_host, compiled=compiled, gpu=gpu, cost=cost)
    if gpu:
        host_free = needs.left(room.host, room.together)
        if load.cpu_trained and plan.train_on_cpu < load.layers and not fits(plan, load, free):
            raise no_room(plan, load, free=free, host_free=host_free)
        wanted = choose_plan(memory, load, free=free, fits_host=lambda plan: True, compiled=compiled, cost=cost)
        for note in notes(plan, wanted, load, free=free, host_free=host_free):
            log.say(note)
    if not runtime.whole:
        zero.gather_by_block(transformer)
    engine = BlockEngine(transformer, plan, runtime.device, runtime.dtype, log.say, partitioned=not runtime.whole)
    if plan.compiled:
        log.first_notes = ("compiling the blocks",)
    if gpu:
        link = f", copies at {room.speed.link / 1e9:.0f} GB/s" if room.speed else ""
        names = {"flash4": "FlashAttention 4", "cudnn": "cuDNN", "flash": "FlashAttention", "torch": "torch"}
        log.say(
            f"memory {run.settings.memory}: {plan}, attention by {names[engine.kernel]}; "
            f"about {in_gib(plan.peak(load))} of {in_gib(free)} free{link}"
        )
        if missing := missing_flash4(runtime.device, runtime.dtype, plan.compiled):
            log.say(flash4_note(run, load, plan, room.speed, missing))
    else:
        takes = needs.at_most(plan, room.together)
        log.say(f"memory {memory}: {plan}; about {in_gib(takes)} of {in_gib(room.host)} of host memory")
    return engine


def notes(plan: BlockPlan, wanted: BlockPlan, load: Load, *, free: int, host_free: int) -> list[str]:
    """What is not as it was asked for, or will not do.

    Args:
        wanted: the plan if there were host memory without end.
    """
    said = []
    if plan != wanted:
        said.append(
            f"note: host memory is short: {in_gib(wanted.host(load))} would be locked, {in_gib(host_free)} are free; "
            f"{in_gib(plan.host(load))} will be, and about {in_gib(plan.peak(load))} of the GPU's instead of "
            f"{in_gib(wanted.peak(load))}"
        )
    if not fits(plan, load, free):
        said.append(
            f"note: this may not fit: about {in_gib(plan.peak(load))} are needed of the GPU's {in_gib(free)} free; "
            "a lower --batch-size or --rank, or clips encoded at a smaller --resolution, need less"
        )
    return said


def flash4_note(run: Run, load: Load, plan: BlockPlan, speed: Speed | None, missing: Missing) -> str:
    """What FlashAttention 4 would bring where it is not used; seconds where its rate was measured, on Hopper."""
    import torch

    brings = "may be faster"
    if speed and plan.compiled and torch.cuda.get_device_capability()[0] == 9:
        now, then = (plan_cost(run, load, speed, kernel)(plan) for kernel in ("cudnn", "flash4"))
        brings = f"would save about {(now - then) * run.settings.accumulate:.2f} s a step"
    return f"note: FlashAttention 4 {missing.why}, and {brings}: {missing.fix}"


def no_room(plan: BlockPlan, load: Load, *, free: int, host_free: int) -> RunError:
    """The error of all weights being trained where they fit neither on the GPU nor on the host."""
    none, every = (dataclasses.replace(plan, train_on_cpu=blocks) for blocks in (0, load.layers))
    return RunError(
        f"to train all weights takes {in_gib(none.peak(load))} of GPU memory, and {in_gib(free)} are free; "
        f"or {in_gib(every.peak(load))} and {in_gib(every.host(load))} more of host memory, "
        f"and {in_gib(host_free)} are free",
        where="full fine-tuning by one process",
        fix="a host with more memory, or --strategy zero2 on more GPUs",
    )


def _compiles(run: Run, runtime: Runtime, log: RunLog) -> bool:
    wanted = run.settings.compile
    if wanted == "off" or (wanted == "auto" and runtime.device.type == "cpu"):
        return False
    fault = compiler_fault(runtime.device)
    if runtime.all_reduce_max(int(fault is not None)) and fault is None:
        fault = "not in another process of the run"
    if fault and wanted == "on":
        raise no_compiler(fault)
    if fault:
        log.say(f"note: blocks are not compiled, and a step takes about half as long again ({fault})")
    return fault is None
