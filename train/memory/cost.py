"""Seconds of a step under a plan, by arithmetic: what is computed, and what is copied between host and GPU beside it.

Copies hide behind the computation where the link is fast enough. Where it is not, a step takes as long as they do, and
a plan that moves less is the faster one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..blocks.attention import Kernel
from ..blocks.checkpointing import Checkpointing
from ..blocks.load import Load
from ..blocks.plan import BlockPlan

if TYPE_CHECKING:
    from .estimate import Trains

# What an H200 gives here, from profiles of a LoRA step on 5B (torch 2.11, cuDNN 9.19, FlashAttention 4).
ATTENTION: Mapping[Kernel, float] = {"cudnn": 405e12, "flash4": 500e12}  # FLOP/s; head dimension 64, bf16
PRODUCTS = 785e12
_MEMORY = 4.3e12  # bytes/s, read and written
# Norms, rotations, adapters: how often a block reads or writes an activation, without and with recomputing.
_PASSES, _PASSES_AGAIN = 150, 200
# Forward, and a backward pass that recomputes attention's weights: 1 + 2.5 times its two products.
ATTENTION_BACKWARD = 2.5
# What of a block's twelve products the backward pass makes again; nothing asks for the last, the feed-forward's second.
_AGAIN: Mapping[Checkpointing, float] = {
    "all": 0, "matmuls": 0, "feedforward": 4 / 12, "attention": 8 / 12, "inputs": 8 / 12,
}  # fmt: skip
# Bytes read and written for each that a trained weight takes: master, gradient and two moments in the update, and
# before it, where all are trained, the gradient's norm and the copies in half precision.
_OPTIMIZER, _CASTS = 40 / 16, 30 / 16
# A weight that is trained in host memory (`cpu_adam`), on a host of 16 cores: 28 bytes at 58 GB/s; 57 measured alone,
# 63 on another host as a step gives it.
_ON_CPU = 0.48e-9
_THERE = 2  # blocks whose copies are on the GPU already as a pass begins (`BlockSwap`, `ActivationOffload`)


@dataclass(frozen=True)
class Speed:
    """Of a GPU and its link to the host."""

    relative: float = 1.0  # seconds that a computation takes, times an H200's
    link: float = 48e9  # bytes/s in each direction, from and to page-locked memory; an H200's, by PCIe 5
    published: bool = False  # by what its maker says; not measured


def plan_cost(run: Trains, load: Load, speed: Speed, kernel: Kernel = "cudnn") -> Callable[[BlockPlan], float]:
    """What a plan costs a run: seconds of one accumulation step, blocks compiled, without what DeepSpeed does."""
    return partial(_seconds, load, speed, kernel, full=run.method.full)


def _seconds(load: Load, speed: Speed, kernel: Kernel, plan: BlockPlan, *, full: bool) -> float:
    forward, backward = _computed(load, plan, kernel, full=full)
    there, back = _copied(load, plan)
    total = max(forward * speed.relative, max(there) / speed.link)
    total += max(backward * speed.relative, max(back) / speed.link)
    cpu_trained = plan.train_on_cpu * load.cpu_trained.states if load.cpu_trained else 0
    bytes_each = _OPTIMIZER + (_CASTS if full else 0)
    total += max(0, load.trained - cpu_trained) * bytes_each / _MEMORY * speed.relative
    if cpu_trained:  # block after block, beside the next forward pass, which begins with those that are done
        update = cpu_trained / 16 * _ON_CPU
        products = load.layers * (load.attention / ATTENTION[kernel] + load.products / PRODUCTS)
        total += max(update / plan.train_on_cpu, update - products * speed.relative)
    return total


def _computed(load: Load, plan: BlockPlan, kernel: Kernel, *, full: bool) -> tuple[float, float]:
    """Of the forward and of the backward pass of all blocks, on an H200."""
    attention, products = load.attention / ATTENTION[kernel], load.products / PRODUCTS
    passed = load.activation / _MEMORY
    gradients = 2 if full else 1  # of what went in; of the weights, too, where they are trained
    backward = 0.0
    for policy in plan.checkpointing:
        backward += attention * (ATTENTION_BACKWARD + (policy == "inputs")) + products * (gradients + _AGAIN[policy])
        backward += passed * ((_PASSES_AGAIN if _AGAIN[policy] else _PASSES) - _PASSES / 3)
    return load.layers * (attention + products + passed * _PASSES / 3), backward


def _copied(load: Load, plan: BlockPlan) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bytes that leave for the host and that come from it, in the forward and in the backward pass.

    Each pass finds on the GPU what the one before had there last: two blocks' weights, and at its turn what two blocks
    keep, which leaves while the backward pass begins. Only weights that the host has updated are all fetched.
    """
    moving = max(0, load.layers - _THERE) / load.layers
    kept, weights = plan.offloaded(load) * moving, (load.blocks if plan.swap_blocks else 0) * moving
    if plan.train_on_cpu:
        assert load.cpu_trained
        fetched = plan.train_on_cpu * load.cpu_trained.block
        again = max(0, plan.train_on_cpu - _THERE) * load.cpu_trained.block
        return (kept, fetched), (fetched, kept + again)
    return (kept, weights), (0, kept + weights)
