"""What a run would take of the GPU and the host under each strategy and memory setting, before it is loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..zero_config import STAGE, Strategy
from .plan import Load, Memory, Plan, choose

if TYPE_CHECKING:
    from ..run import Run

_SIZES = {"fp32": 4}  # bytes of a number as computed; half precision else
_GATHERED = 2  # blocks that ZeRO-3 holds whole: one that computes, one that comes


@dataclass(frozen=True)
class Demand:
    """Bytes under one choice of settings."""

    strategy: Strategy
    memory: Memory
    plan: Plan
    load: Load
    offloaded: int = 0  # bytes of host memory that DeepSpeed takes, or the masters trained there, for each process

    @property
    def peak(self) -> int:
        """Of GPU memory, for each process."""
        return self.plan.peak(self.load)

    @property
    def locked(self) -> int:
        """Of host memory, page-locked by us, for each process."""
        return self.plan.host(self.load)

    @property
    def host(self) -> int:
        return self.locked + self.offloaded


def demand(
    run: Run, *, card: int = sys.maxsize, strategy: Strategy | None = None, memory: Memory | None = None,
    batch: int | None = None, compiled: bool = True,
) -> Demand:  # fmt: skip
    """What a run needs in its largest bucket.

    Args:
        card: bytes of the GPU's memory.
        strategy, memory, batch: other than the run's own.
    """
    strategy, memory = strategy or run.strategy, memory or run.settings.memory
    load = load_of(run, strategy=strategy, batch=batch or run.settings.batch_size)
    # Weights, gradients and two moments in fp32; under stage 3 the half precision copy, too.
    a_weight = {"zero2-offload": 16, "zero3-offload": 18}.get(strategy, 0) / run.world
    offloaded = int(trained_weights(run) * a_weight) if a_weight else 0
    if STAGE[strategy] < 3:
        plan = choose(memory, load, free=card, host_free=sys.maxsize, compiled=compiled)
    else:  # diffusers' own blocks; what they keep waits in host memory under low
        plan = Plan(keep=("all" if memory == "fast" else "inputs",) * load.layers, park=memory == "low")
    if plan.train_on_host:
        offloaded = 4 * trained_weights(run)
    return Demand(strategy, memory, plan, load, offloaded)


def load_of(run: Run, *, strategy: Strategy | None = None, batch: int | None = None) -> Load:
    """The load of a run in its largest bucket."""
    strategy = strategy or run.strategy
    config = run.checkpoint.transformer_config
    loads = [
        Load.of(
            config,
            bucket,
            batch=batch or run.settings.batch_size,
            size=_SIZES.get(run.precision, 2),
            trained=int(trained_weights(run) * bytes_a_weight(strategy, run.world)),
            frozen=not run.method.full,
            streams=strategy == "ddp",
            accumulate=run.settings.accumulate if can_host(run, strategy) else None,
        )
        for bucket in run.shards.buckets
    ]
    load = max(loads, key=lambda load: load.activation)
    if STAGE[strategy] < 3:
        return load
    whole = Load.of(config, run.shards.buckets[0], batch=1, size=_SIZES.get(run.precision, 2), trained=0)
    here = 0 if strategy == "zero3-offload" else 1 / run.world
    return replace(load, block=int(load.block * here), rest=int(load.rest * here) + _GATHERED * whole.block)


def can_host(run: Run, strategy: Strategy) -> bool:
    """Whether all weights may be trained in host memory (``host_training``): by one process, with AdamW.

    An average of the weights would be one more copy.
    """
    settings = run.settings
    alone = strategy == "ddp" and run.world == 1
    return run.method.full and alone and settings.optimizer == "adamw" and not settings.ema


def bytes_a_weight(strategy: Strategy, world: int) -> float:
    """GPU memory of a trained weight, its gradient and AdamW's two moments, for each process.

    DDP holds all in fp32. DeepSpeed computes with a copy in half precision, as its gradients are,
    and spreads what it holds in fp32 (12 bytes) over the processes, or has it on the host;
    stages 2 and 3 spread gradients, too, and stage 3 the copy (ZeRO, arXiv 1910.02054, section 5).
    """
    if strategy == "ddp":
        return 16.0
    spread = 0.0 if strategy.endswith("-offload") else 12.0
    stage = STAGE[strategy]
    if stage == 3:
        return (0.0 if strategy == "zero3-offload" else 4.0 + spread) / world
    return 2.0 + (2.0 if stage == 1 else 2.0 / world) + spread / world


def trained_weights(run: Run) -> int:
    """How many weights a run trains, from its checkpoint's config."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    config = dict(run.checkpoint.transformer_config)
    with torch.device("meta"):
        without, one = (
            run.method.trained(CogVideoXTransformer3DModel.from_config(config | {"num_layers": layers}))
            for layers in (0, 1)
        )
    return without + config["num_layers"] * (one - without)
