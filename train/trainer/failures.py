"""Errors of one rank that all ranks stop for, and memory that is not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cogcommon.errors import RunError
from cogcommon.words import in_gib

from ..memory.estimate import Estimate, choices, estimate

if TYPE_CHECKING:
    import torch

    from ..runs.run import Run


@contextmanager
def memory_errors(run: Run) -> Iterator[None]:
    """Raise a lack of GPU memory as the error that says which settings need less.

    Raises:
        RunError: in place of torch's.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, run) from error


def out_of_memory(error: torch.OutOfMemoryError, run: Run) -> RunError:
    """Which settings lower the peak, and to what: of those that `cogtrain plan` lists, the first that fits and
    the smallest."""
    import torch

    settings = run.settings
    card = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else sys.maxsize
    now = estimate(run, card=card)
    changes: dict[str, Estimate] = {}
    if settings.batch_size > 1:
        same = f"--batch-size 1 --accumulate {settings.accumulate * settings.batch_size}"
        changes[f"{same} (the same global batch)"] = estimate(run, card=card, batch=1)
    lower = [needs for needs in choices(run, card) if needs.peak < now.peak]
    if lower:
        fastest = next((needs for needs in lower if needs.fits(card)), None)
        for then in (fastest, min(lower, key=lambda needs: needs.peak)):
            if then:
                changes[_typed(then, now)] = then
    advice = []
    for change, then in changes.items():
        if then.peak < now.peak:
            takes = f", and {in_gib(then.host)} of host memory" if then.host > now.host else ""
            advice.append(f"{change}: about {in_gib(then.peak)} instead of {in_gib(now.peak)}{takes}")
    return RunError(
        "out of GPU memory",
        where=str(error).splitlines()[0],
        fix="; or ".join(advice) or "a smaller --resolution when encoding, or a GPU with more memory",
    )


def _typed(then: Estimate, now: Estimate) -> str:
    words = [f"--strategy {then.strategy}"] if then.strategy != now.strategy else []
    return " ".join([*words, f"--memory {then.memory}"] if then.memory != now.memory or not words else words)
