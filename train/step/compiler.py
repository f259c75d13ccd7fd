"""torch.compile: whether it is to be had here, and the time that it takes."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

from .block import BlockFunction

if TYPE_CHECKING:
    import torch

# One function serves all blocks; it is compiled for each bucket, and in each for blocks whose input needs a
# gradient and for the first, whose does not. torch's own limit of 8 would end at the fourth bucket.
_VARIANTS = 128


@lru_cache
def trouble(device: torch.device) -> str | None:
    """Why nothing can be compiled for the device; None if it can. Tries it once, on a few numbers."""
    import torch
    import torch.nn.functional as F

    def small(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x) * 2

    x = torch.ones(64, device=device, requires_grad=True)
    try:
        torch.compile(small, fullgraph=True, dynamic=False)(x).sum().backward()
    except Exception as error:  # torch raises whatever the compilers below it raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"
    return None


def compiled(function: BlockFunction) -> BlockFunction:
    """The function as one compiled region. It is compiled when first called, for each shape of its arguments."""
    import torch
    import torch._dynamo

    # It asks, once, for a region without in-place operations; ours has none.
    logging.getLogger("torch._dynamo.variables.higher_order_ops").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 4 * _VARIANTS
    )
    return torch.compile(function, fullgraph=True, dynamic=False)


def seconds_so_far() -> float:
    """Wall time that this process has spent compiling."""
    import sys

    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return 0.0
    return float(utils.calculate_time_spent().get("total_wall_time", 0.0))
