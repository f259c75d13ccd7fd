"""What a run would take of the GPU and the host under each strategy and memory setting, before it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

from ..blocks.plan import USABLE, BlockPlan, Load, Memory, choose_plan
from ..distributed.zero_config import STAGE, Strategy, can_spread, deepspeed_config
from ..settings import Optimizer
from .cost import Speed, plan_seconds

if TYPE_CHECKING:
    from cogcommon.model.checkpoint import Checkpoint
    from cogcommon.model.device import Precision
    from cogcommon.model.families import Resolution

    from ..model.method import Method
    from ..settings import TrainSettings


class Trains(Protocol):
    """What is to be trained: a `Run`, or an `Intent` for which there need be no shards yet."""

    @property
    def settings(self) -> TrainSettings: ...
    @property
    def method(self) -> Method: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def buckets(self) -> tuple[Resolution, ...]: ...
    @property
    def held_out_buckets(self) -> tuple[Resolution, ...]: ...
    @property
    def strategy(self) -> Strategy: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def world(self) -> int: ...


@dataclass(frozen=True)
class Intent:
    """A run of which only a model and sizes are known."""

    settings: TrainSettings
    method: Method
    checkpoint: Checkpoint
    buckets: tuple[Resolution, ...]
    strategy: Strategy
    precision: Precision
    world: int
    held_out_buckets: tuple[Resolution, ...] = ()


PROCESS = 4 << 30  # bytes of host memory of a process itself: Python, torch, CUDA and the samples
# Bytes that an optimizer holds for a weight. AdamW: two moments. In 8 bits: two, with a scale in fp32 for each 256 of
# them. Prodigy: two moments, the sum of gradients and the weight as it was (none for LoRA's B, which began at zero).
STATES: Mapping[Optimizer, float] = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "prodigy": 16.0}
_MEMORIES: tuple[Memory, ...] = ("auto", "fast", "low")
_STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
_SUB_GROUP = 10**9  # weights that ZeRO-3 steps at once (sub_group_size)
# Bytes of a weight in each piece of host memory that DeepSpeed locks.
_LOCKED: Mapping[str, tuple[int, ...]] = {"zero2-offload": (4, 4, 2), "zero3-offload": (2, 4, 2)}
_LIVE = 10**9  # weights that ZeRO-3 holds whole at most (stage3_max_live_parameters, where the passes turn round)


@dataclass(frozen=True)
class Estimate:
    """Bytes under one choice of settings."""

    strategy: Strategy
    memory: Memory
    plan: BlockPlan
    load: Load
    offloaded: int = 0  # bytes of host memory that DeepSpeed takes, or the masters trained there, for each process
    apart: int = 0  # the most GPU memory that is taken outside the forward and the backward pass of training
    loading: int = 0  # bytes of host memory for the checkpoint's weights before they are moved, for each process
    ending: int = 0  # bytes of host memory beside what training holds, for the export, by one process

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
        """Of host memory while it trains, for each process, but for what a process takes itself."""
        return self.locked + self.offloaded

    def host_at_most(self, processes: int) -> int:
        """Of host memory at its worst moment, by all processes on one host: loading, training or exporting."""
        training = processes * self.host
        return processes * PROCESS + max(processes * self.loading, training + self.ending)


def estimate(
    run: Trains, *, card: int = sys.maxsize, host: int = sys.maxsize, speed: Speed | None = None,
    strategy: Strategy | None = None, memory: Memory | None = None, batch: int | None = None, compiled: bool = True,
) -> Estimate:  # fmt: skip
    """What a run needs in its largest bucket.

    Args:
        card: bytes of the GPU's memory.
        host: bytes of host memory for each process, before anything is loaded.
        speed: of the GPU and its link; without it, copies count as hidden behind the computation.
        strategy, memory, batch: other than the run's own.
    """
    strategy, memory = strategy or run.strategy, memory or run.settings.memory
    load = load_of(run, strategy=strategy, batch=batch or run.settings.batch_size)
    weights, full = trained_weights(run), run.method.full
    loading, theirs = _loading(run, strategy), int(offloaded_bytes(weights / run.world, strategy))
    left = host
    if host < sys.maxsize:  # as `install` will find it: the weights are loaded, and frozen ones give up their copy
        left = max(0, host - PROCESS - theirs - loading + min(loading, load.layers * load.block))
    cost = partial(plan_seconds, load, speed=speed, full=full, fp16=run.precision == "fp16") if speed else None
    plan = choose_plan(memory, load, free=card, host_free=left, compiled=compiled, cost=cost)
    apart = bytes_apart(weights, strategy, run.world, run.settings.optimizer, size=_size(run))
    validating = max((plan.evaluating(load, _load(run, bucket, batch=1)) for bucket in run.held_out_buckets), default=0)
    return Estimate(
        strategy, memory, plan, load,
        offloaded=4 * weights * plan.train_on_cpu // load.layers + theirs,
        apart=max(int(apart), validating),
        loading=loading,
        ending=_ending(run, plan, strategy),
    )  # fmt: skip


def choices(run: Trains, card: int, host: int = sys.maxsize, speed: Speed | None = None) -> list[Estimate]:
    """Every strategy and memory setting that a run may have, in the order in which they are advised.

    Strategies from fast to small, first the default of --memory; what comes to the same is left out.

    Args:
        card, host, speed: as in `estimate`.
    """
    found: list[Estimate] = []
    for strategy, memory in product(_STRATEGIES, _MEMORIES):
        if not _possible(run, strategy):
            continue
        needs = estimate(run, card=card, host=host, speed=speed, strategy=strategy, memory=memory)
        if not any((needs.strategy, needs.plan) == (other.strategy, other.plan) for other in found):
            found.append(needs)
    return found


def _possible(run: Trains, strategy: Strategy) -> bool:
    if run.world == 1 and strategy in ("zero1", "zero2", "zero3"):
        return False  # nothing to spread over
    return strategy == "ddp" or (not run.settings.ema and can_spread(run.settings.optimizer, strategy))


def _size(run: Trains) -> int:
    """Bytes of a number as computed."""
    return 4 if run.precision == "fp32" else 2


def _load(run: Trains, bucket: Resolution, *, batch: int) -> Load:
    """The untrained model on a bucket."""
    return Load.of(
        run.checkpoint.transformer_config, run.checkpoint.family.tokens(bucket), batch=batch, size=_size(run), trained=0
    )


def _loading(run: Trains, strategy: Strategy) -> int:
    """Host memory of the checkpoint's weights as `Method.weight_dtype` has them loaded, for each process."""
    base = _load(run, run.buckets[0], batch=1)
    whole = base.layers * base.block + base.rest
    return whole * 4 // _size(run) if run.method.full and strategy == "ddp" else whole


