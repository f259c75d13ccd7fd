"""Judges each step by its losses and its gradient: one that is not finite is left out, or stops the run.

A loss names its samples. A gradient under finite losses is no sample's fault, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogcommon.errors import RunError
from cogcommon.words import counted

from ..data.caption_draw import Ints
from ..data.shard_set import ShardSet
from ..distributed.leaving import PeerFailed

if TYPE_CHECKING:
    from ..distributed.strategy import Runtime
    from ..runs.log import RunLog
    from ..runs.run import Run

_SHOWN = 8  # samples named in one message
# Steps in a row that may train nothing. fp16's scale is halved by each; it begins at 2^16, so this many end below 1,
# where a gradient that is not finite cannot be the scale's doing.
_IN_VAIN = 24


class Judge:
    """Judges each step by its gradient, whose norm is finite exactly where all of it is.

    Every rank has the same norm, so all come to the same verdict; rank 0 says it.
    """

    def __init__(self, run: Run, runtime: Runtime, log: RunLog) -> None:
        self._run = run
        self._main = runtime.main
        self._log = log
        self._in_vain = 0  # steps in a row
        self._without_loss = 0  # of these, whose losses were all not finite
        self._trained = 0

    def gradient(self, step: int, norm: float, *, samples: int) -> bool:
        """Whether the step is to be made.

        Under fp16 always: the scaler, ours or DeepSpeed's, itself leaves out what its scale was too large for.

        Args:
            norm: of the gradient.
            samples: whose losses were finite and are in it.

        Raises:
            RunError: the norm is not finite, and ``--on-nonfinite`` says stop; or it, or every loss, has not been for
                too many steps in a row.
        """
        if math.isfinite(norm) and samples:
            self._in_vain = self._without_loss = 0
            self._trained += 1
            return True
        self._in_vain += 1
        self._without_loss += not samples
        scaled = self._run.precision == "fp16"
        if self._in_vain > _IN_VAIN or not (scaled or not samples or self._run.settings.on_nonfinite == "skip"):
            raise self._fault(step)
        if not math.isfinite(norm) and not scaled:
            self._log.say(f"step {step}: the gradient is not finite, though every loss is; the step is left out")
        return scaled

    def end(self) -> None:
        """Look back on all steps.

        Raises:
            RunError: there were some, and nothing was trained in any of them.
        """
        if not self._in_vain or self._trained:
            return
        if self._main and not self._without_loss and self._run.precision == "fp16":
            raise RunError(
                f"nothing was trained in {counted(self._in_vain, 'step')}: each had a gradient too large for fp16, "
                "whose scale is halved until one fits",
                where=f"step {self._run.steps}",
                fix=f"{_IN_VAIN} more --steps, or --precision bf16",
            )
        raise self._fault(self._run.steps)

    def _fault(self, step: int) -> RunError:
        if not self._main:
            return PeerFailed()
        other = {"fp16": "bf16", "bf16": "fp32"}.get(self._run.precision)
        newly = f", or a new run with --precision {other}" if other else ""
        if self._without_loss:
            mixed = self._without_loss < self._in_vain
            which = f" in {self._without_loss} of them, and no gradient in the others" if mixed else ""
            return RunError(
                f"nothing was trained in {self._in_vain} steps in a row: no sample's loss is finite{which}",
                where=f"step {step}",
                fix=f"`cogprep verify` tells whether the samples are whole; resume with a lower --lr{newly}",
            )
        row = f" for {self._in_vain} steps in a row" if self._in_vain > 1 else ""
        return RunError(
            f"the gradient is not finite{row}, though every loss is; the samples are not to blame",
            where=f"step {step}; the weights are those of the step before, and finite",
            fix=f"--on-nonfinite skip leaves such a step out; if it comes again, resume with a lower --lr{newly}",
        )


def not_finite(losses: Sequence[float], places: Ints, shards: ShardSet) -> list[str]:
    """The samples whose loss is not finite, as ``key in shard``.

    Args:
        losses: of all ranks, rank by rank.
        places: indices of their samples in ``shards``, in the same order.
    """
    named = []
    for loss, index in zip(losses, places, strict=True):
        if not math.isfinite(loss):
            extent = shards.extent(int(index))
            named.append(f"{extent.key} in {shards.shards[extent.shard].shown} ({loss})")
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
