"""Seconds of a step, by arithmetic, on GPUs that we have measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..zero_config import STAGE
from .attention import Kernel
from .demand import Demand, trained_weights
from .keep import ACTIVATIONS, Keep
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
# A weight that is trained in host memory (`host_adam`), on a host of 16 cores: 28 bytes at 47 GB/s; fp16 is converted
# more slowly. Five runs, from before the update was made faster; none of it hides behind the forward pass.
_ON_HOST, _ON_HOST_FP16 = 0.59e-9, 0.78e-9
# DeepSpeed on two H200s, from one run of 2B and one of 5B for each stage. Stages 1 and 2: the same for every model, and
# for a weight (gradients exchanged, weights gathered, the update).
_ZERO, _ZERO_WEIGHT = 0.10, 0.047e-9
# Stage 3: diffusers' own blocks against compiled ones, and what gathering a block adds, all passes together.
_PLAIN_BLOCKS, _GATHERING = 1.2, 0.019
_LINK = 50e9  # bytes/s to host memory and back (PCIe 5), for what torch copies there in between, under stage 3 and low
# A weight of a process's part that DeepSpeed offloads; one run (2B, stage 3). Plain loops took 0.6 and 1.0.
_OFFLOADED = 1.0e-9
# Times an H200, by the names that the driver gives them.
RELATIVE: Mapping[str, float] = {"H200": 1.0, "H100 80 GB": 1.02, "H100 80GB HBM3": 1.02}


def seconds(run: Run, needs: Demand, gpu: str = "H200", kernel: Kernel = "cudnn") -> float | None:
    """Seconds of a step, one accumulation; None for what no measurement stands behind.

    That is a GPU that is not in `RELATIVE`, an attention kernel that is not in `_ATTENTION`, blocks of ours that
    are not compiled, and, under stage 3, those that are.
    Copies of ours to the host and back take no time of their own: they are made beside the computation.
    """
    stage, load, plan = STAGE[needs.strategy], needs.load, needs.plan
    weights = trained_weights(run)
    if stage == 3:
        if plan.compiled:
            return None
        total = _PLAIN_BLOCKS * _blocks(load, plan, "cudnn", full=run.method.full) + _GATHERING * load.layers
        if plan.park:
            total += 2 * sum(ACTIVATIONS[keep] for keep in plan.keep) * load.activation / _LINK
    elif kernel not in _ATTENTION or not plan.compiled:
        return None
    else:
        total = _blocks(load, plan, kernel, full=run.method.full)
    if stage in (1, 2):
        total += _ZERO + _ZERO_WEIGHT * weights
    if needs.strategy.endswith("-offload"):
        total += _OFFLOADED * weights / run.world
    if stage == 0:
        hosted = plan.train_on_host * load.hosted.states if load.hosted else 0
        bytes_each = _OPTIMIZER + (_CASTS if run.method.full else 0)
        total += (load.trained - hosted) * bytes_each / _MEMORY
        total += hosted / 16 * (_ON_HOST_FP16 if run.precision == "fp16" else _ON_HOST)
    return total * RELATIVE[gpu] if gpu in RELATIVE else None


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
