"""How the blocks are run, what that takes of a `Load`, and the plan that fits: what is kept, what is moved to the host.

Bytes are predicted, before any weight is on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from cogcommon.words import counted

from ..settings.training import Memory
from .checkpointing import ACTIVATIONS, ALL_UNCOMPILED, Checkpointing
from .load import Load

# Of free memory, what a plan may fill: fragments, the CUDA libraries' workspaces and validation take the rest.
USABLE = 0.88
# Activations on the GPU, beside what is kept, as one block's attention goes backward; that is when most is. Compiled:
# fitted to LoRAs of 5B, 1.5 and 2B (H200, torch 2.11). Plain is an estimate: what such a block keeps (17), gradients.
_WORK_COMPILED, _WORK_PLAIN = 12.3, 26.0
# Without gradients: in and out of the feed-forward's middle, and what a block computes them from. 5B with guidance at
# 49x480x720, in diffusers' own blocks, took 3 GiB: 14.7 activations of the two samples.
FORWARD = 15
# Where the attention is recomputed its inputs are there as the feed-forward goes backward; seen in one run, row 13.
_WORK_ATTENTION_AGAIN = 6.0
_OFFLOADED_BESIDE = 8.2  # activations in flight to or from the host, beside one block's; fitted to the same runs
_CPU_TRAINED_IN_FLIGHT = 2  # of each of two blocks: its weights, its gradients
_AS_FAST = 1.1  # times the seconds of the fastest: no reason to move more memory
# On CPUs, where nothing is compiled and activations are as computed (torch 2.11, every tensor that lives counted): what
# a block keeps of which nothing is recomputed, by whether its weights are trained, too; what one that goes backward
# takes beside it; and latents, which the loss holds.
_ALONE, _ALONE_FULL, _ALONE_WORK, _ALONE_LATENTS = 15.0, 24.0, 7.0, 5
_SLOTS = 2  # blocks of which streaming holds a second copy
_CHUNKS = 4  # of the feed-forward layer, where memory counts: its middle is four activations wide


@dataclass(frozen=True)
class BlockPlan:
    """How the blocks of a run are run.

    ``checkpointing`` is of each block; ``offload_activations`` moves what they keep to host memory, ``swap_blocks``
    the frozen weights; ``train_on_cpu`` says of how many blocks, the last ones, weights, gradients and
    optimizer states are there; ``chunks`` are the feed-forward layer's.
    """

    checkpointing: tuple[Checkpointing, ...]
    offload_activations: bool = False
    swap_blocks: bool = False
    train_on_cpu: int = 0
    chunks: int = 1
    compiled: bool = False

    @classmethod
    def to_draw(cls, layers: int) -> BlockPlan:
        """Of a model that is not trained, beside one that is: next to nothing of it is on the GPU."""
        return cls(_each("inputs", layers), swap_blocks=True)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> BlockPlan:
        """The plan whose `fields` these are."""
        policies = [(policy,) * blocks for policy, blocks in fields["checkpointing"]]
        return cls(**{**fields, "checkpointing": sum(policies, ())})

    def fields(self) -> dict[str, Any]:
        """The plan as JSON, by which a run that had it is found again; its sentence (``str``) is for people.

        ``checkpointing`` are pairs: a policy, and how many blocks in a row have it.
        """
        policies = [[policy, len(list(blocks))] for policy, blocks in groupby(self.checkpointing)]
        return asdict(self) | {"checkpointing": policies}

    @property
    def uncompiled(self) -> BlockPlan:
        """The same without a compiler. A selective checkpoint then keeps what it selects in a place that hooks
        do not reach, and so nothing of it could be offloaded."""
        policy = _each("inputs", len(self.checkpointing)) if self.offload_activations else self.checkpointing
        return replace(self, checkpointing=policy, compiled=False)

    def peak(self, load: Load) -> int:
        """Predicted bytes of GPU memory at the worst moment of a step."""
        work = _WORK_COMPILED if self.compiled else _WORK_PLAIN
        if self.compiled and "inputs" in self.checkpointing:
            work += _WORK_ATTENTION_AGAIN
        each = [
            ALL_UNCOMPILED if policy == "all" and not self.compiled else ACTIVATIONS[policy]
            for policy in self.checkpointing
        ]
        kept = min(sum(each), max(each) + _OFFLOADED_BESIDE) if self.offload_activations else sum(each)
        blocks = min(load.layers, 2) if self.swap_blocks else load.layers
        weights, arriving = load.rest + load.trained + blocks * load.block, load.arriving
        if self.train_on_cpu:
            assert load.cpu_trained
            weights += min(self.train_on_cpu, 2) * _CPU_TRAINED_IN_FLIGHT * load.cpu_trained.block
            weights -= self.train_on_cpu * load.cpu_trained.states
            arriving -= self.train_on_cpu * load.cpu_trained.states // 4 if arriving else 0
        # What is kept goes as the gradients come, and is less than they are, or more.
        first = weights - arriving + (kept + work) * load.activation
        last = weights + (min(kept, each[0]) + work) * load.activation
        return int(max(first, last))

    def evaluating(self, load: Load, held_out: Load) -> int:
        """Predicted bytes of GPU memory of a forward pass without gradients, on a held-out load."""
        blocks = min(load.layers, 2) if self.swap_blocks else load.layers
        weights = load.rest + load.trained - load.arriving + blocks * load.block
        if self.train_on_cpu:
            assert load.cpu_trained
            weights += min(self.train_on_cpu, 2) * load.cpu_trained.block
            weights -= self.train_on_cpu * load.cpu_trained.states * (3 if load.arriving else 4) // 4
        return int(weights + FORWARD * held_out.activation)

    def host(self, load: Load) -> int:
        """Bytes of host memory, most of them page-locked; beside the masters of what is trained there."""
        cpu_trained = self.train_on_cpu * load.cpu_trained.host if load.cpu_trained else 0
        return int(self.offloaded(load) + cpu_trained + (load.blocks if self.swap_blocks else 0))

    def offloaded(self, load: Load) -> float:
        """Bytes of the activations that wait in host memory for the backward pass."""
        kept = sum(ACTIVATIONS[policy] for policy in self.checkpointing) * load.activation
        return kept if self.offload_activations else 0.0

    def resting(self, load: Load) -> int:
        """Predicted bytes of host memory between two steps, where there is no GPU."""
        weights = load.whole + load.trained
        if self.swap_blocks:
            weights += min(load.layers, _SLOTS) * load.block
        if self.train_on_cpu:
            assert load.cpu_trained
            masters = load.cpu_trained.states // 4
            weights += self.train_on_cpu * (load.cpu_trained.host + masters - load.cpu_trained.states)
            weights += min(self.train_on_cpu, _SLOTS) * load.cpu_trained.block
        return weights

    def alone(self, load: Load) -> int:
        """Predicted bytes of host memory at the worst moment of a step, where there is no GPU."""
        whole = (_ALONE if load.frozen else _ALONE_FULL) * load.activation + load.adapters
        each = [whole if policy == "all" else ACTIVATIONS[policy] * load.activation for policy in self.checkpointing]
        work = _ALONE_WORK * load.activation + _ALONE_LATENTS * load.latents
        work += whole if set(self.checkpointing) != {"all"} else 0  # which is computed again
        weights = self.resting(load)
        arriving = 0 if self.train_on_cpu else load.arriving
        return int(max(weights - arriving + sum(each) + work, weights + min(sum(each), each[0]) + work))

    def __str__(self) -> str:
        words: dict[Checkpointing, str] = {
            "all": "nothing is recomputed",
            "matmuls": "only norms and activations are recomputed",
            "feedforward": "all but the attention and the feed-forward layer's middle is recomputed",
            "attention": "all but the attention is recomputed",
            "inputs": "everything is recomputed",
        }
        counts = {policy: self.checkpointing.count(policy) for policy in words if policy in self.checkpointing}
        parts = [f"{words[policy]}" + (f" in {n} blocks" if len(counts) > 1 else "") for policy, n in counts.items()]
        if self.offload_activations:
            parts.append("what is kept waits in host memory")
        if self.swap_blocks:
            parts.append("frozen weights come from host memory")
        if self.train_on_cpu:
            some = f" of {counted(self.train_on_cpu, 'block')}" if self.train_on_cpu < len(self.checkpointing) else ""
            parts.append(f"weights, gradients and optimizer states{some} are in host memory")
        parts.append("blocks compiled" if self.compiled else "not compiled")
        return ", ".join(parts)


def choose_plan(
    memory: Memory, load: Load, *, free: int, fits_host: Callable[[BlockPlan], bool], compiled: bool, gpu: bool = True,
    cost: Callable[[BlockPlan], float] | None = None,
) -> BlockPlan:  # fmt: skip
    """The fastest plan of its kind that fits; the smallest one where none does.

    Args:
        free: bytes of GPU memory that this process may use.
        fits_host: whether the host has the memory that a plan takes there (`HostNeeds.fits`).
        gpu: on a CPU there is one memory: what is kept has to fit there and, but for ``low``, nothing moves.
        cost: seconds of a step; without it copies count as hidden behind the computation. ``low`` moves what it can,
            whatever it costs.
    """
    if not gpu:
        all_fits = fits_host(BlockPlan(_each("all", load.layers), compiled=compiled))
        policy: Checkpointing = "all" if memory == "fast" or (memory == "auto" and all_fits) else "inputs"
        low = memory == "low"
        return BlockPlan(
            _each(policy, load.layers),
            offload_activations=low,
            swap_blocks=low and load.can_swap,
            train_on_cpu=load.layers if low and load.cpu_trained else 0,
            compiled=compiled,
        )
    known = list(ladder(memory, load, compiled))
    plans = [plan for plan in known if fits_host(plan)]
    fitting = [plan for plan in plans if fits(plan, load, free)]
    if not plans:  # what takes the least of the host
        return min(known, key=lambda plan: (not fits(plan, load, free), plan.host(load)))
    if not fitting:
        return min(plans, key=lambda plan: plan.peak(load))
    if cost is None or memory == "low":
        return fitting[0]
    costs = [cost(plan) for plan in fitting]
    return next(plan for plan, takes in zip(fitting, costs, strict=True) if takes <= _AS_FAST * min(costs))


def fits(plan: BlockPlan, load: Load, free: int) -> bool:
    """Whether a plan leaves of the GPU's free bytes what else is needed there."""
    return plan.peak(load) <= USABLE * free


