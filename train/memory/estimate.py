"""What a run would take of the GPU and the host under each strategy and memory setting, before it is loaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

from ..blocks.load import Load
from ..blocks.plan import USABLE, BlockPlan, choose_plan
from ..data.batches import bytes_ahead
from ..distributed.strategies import STRATEGIES
from ..distributed.zero_config import can_spread, deepspeed_config
from ..settings.training import LoraSettings, Memory, Optimizer, Strategy
from .cost import Speed, plan_cost
from .host import HostNeeds, export_bytes, itself, offloaded_bytes
from .weights import trained_weights

if TYPE_CHECKING:
    from cogcommon.model.checkpoint import Checkpoint
    from cogcommon.model.device import Precision
    from cogcommon.model.families import Resolution

    from ..data.prompts import Prompt
    from ..model.method import Method
    from ..settings.training import TrainSettings


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
    def validated_buckets(self) -> tuple[Resolution, ...]: ...
    @property
    def prompts(self) -> Sequence[Prompt]: ...
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
    validated_buckets: tuple[Resolution, ...] = ()
    prompts: tuple[Prompt, ...] = ()


# Bytes that an optimizer holds for a weight. AdamW: two moments. In 8 bits: two, with a scale in fp32 for each 256 of
# them. Prodigy: two moments, the sum of gradients and the weight as it was (none for LoRA's B, which began at zero).
STATES: Mapping[Optimizer, float] = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "prodigy": 16.0}
_MEMORIES: tuple[Memory, ...] = ("auto", "fast", "low")
_SUB_GROUP = 10**9  # weights that ZeRO-3 steps at once (sub_group_size)
_LIVE = 10**9  # weights that ZeRO-3 holds whole at most (stage3_max_live_parameters, where the passes turn round)


@dataclass(frozen=True)
class Estimate:
    """Bytes under one choice of settings."""

    strategy: Strategy
    memory: Memory
    plan: BlockPlan
    load: Load
    needs: HostNeeds
    apart: int = 0  # the most GPU memory that is taken outside the forward and the backward pass of training

    @property
    def peak(self) -> int:
        """Of GPU memory, for each process."""
        return max(self.plan.peak(self.load), self.apart) if self.needs.gpu else 0

    def fits(self, card: int) -> bool:
        """Whether it leaves of a GPU's bytes what else is needed there."""
        return self.peak <= USABLE * card

    @property
    def host(self) -> int:
        """Of host memory while it trains, for each process, but for what a process takes itself."""
        return self.needs.training(self.plan)

    def host_at_most(self, processes: int) -> int:
        """Of host memory at its worst moment, by all processes on one host: loading, training or exporting."""
        return self.needs.at_most(self.plan, processes)


def estimate(
    run: Trains, *, card: int = sys.maxsize, host: int | None = None, processes: int = 1, speed: Speed | None = None,
    strategy: Strategy | None = None, memory: Memory | None = None, batch: int | None = None, compiled: bool = True,
    gpu: bool = True,
) -> Estimate:  # fmt: skip
    """What a run needs in its largest bucket.

    Args:
        card: bytes of the GPU's memory.
        host: bytes of the host's memory, before anything is loaded; None: as much as it takes.
        processes: of the run, on that host.
        speed: of the GPU and its link; without it, copies count as hidden behind the computation.
        strategy, memory, batch: other than the run's own.
        gpu: it trains on GPUs.
    """
    strategy, memory = strategy or run.strategy, memory or run.settings.memory
    needs = host_needs(run, gpu=gpu, strategy=strategy, batch=batch)
    load = needs.load
    cost = plan_cost(run, load, speed) if speed else None

    def fits_host(plan: BlockPlan) -> bool:
        return host is None or needs.fits(plan, host, processes)

    plan = choose_plan(
        memory, load, free=card, fits_host=fits_host, compiled=compiled and gpu, gpu=gpu, cost=cost
    )  # fmt: skip
    validating = max(
        (plan.evaluating(load, _load(run, bucket, batch=1)) for bucket in run.validated_buckets), default=0
    )
    return Estimate(strategy, memory, plan, load, needs, apart=max(_apart(run, strategy), validating))