def _ending(run: Trains, plan: BlockPlan, strategy: Strategy) -> int:
    """Host memory for the export beside what training holds, by rank 0 (`Method.export`).

    What was trained is there as it is written, and again as it is loaded back; what was on the GPU makes room for that.
    """
    weights, size = trained_weights(run), _size(run)
    if run.method.full:
        released = (
            4 * weights * (len(plan.checkpointing) - plan.train_on_cpu) // len(plan.checkpointing)
            if strategy == "ddp"
            else 0
        )
        return 2 * size * weights + released
    base = _loading(run, strategy)
    return base + 8 * weights + (base if strategy == "ddp" and not plan.swap_blocks else 0)


def load_of(run: Trains, *, strategy: Strategy | None = None, batch: int | None = None) -> Load:
    """The load of a run in its largest bucket."""
    strategy = strategy or run.strategy
    config, settings = run.checkpoint.transformer_config, run.settings
    held = bytes_a_weight(strategy, run.world, settings.optimizer, ema=settings.ema > 0, size=_size(run))
    loads = [
        Load.of(
            config,
            run.checkpoint.family.tokens(bucket),
            batch=batch or run.settings.batch_size,
            size=_size(run),
            trained=int(trained_weights(run) * held),
            arriving=4 * trained_weights(run) if _arrive(run, strategy) else 0,
            frozen=not run.method.full,
            can_swap=strategy == "ddp",
            accumulate=run.settings.accumulate if can_train_on_cpu(run, strategy) else None,
        )
        for bucket in run.buckets
    ]
    load = max(loads, key=lambda load: load.activation)
    if STAGE[strategy] < 3:
        return load
    size, whole = _size(run), _load(run, run.buckets[0], batch=1)
    zero = _zero(run, strategy)
    live = min(int(zero["stage3_max_live_parameters"]) * size, whole.layers * whole.block + whole.rest)
    here = 0 if strategy == "zero3-offload" else 1 / run.world
    # Gradients on their way: a block's as they come, a bucket, its copy in parts, and this process's part of the sum.
    trained, bucket = trained_weights(run), int(zero["reduce_bucket_size"])
    exchanged = trained / whole.layers + bucket + min(trained, bucket) * (1 + 1 / run.world)
    return replace(load, block=int(load.block * here), rest=int(load.rest * here) + live + int(exchanged * size))


