"""Host memory that each process of a run takes, moment by moment, under any plan: the one place that adds it up.

It loads the weights, trains, and exports; beside that it is itself, and its loader holds batches. On a GPU what is
trained there is not counted; on CPUs all of the step is here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks.load import Load
from ..blocks.plan import BlockPlan
from ..distributed.strategies import STRATEGIES
from ..settings.training import Strategy

# A process itself. On CPUs: Python, torch, diffusers and what they import, all that no other process shares. On a GPU
# CUDA's libraries and context, too: runs of measured.jsonl held 2.3 to 3.5 GiB each that no plan explains.
ITSELF, ITSELF_GPU = 400 << 20, 7 << 29
_DEEPSPEED = 80 << 20  # what it imports
_LOCKABLE = 0.8  # of what is left; what is locked cannot be swapped


@dataclass(frozen=True)
class HostNeeds:
    """Bytes of host memory for each process of a run, but for the export's, which one process of a host takes.

    ``itself`` is the process, ``batches`` its loader's, ``loading`` the checkpoint's weights before they are moved,
    ``offloaded`` what DeepSpeed takes; ``masters`` are those of one block, where all weights are trained and may be in
    host memory; ``apart`` is what DeepSpeed takes on CPUs before and after the passes. ``exported`` are the copies that
    the export makes, ``released`` what comes back from the GPU to make room for them there.
    """

    load: Load
    gpu: bool
    full: bool  # all weights are trained
    itself: int
    batches: int
    loading: int
    offloaded: int = 0
    masters: int = 0
    apart: int = 0
    exported: int = 0
    released: int = 0

    def training(self, plan: BlockPlan) -> int:
        """While it trains, beside itself and its batches."""
        masters = self.masters * plan.train_on_cpu
        return self.offloaded + (plan.host(self.load) + masters if self.gpu else max(self.apart, plan.alone(self.load)))

    def ending(self, plan: BlockPlan) -> int:
        """By the process that exports, beside itself and all that `resting` counts."""
        here = plan.train_on_cpu / self.load.layers if self.full else float(plan.swap_blocks)
        return self.exported + (int(self.released * (1 - here)) if self.gpu else 0)

    def resting(self, plan: BlockPlan) -> int:
        """What training holds between two steps."""
        return self.training(plan) if self.gpu else self.offloaded + plan.resting(self.load)

    def at_most(self, plan: BlockPlan, processes: int) -> int:
        """At the worst moment, by all processes of a host: loading, training or exporting."""
        training, resting = self.training(plan), self.resting(plan)
        worst = max(
            processes * self.loading, processes * training, processes * resting + self.ending(plan)
        )  # fmt: skip
        return processes * (self.itself + self.batches) + worst

    def fits(self, plan: BlockPlan, host: int, processes: int) -> bool:
        """Whether a host's free bytes, taken before anything is loaded, do for its processes under a plan."""
        lockable = not self.gpu or plan.host(self.load) <= _LOCKABLE * self.left(host, processes)
        return lockable and self.at_most(plan, processes) <= host

    def left(self, host: int, processes: int) -> int:
        """Of a host's free bytes, what each process finds as a plan is installed.

        The weights are there then; those that are streamed give up their copy block by block.
        """
        copied = min(self.loading, self.load.blocks)
        beside = self.itself + self.batches + self.offloaded + self.loading - copied
        return max(0, host // processes - beside)


def itself(*, gpu: bool, strategy: Strategy) -> int:
    """What a process takes before it has loaded anything."""
    if gpu:
        return ITSELF_GPU
    return ITSELF + (0 if strategy == "ddp" else _DEEPSPEED)


def export_bytes(
    base: int, weights: int, *, size: int, full: bool, sharded: bool, keep_best: bool
) -> tuple[int, int]:  # fmt: skip
    """Host memory that the process takes which exports and proves it (`Saver.finish`, `Method.verify`).

    A LoRA is proved on the model that was trained. Only where DeepSpeed holds that one's weights, or a kept checkpoint
    is exported, is a base loaded beside it; where both are so, two.

    Args:
        base: bytes of the checkpoint's weights as loaded.
        weights: how many are trained.
        size: bytes of a number as computed.
        full: all weights are trained.
        sharded: by DeepSpeed.
        keep_best: a kept checkpoint may be what is exported.

    Returns:
        Copies that it makes, and what comes back from the GPU to make room for them there.
    """
    masters = 4 * weights
    if full:  # as written and as loaded back; of a kept checkpoint as read, too, and in a model of its own
        copies = max(4 * size, 2 * size + 4) if keep_best else 2 * size
        return copies * weights, 0 if sharded else masters
    # Adapters as written, as read back, as they act, and as they lay on the GPU; those that a kept one's take the place
    # of, too.
    copies = (5 if keep_best else 4) * masters + (sharded + keep_best) * base
    return copies, base if keep_best and not sharded else 0


def offloaded_bytes(weights: float, strategy: Strategy) -> float:
    """Host memory that DeepSpeed takes for a process's part of the trained weights.

    Some of it is in one page-locked piece each, for which torch takes the next power of two: under stage 2 all but the
    moments (122 GiB for 5B, where 93 would do), under stage 3 copies and gradients.
    """
    spread = STRATEGIES[strategy]
    if not weights or not spread.offloads:
        return 0
    pieces = sum(1 << int(size * weights - 1).bit_length() for size in spread.locked)
    return (spread.host_bytes - sum(spread.locked)) * weights + pieces
