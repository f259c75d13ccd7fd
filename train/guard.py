"""What can go wrong inside a step: losses that are not finite, memory that is not enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogcommon.errors import RunError
from cogcommon.families import PATCH

from .order import Ints
from .run import Run

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_SHOWN = 8  # samples named in one message


class PeerFailed(RunError):
    """Another rank has an error, and says it."""

    def __init__(self) -> None:
        super().__init__("another process of the run has failed")


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
    """Which setting lowers the peak, and by how much, for this run's largest bucket."""
    config = run.checkpoint.transformer_config
    patch_t = config.get("patch_size_t") or 1
    tokens = max(
        -(-bucket.latent_frames // patch_t) * (bucket.latent_height // PATCH) * (bucket.latent_width // PATCH)
        for bucket in run.shards.buckets
    )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    size = {"fp32": 4}.get(run.precision, 2)
    # Tensors of this size: a block keeps two of them under auto (its input, the attention's output), about ten under
    # fast (q, k, v, a feed-forward four times as wide, too), none on the GPU under low (`step.keep`).
    inputs = config["num_layers"] * (tokens + run.checkpoint.family.text_tokens) * width * size / _GIB
    settings = run.settings
    advice = []
    if settings.batch_size > 1:
        advice.append(
            f"--batch-size 1 --accumulate {settings.accumulate * settings.batch_size} "
            f"(the same global batch; about {inputs * (settings.batch_size - 1):.1f} GiB less)"
        )
    if settings.memory == "fast":
        advice.append(f"--memory auto (up to {8 * inputs * settings.batch_size:.0f} GiB less)")
    elif settings.memory == "auto":
        base = 0 if run.method.full else config["num_layers"] * 12 * width**2 * size / _GIB
        advice.append(f"--memory low (up to {2 * inputs * settings.batch_size + base:.1f} GiB less, a little slower)")
    if run.method.full and not run.strategy.endswith("-offload"):
        weights = config["num_layers"] * 12 * width**2  # attention 4, feed-forward 8
        advice.append(
            f"--strategy zero2-offload (optimizer states on the host, {weights * 12 / run.world / _GIB:.0f} GiB less)"
        )
    elif run.method.full and run.strategy == "zero2-offload":
        weights = config["num_layers"] * 12 * width**2
        advice.append(f"--strategy zero3-offload (weights too: {weights * size / _GIB:.0f} GiB less)")
    return RunError(
        "out of GPU memory",
        where=str(error).splitlines()[0],
        fix="; or ".join(advice) or "a smaller --resolution when encoding, or a GPU with more memory",
    )
