"""The global batch of a run: how many samples an optimizer step takes over all processes.

It decides the losses, and the number of processes does not. So where hosts are lost or added, the global batch stays
and the accumulation steps follow. Sizes are in samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cogcommon.errors import SettingError
from cogcommon.words import counted

from ..distributed.groups import DataGroups

if TYPE_CHECKING:
    from ..settings.training import TrainSettings
    from .checkpoint import SavedCheckpoint

FACT = "global batch"  # what a checkpoint calls it
_NAMED = 6  # numbers that a message names at most


def with_accumulation(
    settings: TrainSettings, groups: DataGroups, resume: SavedCheckpoint | None, here: int, notes: list[str]
) -> TrainSettings:
    """The settings with the accumulation steps that make up the global batch on these processes.

    It is what ``--global-batch`` says. Without it, a run that is resumed with the batch size and accumulation of its
    first start keeps the checkpoint's, whatever the number of processes.

    Args:
        here: processes on each host; for the message.

    Raises:
        SettingError: it does not divide; says on which numbers of processes it does.
    """
    wanted = settings.global_batch
    if wanted is None and resume is not None and _as_begun(settings, resume.state.settings):
        wanted = int(resume.state.facts.get(FACT, 0)) or None
    if wanted is None:
        return settings
    each = groups.count * settings.batch_size
    if wanted % each:
        raise SettingError(
            f"a global batch of {wanted} cannot be divided among {_processes(groups.count)} "
            f"with --batch-size {settings.batch_size}",
            where="--global-batch" if resume is None else f"--global-batch, {resume.folder}",
            fix=what_divides(wanted, settings.batch_size, groups.count, here),
        )
    steps = wanted // each
    if resume is not None and resume.state.world != groups.world:
        notes.append(
            f"on {_processes(groups.world)} instead of {resume.state.world}: {counted(steps, 'accumulation step')} "
            f"of {each} keep{'s' * (steps == 1)} the global batch of {wanted}"
        )
    return dataclasses.replace(settings, accumulate=steps, global_batch=None)


def _as_begun(settings: TrainSettings, then: Mapping[str, Any]) -> bool:
    """Whether batch size and accumulation are as they were given when the checkpoint was written."""
    return all(then.get(name) == getattr(settings, name) for name in ("batch_size", "accumulate"))


def what_divides(wanted: int, size: int, count: int, here: int) -> str:
    """What to start instead: on how many processes, the nearest numbers, and with which batch size on as many.

    Args:
        wanted: the global batch.
        size: samples per process and accumulation step.
        count: processes that there are, ``here`` of them on each host.
    """
    works = [number for number in range(1, wanted // size + 1) if wanted % (number * size) == 0]
    hosts = [number for number in works if number % here == 0] if 1 < here < count and count % here == 0 else []
    near = sorted(sorted(hosts or works, key=lambda number: abs(number - count))[:_NAMED])
    parts = []
    if near:
        told = f" ({_either([number // here for number in near])} hosts of {here})" if hosts else ""
        parts.append(f"start {_either(near)} {'process' if near == [1] else 'processes'}{told}")
    sizes = [number for number in range(1, wanted // count + 1) if wanted % (count * number) == 0]
    if sizes:
        parts.append(f"--batch-size {_either(sizes[-_NAMED:])} on {'this one' if count == 1 else f'these {count}'}")
    return "; or ".join(parts) or what_divides(wanted, 1, count, here) + " with --batch-size 1"


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _processes(count: int) -> str:
    return counted(count, "process", "processes")
