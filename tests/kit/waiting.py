"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

_T = TypeVar("_T")
_LOOK_S = 0.02  # between two looks


class Running(Protocol):
    """A process, or several: `forked.Forked`, `forked.ForkedRanks`, `slurm.Job`."""

    @property
    def running(self) -> bool: ...


def wait_until(true: Callable[[], _T], of: Running | None = None, seconds: float = 240) -> _T:
    """Wait until something is true; gives what it is then, which is false if ``of``, whose doing it is, has ended.

    Raises:
        AssertionError: neither has come within so many seconds, in which this process ran: a machine that stops, and
            all that is waited for with it, takes none of them.
    """
    for _ in range(round(seconds / _LOOK_S)):
        goes_on = of is None or of.running  # asked before, so that its last act counts
        if (found := true()) or not goes_on:
            return found
        time.sleep(_LOOK_S)
    raise AssertionError(f"it did not come to that within {seconds} s")


def steps_made(run: Path) -> int:
    """Steps that a run has made so far; none where it has not begun."""
    from cogtrain.runs.folder import METRICS_FILE, read_metrics

    return len(read_metrics(run / METRICS_FILE)[0])


def wait_for_steps(run: Path, steps: int, of: Running) -> bool:
    """Wait until a run has made so many steps; False where its processes have ended before."""
    return wait_until(lambda: steps_made(run) >= steps, of)
