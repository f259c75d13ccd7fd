"""Seconds of a step, by arithmetic, on GPUs that we have measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..zero_config import STAGE
from .attention import Kernel
from .demand import Demand, trained_weights
from .keep import Keep
from .plan import Load, Plan

if TYPE_CHECKING:
    from ..run import Run

# What an H200 gives here, from profiles of a LoRA step on 5B (torch 2.11, cuDNN 9.19, FlashAttention 4).
_ATTENTION: Mapping[Kernel, float] = {"cudnn": 405e12, "flash4": 490e12}  # FLOP/s; head dimension 64, bf16
_PRODUCTS = 785e12
_MEMORY = 4.3e12  # bytes/s, read and written
# Norms, rotations, adapters: how often a block reads or writes an activation, without and with recomputing.
_PASSES, _PASSES_AGAIN = 150, 200
# Forward, and a backward pass that recomputes attention's weights: 1 + 2.5 times its two products.
_ATTENTION_PASSES = 3.5
# What of a block's twelve products the backward pass makes again; nothing asks for the last, the feed-forward's second.
_AGAIN: Mapping[Keep, float] = {"all": 0, "matmuls": 0, "feedforward": 4 / 12, "attention": 8 / 12, "inputs": 8 / 12}
# Bytes read and written for each that a trained weight takes: master, gradient and two moments in the update, and
# before it, where all are trained, the gradient's norm and the copies in half precision.
_OPTIMIZER, _CASTS = 40 / 16, 30 / 16
# A weight that is trained in host memory (`host_adam`), on a host of 16 cores: 28 bytes at 57 GB/s, measured alone.
# fp16 is converted more slowly.
_ON_HOST, _ON_HOST_FP16 = 0.49e-9, 0.60e-9
# DeepSpeed on two H200s, from one run of 2B and one of 5B for each stage: the same for every model, and for a weight
# (gradients exchanged, weights gathered, the update).
_ZERO, _ZERO_3 = (0.10, 0.047e-9), (0.15, 0.064e-9)
_OFFLOADED = 0.63e-9  # a weight of a process's part that it offloads; 2B and 5B, stage 3
# Times an H200, by the names that the driver gives them.
RELATIVE: Mapping[str, float] = {"H200": 1.0, "H100 80 GB": 1.02, "H100 80GB HBM3": 1.02}


def seconds(run: Run, needs: Demand, gpu: str = "H200", kernel: Kernel = "cudnn") -> float | None:
    """Seconds of a step, one accumulation; None for what no measurement stands behind.

    That is a GPU that is not in `RELATIVE`, an attention kernel that is not in `_ATTENTION`, blocks that are not
    compiled. Stage 1 is computed as stage 2, and what stage 2 offloads as what stage 3 does; neither was measured.
    Copies of ours to the host and back take no time of their own: they are made beside the computation.
    """
    stage, load, plan = STAGE[needs.strategy], needs.load, needs.plan
    if kernel not in _ATTENTION or not plan.compiled or gpu not in RELATIVE:
        return None
    weights = trained_weights(run)
    total = _blocks(load, plan, kernel, full=run.method.full)
    if stage == 0:
        hosted = plan.train_on_host * load.hosted.states if load.hosted else 0
        bytes_each = _OPTIMIZER + (_CASTS if run.method.full else 0)
        total += (load.trained - hosted) * bytes_each / _MEMORY
        if hosted:  # block after block, beside the next forward pass, which begins with those that are done
            update = hosted / 16 * (_ON_HOST_FP16 if run.precision == "fp16" else _ON_HOST)
            total += max(update / plan.train_on_host, update - _forward(load, kernel))
    else:
        each, a_weight = _ZERO_3 if stage == 3 else _ZERO
        total += each + a_weight * weights
    if needs.strategy.endswith("-offload"):
        total += _OFFLOADED * weights / run.world
    return total * RELATIVE[gpu]


def _forward(load: Load, kernel: Kernel) -> float:
    """Of the forward pass of all blocks, but for norms and the like."""
    return load.layers * (load.attention / _ATTENTION[kernel] + load.products / _PRODUCTS)


def _blocks(load: Load, plan: Plan, kernel: Kernel, *, full: bool) -> float:
    """Of the forward and the backward pass of all blocks, compiled."""
    backward = 2 if full else 1  # the gradient of what went in; of the weights, too, where they are trained
    total = 0.0
    for keep in plan.keep:
        attention = _ATTENTION_PASSES + (keep == "inputs")
        products = 1 + backward + _AGAIN[keep]
        passes = _PASSES_AGAIN if _AGAIN[keep] else _PASSES
        total += load.attention * attention / _ATTENTION[kernel] + load.products * products / _PRODUCTS
        total += load.activation * passes / _MEMORY
    return total
