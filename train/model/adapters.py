"""The kinds of adapters that a LoRA run can train: one row each, by the name that ``--adapter`` takes.

Every kind adds ``scale * B A x`` to what a linear layer gives; they differ in the scale:

* ``lora``: alpha/rank (Hu et al. 2021, arXiv:2106.09685).
* ``rslora``: alpha/sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732). With alpha/rank the gradient
  shrinks as the rank grows; with alpha/sqrt(rank) it does not.

The exported file holds the scale folded into B, so whoever loads it sees a plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..settings.training import AdapterName


@dataclass(frozen=True)
class Adapter:
    """One kind of adapter.

    Args:
        title: what people call it.
        default_alpha: for a rank.
        plain_alpha: for an alpha and a rank, the alpha of the plain LoRA that acts the same.
    """

    title: str
    default_alpha: Callable[[int], float]
    plain_alpha: Callable[[float, int], float]


ADAPTERS: dict[AdapterName, Adapter] = {
    "lora": Adapter("LoRA", default_alpha=lambda rank: rank / 2, plain_alpha=lambda alpha, rank: alpha),
    "rslora": Adapter(
        "rsLoRA",
        default_alpha=lambda rank: 8.0,  # as PEFT; at rank 128 the scale is 0.71, LoRA's is 0.5
        plain_alpha=lambda alpha, rank: alpha * math.sqrt(rank),
    ),
}