def ladder(memory: Memory, load: Load, compiled: bool) -> Iterator[BlockPlan]:
    """Plans from fast to small, where copies hide behind the computation."""
    layers = load.layers
    attention = _each("attention", layers)
    inputs = _each("inputs", layers)
    feedforward = _each("feedforward", layers)
    offloaded = attention if compiled else inputs  # as in BlockPlan.uncompiled
    if memory == "fast":
        for whole in range(layers, 0, -1):
            yield BlockPlan(checkpointing=_each("matmuls", whole) + attention[whole:], compiled=compiled)
    if memory != "low":
        yield BlockPlan(checkpointing=attention, compiled=compiled)
        if compiled:
            yield BlockPlan(checkpointing=feedforward, offload_activations=True, compiled=True)
        yield BlockPlan(checkpointing=offloaded, offload_activations=True, compiled=compiled)
    every = layers if load.cpu_trained else 0
    if memory != "low" and load.cpu_trained:
        for some in range(1, layers):
            if compiled:
                yield BlockPlan(checkpointing=feedforward, offload_activations=True, train_on_cpu=some, compiled=True)
            yield BlockPlan(checkpointing=offloaded, offload_activations=True, train_on_cpu=some, compiled=compiled)
        yield BlockPlan(checkpointing=attention, train_on_cpu=every, compiled=compiled)
    moved = partial(BlockPlan, swap_blocks=load.can_swap, train_on_cpu=every, chunks=_CHUNKS, compiled=compiled)
    if memory != "low" and compiled:
        yield moved(checkpointing=feedforward, offload_activations=True)
    yield moved(checkpointing=offloaded, offload_activations=True)
    yield moved(checkpointing=inputs, offload_activations=True)
    if load.can_swap or load.cpu_trained:  # host memory is short, too
        yield moved(checkpointing=inputs)
    yield BlockPlan(checkpointing=inputs, offload_activations=True, chunks=_CHUNKS, compiled=compiled)
    yield BlockPlan(checkpointing=inputs, chunks=_CHUNKS, compiled=compiled)


def _each(policy: Checkpointing, blocks: int) -> tuple[Checkpointing, ...]:
    return (policy,) * blocks
