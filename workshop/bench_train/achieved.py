"""What a step computes, and how much of a GPU's peak that is: the model's arithmetic over measured seconds.

Counted are the products of the transformer's blocks, once forward and once (a LoRA) or twice (all weights) backward,
and attention over all tokens as its kernels compute it: two products forward, five backward, one of which makes the
scores again. Not counted is what is not the model's or is little: what checkpointing computes again, adapters (1.5%
of a LoRA of rank 128), norms, embeddings, the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogcommon.model.cards import card_like
from cogcommon.model.families import BY_NAME, Resolution
from cogcommon.model.published import published
from cogtrain.blocks.load import Load
from cogtrain.memory.cost import ATTENTION_BACKWARD
from cogtrain.memory.measured import Measured


@dataclass(frozen=True)
class Achieved:
    """Of each GPU."""

    tflops: float  # the model's TFLOP in a second
    share: float | None  # of the card's peak (`cards`: bf16, dense, sums in fp32); None: its maker's figure is not here

    def __str__(self) -> str:
        """As a cell of a table that says what it is."""
        return f"{self.tflops:.0f}" + ("" if self.share is None else f", {self.share:.0%}")

    @property
    def words(self) -> str:
        return f"{self.tflops:.0f} TFLOP/s" + ("" if self.share is None else f", {self.share:.0%}")


def step_flop(family: str, method: str, resolution: str, batch_size: int = 1, layers: int | None = None) -> float:
    """Floating-point operations of one step on one GPU, without accumulation."""
    row = BY_NAME[family]
    config = dict(published(row).transformer_config)
    tokens = row.tokens(Resolution.parse(resolution))
    load = Load.of(config, tokens, batch=batch_size, size=2, trained=0)
    backward = 2 if method == "sft" else 1
    block = load.products * (1 + backward) + load.attention * (1 + ATTENTION_BACKWARD)
    return (layers or load.layers) * block


def achieved(run: Measured) -> Achieved:
    """Of a run that was measured; every GPU computes a batch of its own."""
    return _over(step_flop(run.family, run.method, run.resolution, run.batch_size), run.s_per_step, run.gpu)


def achieved_by(result: Mapping[str, Any]) -> Achieved | None:
    """Of a row's result; None where its shape is not a published one."""
    if result["small"] or "s_per_step" not in result:
        return None
    method = "lora" if result["rank"] else "sft"
    flop = step_flop(result["family"], method, str(result["bucket"]), layers=result["layers"])
    return _over(flop, result["s_per_step"], result.get("gpu", ""))


def _over(flop: float, seconds: float, gpu: str) -> Achieved:
    rate, card = flop / seconds / 1e12, card_like(gpu)
    return Achieved(rate, rate / card.rate if card and card.rate else None)
