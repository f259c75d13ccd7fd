"""What can go wrong inside a step: losses that are not finite, memory that is not enough."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cogcommon.errors import CogError, RunError

from .order import Ints
from .run import Run
from .step.demand import Demand, can_host, demand
from .step.plan import gib
from .zero_config import Strategy

if TYPE_CHECKING:
    import torch

    from .strategy import Runtime

_T = TypeVar("_T")
_SHOWN = 8  # samples named in one message


class PeerFailed(RunError):
    """Another rank has an error, and says it."""

    def __init__(self) -> None:
        super().__init__("another process of the run has failed")


def together(runtime: Runtime, act: Callable[[], _T]) -> _T:
    """Do what may fail on one rank alone; when it does, all ranks stop together, and none waits for ever.

    Raises:
        CogError: this rank's error, or `PeerFailed`.
    """
    results: list[_T] = []
    fault: CogError | None = None
    try:
        results.append(act())
    except CogError as error:
        fault = error
    if runtime.agree(int(fault is not None)):
        raise fault or PeerFailed()
    return results[0]


def not_finite(losses: Sequence[float], places: Ints, run: Run) -> list[str]:
    """The samples whose loss is not finite, as ``key in shard``.

    Args:
        losses: of all ranks, rank by rank.
        places: indices of their samples, in the same order.
    """
    named = []
    for loss, index in zip(losses, places, strict=True):
        if not math.isfinite(loss):
            extent = run.shards.extent(int(index))
            named.append(f"{extent.key} in {run.shards.shards[extent.shard].shown} ({loss})")
    return named


def listed(named: Sequence[str]) -> str:
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + more


def stop_for(named: Sequence[str], step: int, main: bool) -> RunError:
    """The error of a loss that is not finite; all ranks raise one, rank 0 says it."""
    if not main:
        return PeerFailed()
    return RunError(
        f"the loss of {len(named)} sample{'s' * (len(named) > 1)} is not finite",
        where=f"step {step}: {listed(named)}",
        fix="`cogprep verify` tells whether the samples are whole; --on-nonfinite skip goes on without them; "
        "if it happens everywhere, a lower --lr or --precision bf16",
    )


def out_of_memory(error: torch.OutOfMemoryError, run: Run) -> RunError:
    """Which setting lowers the peak, and to what, by the arithmetic that the run was planned with."""
    import torch

    settings = run.settings
    card = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else sys.maxsize
    now = demand(run, card=card)
    changes: dict[str, Demand] = {}
    if settings.batch_size > 1:
        same = f"--batch-size 1 --accumulate {settings.accumulate * settings.batch_size}"
        changes[f"{same} (the same global batch)"] = demand(run, card=card, batch=1)
    if settings.memory != "low":
        changes["--memory low"] = demand(run, card=card, memory="low")
    if settings.memory == "fast":
        changes["--memory auto"] = demand(run, card=card, memory="auto")
    if can_host(run, "ddp") and run.strategy != "ddp":
        changes["--strategy ddp --memory low"] = demand(run, card=card, strategy="ddp", memory="low")
    elif run.method.full and not can_host(run, "ddp") and run.strategy != "zero3-offload":
        offload: Strategy = "zero3-offload" if run.strategy == "zero2-offload" else "zero2-offload"
        changes[f"--strategy {offload}"] = demand(run, card=card, strategy=offload)
    advice = []
    for change, then in changes.items():
        if then.peak < now.peak:
            locks = f", and {gib(then.locked)} of host memory" if then.locked > now.locked else ""
            advice.append(f"{change}: about {gib(then.peak)} instead of {gib(now.peak)}{locks}")
    return RunError(
        "out of GPU memory",
        where=str(error).splitlines()[0],
        fix="; or ".join(advice) or "a smaller --resolution when encoding, or a GPU with more memory",
    )