def host_needs(
    run: Trains, *, gpu: bool, strategy: Strategy | None = None, batch: int | None = None
) -> HostNeeds:  # fmt: skip
    """What a run takes of host memory under any plan.

    Args:
        gpu: it trains on GPUs.
        strategy, batch: other than the run's own.
    """
    strategy, batch = strategy or run.strategy, batch or run.settings.batch_size
    load = load_of(run, strategy=strategy, batch=batch)
    weights, full, loading = trained_weights(run), run.method.full, _loading(run, strategy)
    exported, released = export_bytes(
        loading, weights, size=_size(run), full=full, sharded=strategy != "ddp", keep_best=run.settings.keep_best
    )
    return HostNeeds(
        load=load,
        gpu=gpu,
        full=full,
        itself=itself(gpu=gpu, strategy=strategy),
        batches=max(bytes_ahead(run.checkpoint, bucket, batch=batch, pin=gpu) for bucket in run.buckets),
        loading=loading,
        offloaded=int(offloaded_bytes(weights / run.world, strategy)),
        masters=4 * weights // load.layers if full else 0,
        apart=0 if gpu else _apart(run, strategy),
        exported=exported,
        released=released,
    )


def _apart(run: Trains, strategy: Strategy) -> int:
    return int(bytes_apart(trained_weights(run), strategy, run.world, run.settings.optimizer, size=_size(run)))


def choices(
    run: Trains, card: int, host: int | None = None, processes: int = 1, speed: Speed | None = None, *, gpu: bool = True
) -> list[Estimate]:  # fmt: skip
    """Every strategy and memory setting that a run may have, in the order in which they are advised.

    Strategies from fast to small, first the default of --memory; what comes to the same is left out.

    Args:
        card, host, processes, speed, gpu: as in `estimate`.
    """
    found: list[Estimate] = []
    for strategy, memory in product(STRATEGIES, _MEMORIES):
        if not _possible(run, strategy):
            continue
        needs = estimate(
            run, card=card, host=host, processes=processes, speed=speed, strategy=strategy, memory=memory, gpu=gpu
        )  # fmt: skip
        if not any((needs.strategy, needs.plan) == (other.strategy, other.plan) for other in found):
            found.append(needs)
    return found


def _possible(run: Trains, strategy: Strategy) -> bool:
    spread = STRATEGIES[strategy]
    if run.world == 1 and spread.stage and not spread.offloads:
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
    whole = _load(run, run.buckets[0], batch=1).whole
    return whole * 4 // _size(run) if run.method.full and strategy == "ddp" else whole


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
            rank=settings.rank * len(settings.target_modules) if isinstance(settings, LoraSettings) else 0,
            latents=math.prod(run.checkpoint.family.padded_latent(bucket)),
        )
        for bucket in run.buckets
    ]
    load = max(loads, key=lambda load: load.activation)
    if STRATEGIES[strategy].whole:
        return load
    size, base = _size(run), _load(run, run.buckets[0], batch=1)
    zero = _zero(run, strategy)
    live = min(int(zero["stage3_max_live_parameters"]) * size, base.whole)
    here = 0 if STRATEGIES[strategy].offloads_weights else 1 / run.world
    # Gradients on their way: a block's as they come, a bucket, its copy in parts, and this process's part of the sum.
    trained, bucket = trained_weights(run), int(zero["reduce_bucket_size"])
    exchanged = trained / base.layers + bucket + min(trained, bucket) * (1 + 1 / run.world)
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
    states, spread = STATES[optimizer], STRATEGIES[strategy]
    if not spread.stage:
        return 8 + states + 4 * ema
    if spread.offloads:
        return size if spread.whole else 0
    if not spread.whole:
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
    part, states, spread = weights / world, STATES[optimizer], STRATEGIES[strategy]
    if not spread.stage:
        return 0
    start: float = (2 if spread.whole else 1) * size * weights
    if spread.offloads:
        return start
    if spread.whole:
        return max(start, size * weights + (2 * size + 8 + states) * part)
    return max(start + size * part, (2 * size + 4 + states) * part + (size + 4) * min(_SUB_GROUP, part))
