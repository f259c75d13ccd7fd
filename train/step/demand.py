"""What a run would take of the GPU and the host under each strategy and memory setting, before it is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from ..zero_config import STAGE, Strategy, deepspeed_config
from .plan import USABLE, Load, Memory, Plan, choose

if TYPE_CHECKING:
    from ..method import Method
    from ..run import Run

_SIZES = {"fp32": 4}  # bytes of a number as computed; half precision else
_MEMORIES: tuple[Memory, ...] = ("auto", "fast", "low")
_STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
_SUB_GROUP = 10**9  # weights that ZeRO-3 steps at once (sub_group_size)
# Bytes of a weight in each piece of host memory that DeepSpeed locks.
_LOCKED: Mapping[str, tuple[int, ...]] = {"zero2-offload": (4, 4, 2), "zero3-offload": (2, 4, 2)}
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
    plan = choose(memory, load, free=card, host_free=sys.maxsize, compiled=compiled)
    weights = trained_weights(run)
    masters = 4 * weights * plan.train_on_host // load.layers
    offloaded = masters + int(offloaded_bytes(weights / run.world, strategy))
    return Demand(strategy, memory, plan, load, offloaded, int(bytes_apart(weights, strategy, run.world)))


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
            arriving=4 * trained_weights(run) if _arrive(run, strategy) else 0,
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
    zero = _zero(run, strategy)
    live = min(int(zero["stage3_max_live_parameters"]) * size, whole.layers * whole.block + whole.rest)
    here = 0 if strategy == "zero3-offload" else 1 / run.world
    # Gradients on their way: a block's as they come, a bucket, its copy in parts, and this process's part of the sum.
    trained, bucket = trained_weights(run), int(zero["reduce_bucket_size"])
    exchanged = trained / whole.layers + bucket + min(trained, bucket) * (1 + 1 / run.world)
    return replace(load, block=int(load.block * here), rest=int(load.rest * here) + live + int(exchanged * size))


def _zero(run: Run, strategy: Strategy) -> Mapping[str, Any]:
    """DeepSpeed's settings, with the user's file in them where it is about this strategy."""
    settings = run.settings if strategy == run.strategy else replace(run.settings, deepspeed=None)
    config = deepspeed_config(settings, strategy, run.precision, run.world)
    return {"stage3_max_live_parameters": _LIVE, **config["zero_optimization"]}


def can_host(run: Run, strategy: Strategy) -> bool:
    """Whether all weights may be trained in host memory (``host_training``): by one process, with AdamW.

    An average of the weights would be one more copy.
    """
    settings = run.settings
    alone = strategy == "ddp" and run.world == 1
    return run.method.full and alone and settings.optimizer == "adamw" and not settings.ema


def _arrive(run: Run, strategy: Strategy) -> bool:
    """Whether gradients are as large as the weights and there in the backward pass alone; DDP's buckets stay."""
    return run.method.full and strategy == "ddp" and run.world == 1 and run.settings.accumulate == 1


def bytes_a_weight(strategy: Strategy, world: int) -> float:
    """GPU memory of a trained weight, its gradient and AdamW's two moments in the backward pass, for each process.

    DDP holds all in fp32. DeepSpeed computes with a copy in half precision, as its gradients are,
    and spreads gradients and what it holds in fp32 (12 bytes) over the processes, or has it on the host; stage 3
    spreads the copy, too (ZeRO, arXiv 1910.02054, section 5; stage 1 lets go of gradients as stage 2 does).
    Offloaded gradients leave as soon as a bucket is full of them.
    """
    if strategy == "ddp":
        return 16.0
    if strategy.endswith("-offload"):
        return 2.0 if STAGE[strategy] == 2 else 0.0
    return 16.0 / world if strategy == "zero3" else 2.0 + 14.0 / world


def bytes_apart(weights: int, strategy: Strategy, world: int) -> float:
    """GPU memory for the trained weights at DeepSpeed's worst moment without activations, for each process.

    At the start all weights are on each GPU in half precision, for stages 1 and 2 a second time when they are made
    one piece, for stage 3 with the process's part. In the step a process's part of the gradients is there as it
    came, made one piece and in fp32 (2 + 2 + 4 bytes); under stage 3 that is done for a billion weights at a time.
    (DeepSpeed 0.19, runtime/zero; test_live_bytes counts it.)
    """
    part = weights / world
    step: dict[Strategy, float] = {"zero3": 16 * part + 6 * min(_SUB_GROUP, part)}
    step |= dict.fromkeys(("zero1", "zero2"), 2 * weights + 20 * part)
    start = {0: 0.0, 1: 4.0 * weights, 2: 4.0 * weights, 3: 2.0 * weights}[STAGE[strategy]]
    if strategy == "zero3":
        start += 2 * part
    return max(start, step.get(strategy, 0.0))


def host_bytes_a_weight(strategy: Strategy) -> int:
    """Host memory of a weight that DeepSpeed offloads, for the process whose part it is in.

    An fp32 master, its gradient and two moments, and a copy in half precision; under stage 3 gradients as they
    came, too.
    """
    return {"zero2-offload": 18, "zero3-offload": 20}.get(strategy, 0)


def offloaded_bytes(weights: float, strategy: Strategy) -> float:
    """Host memory that DeepSpeed takes for a process's part of the trained weights.

    Some of it is in one page-locked piece each, for which torch takes the next power of two: under stage 2 all but the
    moments (122 GiB for 5B, where 93 would do), under stage 3 copies and gradients.
    """
    if not weights or strategy not in _LOCKED:
        return host_bytes_a_weight(strategy) * weights
    locked = _LOCKED[strategy]
    pieces = sum(1 << int(size * weights - 1).bit_length() for size in locked)
    return (host_bytes_a_weight(strategy) - sum(locked)) * weights + pieces


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