def _zero(run: Trains, strategy: Strategy) -> Mapping[str, Any]:
    """DeepSpeed's settings, with the user's file in them where it is about this strategy."""
    settings = run.settings if strategy == run.strategy else replace(run.settings, deepspeed=None)
    config = deepspeed_config(settings, strategy, run.precision, run.world)
    return {"stage3_max_live_parameters": _LIVE, **config["zero_optimization"]}


def can_train_on_cpu(run: Trains, strategy: Strategy) -> bool:
    """Whether all weights may be trained in host memory (`CpuTraining`): by one process, with AdamW.

    An EMA of the weights would be one more copy.
    """
    settings = run.settings
    alone = strategy == "ddp" and run.world == 1
    return run.method.full and alone and settings.optimizer == "adamw" and not settings.ema


def _arrive(run: Trains, strategy: Strategy) -> bool:
    """Whether gradients are as large as the weights and there in the backward pass alone; DDP's buckets stay."""
    return run.method.full and strategy == "ddp" and run.world == 1 and run.settings.accumulate == 1


def state_bytes(optimizer: Optimizer, strategy: Strategy) -> float:
    """`STATES`; at most. torchao keeps 32 bits of a piece whose length is no multiple of 256, and under ZeRO a
    process's part is one piece of any length (bitsandbytes keeps 8)."""
    return max(STATES[optimizer], 0 if strategy == "ddp" else STATES["adamw"])


def bytes_a_weight(
    strategy: Strategy, world: int, optimizer: Optimizer = "adamw", *, ema: bool = False, size: int = 2
) -> float:
    """GPU memory of a trained weight, its gradient and the optimizer's states in the backward pass, for each process.

    DDP holds all in fp32, and the moving average beside it. DeepSpeed computes with a copy in half precision, as its
    gradients are, and spreads gradients and what it holds in fp32 (4 bytes and the states) over the processes, or has
    it on the host; stage 3 spreads the copy, too (ZeRO, arXiv 1910.02054, section 5; stage 1 lets go of gradients as
    stage 2 does). Offloaded gradients leave as soon as a bucket is full of them.

    Args:
        size: bytes of a number as computed.
    """
    states = state_bytes(optimizer, strategy)
    if strategy == "ddp":
        return 8 + states + 4 * ema
    if strategy.endswith("-offload"):
        return size if STAGE[strategy] == 2 else 0
    if strategy == "zero3":
        return (2 * size + 4 + states) / world
    return size + (size + 4 + states) / world


def bytes_apart(
    weights: int, strategy: Strategy, world: int, optimizer: Optimizer = "adamw", *, size: int = 2
) -> float:
    """GPU memory for the trained weights at DeepSpeed's worst moment without activations, for each process.

    At the start all weights are on each GPU as computed, for stages 1 and 2 a second time when they are made
    one piece, for stage 3 with the process's part. In the step a process's part of the gradients is there as it
    came, made one piece and in fp32 (2 + 2 + 4 bytes in half precision); under stage 3 that is done for a billion
    weights at a time. (DeepSpeed 0.19, runtime/zero; test_live_bytes counts it.)
    """
    part, states = weights / world, state_bytes(optimizer, strategy)
    step: dict[Strategy, float] = {"zero3": (2 * size + 4 + states) * part + (size + 4) * min(_SUB_GROUP, part)}
    step |= dict.fromkeys(("zero1", "zero2"), size * weights + (2 * size + 8 + states) * part)
    start: float = {0: 0, 1: 2, 2: 2, 3: 1}[STAGE[strategy]] * size * weights
    if strategy == "zero3":
        start += size * part
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


def trained_weights(run: Trains) -> int:
    """How many weights a run trains, from its checkpoint's config."""
    from ..model.method import outline

    return run.method.trained(outline(run.checkpoint.transformer_config))


assert set(_STRATEGIES) == set(STAGE)
