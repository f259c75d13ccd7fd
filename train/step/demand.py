"""What a run would take of the GPU and the host under each strategy and memory setting, before it is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

from ..zero_config import STAGE, Strategy
from .plan import USABLE, Load, Memory, Plan, choose

if TYPE_CHECKING:
    from ..method import Method
    from ..run import Run

_SIZES = {"fp32": 4}  # bytes of a number as computed; half precision else
_MEMORIES: tuple[Memory, ...] = ("auto", "fast", "low")
_STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
_LIVE = 10**9  # weights that ZeRO-3 holds whole at most (stage3_max_live_parameters, where the passes turn round)


@dataclass(frozen=True)
class Demand:
    """Bytes under one choice of settings."""

    strategy: Strategy
    memory: Memory
    plan: Plan
    load: Load
    offloaded: int = 0  # bytes of host memory that DeepSpeed takes, or the masters trained there, for each process
    apart: int = 0  # the most GPU memory that DeepSpeed takes outside the forward and the backward pass

    @property
    def peak(self) -> int:
        """Of GPU memory, for each process."""
        return max(self.plan.peak(self.load), self.apart)

    def fits(self, card: int) -> bool:
        """Whether it leaves of a GPU's bytes what else is needed there."""
        return self.peak <= USABLE * card

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
    if STAGE[strategy] < 3:
        plan = choose(memory, load, free=card, host_free=sys.maxsize, compiled=compiled)
    else:
        plan = diffusers_plan(memory, load.layers)
    weights = trained_weights(run)
    offloaded = 4 * weights if plan.train_on_host else int(offloaded_bytes(weights / run.world, strategy))
    return Demand(strategy, memory, plan, load, offloaded, int(weights * bytes_apart(strategy, run.world)))


def choices(run: Run, card: int) -> list[Demand]:
    """Every strategy and memory setting that a run may have, in the order in which they are advised.

    Strategies from fast to small, first the default of --memory; what comes to the same is left out.
    """
    found: list[Demand] = []
    for strategy, memory in product(_STRATEGIES, _MEMORIES):
        if not _possible(run, strategy):
            continue
        needs = demand(run, card=card, strategy=strategy, memory=memory)
        if not any((needs.strategy, needs.plan) == (other.strategy, other.plan) for other in found):
            found.append(needs)
    return found


def _possible(run: Run, strategy: Strategy) -> bool:
    if run.world == 1 and strategy in ("zero1", "zero2", "zero3"):
        return False  # nothing to spread over
    on_host = strategy.endswith("-offload")
    return (strategy == "ddp" or not run.settings.ema) and (run.settings.optimizer == "adamw" or not on_host)


def diffusers_plan(memory: Memory, layers: int) -> Plan:
    """How diffusers' own blocks are run, under ZeRO-3; what they keep waits in host memory under low."""
    return Plan(keep=("all" if memory == "fast" else "inputs",) * layers, park=memory == "low")


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
    size = _SIZES.get(run.precision, 2)
    whole = Load.of(config, run.shards.buckets[0], batch=1, size=size, trained=0)
    live = min(_LIVE * size, whole.layers * whole.block + whole.rest)
    here = 0 if strategy == "zero3-offload" else 1 / run.world
    return replace(load, block=int(load.block * here), rest=int(load.rest * here) + live)


def can_host(run: Run, strategy: Strategy) -> bool:
    """Whether all weights may be trained in host memory (``host_training``): by one process, with AdamW.

    An average of the weights would be one more copy.
    """
    settings = run.settings
    alone = strategy == "ddp" and run.world == 1
    return run.method.full and alone and settings.optimizer == "adamw" and not settings.ema


def bytes_a_weight(strategy: Strategy, world: int) -> float:
    """GPU memory of a trained weight, its gradient and AdamW's two moments in the backward pass, for each process.

    DDP holds all in fp32. DeepSpeed computes with a copy in half precision, as its gradients are,
    and spreads what it holds in fp32 (12 bytes) over the processes, or has it on the host;
    stages 2 and 3 spread gradients, too, and stage 3 the copy (ZeRO, arXiv 1910.02054, section 5).
    Offloaded gradients leave as soon as a bucket is full of them.
    """
    if strategy == "ddp":
        return 16.0
    stage = STAGE[strategy]
    if strategy.endswith("-offload"):
        return 2.0 if stage == 2 else 0.0
    if stage == 3:
        return 16.0 / world
    return 2.0 + (2.0 if stage == 1 else 2.0 / world) + 12.0 / world


def bytes_apart(strategy: Strategy, world: int) -> float:
    """GPU memory a trained weight at DeepSpeed's worst moment without activations, for each process.

    Stages 1 and 2: the step, where a process's part of the gradients is there as it came, flattened, and in
    fp32 (2 + 2 + 4 bytes), beside the copy and 12 bytes. Stage 2 offloaded: the start, where that part
    of the copy is cloned on its way to the host. (DeepSpeed 0.19, runtime/zero/stage_1_and_2.py.)
    """
    if strategy in ("zero1", "zero2"):
        return 2.0 + 20.0 / world + (2.0 if strategy == "zero1" else 0.0)
    return 2.0 + 2.0 / world if strategy == "zero2-offload" else 0.0


def offloaded_bytes(weights: float, strategy: Strategy) -> float:
    """Host memory that DeepSpeed takes for a process's part of the trained weights.

    fp32 masters, gradients and two moments, and a copy in half precision. Stage 2 has all but the moments in one
    page-locked piece each, for which torch takes the next power of two: 122 GiB for 5B, where 93 would do.
    """
    if strategy == "zero3-offload":
        return 18 * weights
    if strategy == "zero2-offload":
        return 8 * weights + sum(_power_of_two(size * weights) for size in (4, 4, 2))
    return 0.0


def _power_of_two(size: float) -> int:
    return 1 << (int(size) - 1).bit_length()


def trained_weights(run: Run) -> int:
    """How many weights a run trains, from its checkpoint's config."""
    return _trained_weights(run.method, json.dumps(dict(run.checkpoint.transformer_config)))  # type: ignore[arg-type]


@lru_cache
def _trained_weights(method: Method, config_json: str) -> int:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    config = json.loads(config_json)
    with torch.device("meta"):
        without, one = (
            method.trained(CogVideoXTransformer3DModel.from_config(config | {"num_layers": layers}))
            for layers in (0, 1)
        )
    return without + config["num_layers"] * (one - without)


assert set(_STRATEGIES) == set(STAGE)
