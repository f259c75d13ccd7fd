"""The strategies, a row each: what one spreads over the processes of a run, and what it keeps in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..settings.training import Strategy


@dataclass(frozen=True)
class StrategyFacts:
    """What a strategy does with weights, gradients and optimizer states (ZeRO, arXiv 1910.02054, section 5).

    Attributes:
        stage: of ZeRO. 0: every process holds all (DDP). 1 and 2 spread optimizer states and gradients, 3 the
            weights, too.
        offloads: gradients and optimizer states wait in host memory, where DeepSpeed's AdamW steps; under stage 3
            the weights, too.
        host_bytes: of host memory for an offloaded weight: an fp32 master, its gradient and two moments, and a copy
            in half precision; under stage 3 gradients as they came, too.
        locked: of these, the bytes in each piece that DeepSpeed page-locks.
    """

    stage: Literal[0, 1, 2, 3]
    offloads: bool = False
    host_bytes: int = 0
    locked: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Every process holds all weights."""
        return self.stage < 3

    @property
    def offloads_weights(self) -> bool:
        return self.offloads and not self.whole


# From fast to small: the order in which they are advised.
STRATEGIES: Mapping[Strategy, StrategyFacts] = {
    "ddp": StrategyFacts(stage=0),
    "zero1": StrategyFacts(stage=1),
    "zero2": StrategyFacts(stage=2),
    "zero3": StrategyFacts(stage=3),
    "zero2-offload": StrategyFacts(stage=2, offloads=True, host_bytes=18, locked=(4, 4, 2)),
    "zero3-offload": StrategyFacts(stage=3, offloads=True, host_bytes=20, locked=(2, 4, 2)),
}
