"""Seconds of a step of a run, by arithmetic: on GPUs that we have measured, and on others by what their makers say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from cogcommon.model.cards import card_like

from ..blocks.attention import Kernel
from ..distributed.strategies import STRATEGIES
from .cost import ATTENTION, Speed, plan_cost
from .estimate import Estimate, Trains
from .weights import trained_weights

if TYPE_CHECKING:
    from cogcommon.model.cards import Card

# DeepSpeed on two H200s, from runs of 2B and 5B for each stage: the same for every model, and for a weight (gradients
# exchanged, weights gathered, the update). Stage 3 waits for the host: between 0.33 and 0.51 s of 5B, on two hosts.
_ZERO, _ZERO_3 = (0.10, 0.047e-9), (0.13, 0.055e-9)
_OFFLOADED = 0.63e-9  # a weight of a process's part that it offloads; 2B and 5B, stage 3
# Times an H200, by the names that the driver gives them.
RELATIVE: Mapping[str, float] = {"H200": 1.0, "H100 80 GB": 1.02, "H100 80GB HBM3": 1.02}

H200 = Speed()


def speed_of(name: str) -> Speed | None:
    """What a GPU gives that we have measured, by its driver's name; None for another one."""
    relative, card = RELATIVE.get(name), card_like(name)
    return Speed(relative, card.link * 1e9 if card else Speed.link) if relative else None


def published_speed(card: Card) -> Speed | None:
    """What a card that was never measured would give if it gave as much of its published rate as an H200 does.

    None where that would be no more than a guess: of a card without bf16, on which other attention kernels run.
    """
    reference = card_like("H200")
    assert reference and reference.rate
    return Speed(reference.rate / card.rate, card.link * 1e9, published=True) if card.rate and card.bf16 else None


def seconds(run: Trains, needs: Estimate, speed: Speed, kernel: Kernel = "cudnn") -> float | None:
    """Seconds of a step, one accumulation; None for what no measurement stands behind.

    That is an attention kernel that is not in `ATTENTION`, blocks that are not compiled, and what cards that were
    never measured exchange with each other under ZeRO. Stage 1 is computed as stage 2, and what stage 2 offloads as
    what stage 3 does; neither was measured.
    """
    stage, load, plan = STRATEGIES[needs.strategy].stage, needs.load, needs.plan
    if kernel not in ATTENTION or not plan.compiled or (stage and speed.published):
        return None
    if stage == 0:
        return plan_cost(run, load, speed, kernel)(plan)
    weights = trained_weights(run)
    each, a_weight = _ZERO_3 if stage == 3 else _ZERO
    theirs = each + a_weight * weights
    if STRATEGIES[needs.strategy].offloads:
        theirs += _OFFLOADED * weights / run.world
    # Its update is in that.
    return theirs + plan_cost(run, replace(load, trained=0), speed, kernel)(plan)
