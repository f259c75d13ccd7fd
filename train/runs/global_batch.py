"""The global batch of a run: how many samples an optimizer step takes over all processes.

It decides the losses, and the number of processes does not. So where hosts are lost or added, the global batch stays
and the accumulation steps follow. Sizes are in samples.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cogcommon.errors import RunError, SettingError
from cogcommon.words import counted

from ..distributed.groups import DataGroups
from .folder import CONFIG_FILE, FACTS_FILE, run_facts

if TYPE_CHECKING:
    from ..settings.training import TrainSettings
    from .checkpoint import SavedCheckpoint

FACT = "global batch"  # what a checkpoint calls it
_NAMED = 6  # numbers that a message names at most


def with_accumulation(
    settings: TrainSettings, groups: DataGroups, resume: SavedCheckpoint | None, here: int, notes: list[str]
) -> TrainSettings:
    """The settings with the accumulation steps that make up the global batch on these processes.

    It is what ``--global-batch`` says. Without it, a run that is resumed with the accumulation of its first start keeps
    the checkpoint's, whatever the batch size and the number of processes: any other would be refused.

    Args:
        here: processes on each host; for the message.

    Raises:
        SettingError: it does not divide; says on which numbers of processes it does.
    """
    wanted = settings.global_batch
    if wanted is None and resume is not None and resume.state.settings.get("accumulate") == settings.accumulate:
        wanted = int(resume.state.facts.get(FACT, 0)) or None
    if wanted is None:
        return settings
    each = groups.count * settings.batch_size
    if wanted % each:
        raise SettingError(
            f"a global batch of {wanted} cannot be divided among {_processes(groups.count)} "
            f"with --batch-size {settings.batch_size}",
            where=("--global-batch" if settings.global_batch else "--batch-size")
            + (f", {resume.folder}" if resume else ""),
            fix=what_divides(wanted, settings.batch_size, groups.count, here)
            + f"; or --global-batch {-(-wanted // each) * each}" * (resume is None),
        )
    steps = wanted // each
    if resume is not None:
        size, changed = resume.state.settings.get("batch_size"), []
        if resume.state.world != groups.world:
            changed.append(f"on {_processes(groups.world)} instead of {resume.state.world}")
        if size != settings.batch_size:
            changed.append(f"with --batch-size {settings.batch_size} instead of {size}")
        if changed:
            notes.append(
                f"{', '.join(changed)}: {counted(steps, 'accumulation step')} of {each} keep{'s' * (steps == 1)} the "
                f"global batch of {wanted}"
            )
    return dataclasses.replace(settings, accumulate=steps, global_batch=None)


def told_of_another(settings: TrainSettings, now: int) -> list[str]:
    """A note where a new run by another one's config.toml takes more or fewer samples in a step.

    Args:
        now: its global batch.
    """
    config = settings.config
    if config is None or config.name != CONFIG_FILE or not (config.parent / FACTS_FILE).is_file():
        return []
    try:
        then = run_facts(config.parent)
    except RunError:
        return []
    if then.global_batch == now:
        return []
    return [
        f"a step takes {counted(now, 'sample')}, and that of {config.parent} took {then.global_batch}, on "
        f"{_processes(then.processes)}: --global-batch {then.global_batch} takes as many"
    ]


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
        parts.append(f"--batch-size {_either(sizes[-_NAMED:])} on {_processes(count)}")
    return "; or ".join(parts) or what_divides(wanted, 1, count, here) + " with --batch-size 1"


def _either(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _processes(count: int) -> str:
    return counted(count, "process", "processes")
