"""`cogtrain launch`: a run as a job of Slurm, Kubernetes or SkyPilot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cogcommon.cli.progress import say
from cogcommon.errors import SettingError, ShardError
from cogcommon.jobs.job import Program
from cogcommon.jobs.launch import launch
from cogcommon.jobs.settings import LaunchSettings

from ..settings.training import LoraSettings, SftSettings, TrainSettings


def run(settings: LaunchSettings) -> None:
    """Write the job file, with a pattern for all shards of a folder, of which a shell has made names. As `launch`."""
    from ..data.shard_words import unexpanded

    def check_all(train: TrainSettings) -> None:
        _check_as_run(train, settings.nodes, max(1, settings.gpus))

    settings = dataclasses.replace(settings, command=unexpanded(settings.command))
    launch(settings, Program("cogtrain", {"lora": LoraSettings, "sft": SftSettings}, True, _check, check_all))


def _check(settings: TrainSettings, ours: bool) -> None:
    """Refuse a run that would not go on when it is started again, or that starts its processes by itself.

    Raises:
        SettingError: names the option.
    """
    if not settings.shards:
        raise SettingError("no shards", where="--shards", fix="--shards out/*.tar")
    if ours and (here := [word for word in settings.shards if "://" not in word]):
        _note_missing(here)
    if settings.out is None:
        raise SettingError(
            "a job that is started again would begin another run: without --out each gets a folder of its own",
            where="--out",
            fix="--out runs/mine",
        )
    if settings.resume == "never":
        raise SettingError(
            "a job that is started again would begin anew", where="--resume never", fix="leave --resume out"
        )
    if settings.nproc is not None:
        raise SettingError(
            "how many processes there are, the job says", where="--nproc", fix="leave it out; --gpus before the --"
        )


def _check_as_run(settings: TrainSettings, nodes: int, each: int) -> None:
    """Refuse what the run itself would on so many machines, of ``each`` processes. All its settings are known.

    Raises:
        SettingError: names the option.
    """
    from ..distributed.groups import data_groups
    from ..runs.global_batch import with_accumulation
    from ..runs.opening import check_validation

    check_validation(settings)
    with_accumulation(settings, data_groups(nodes * each), None, each, [])


def _note_missing(words: list[str]) -> None:
    """Say where there are no shards yet; an encode that runs before may write them."""
    from ..data.shard_words import expand

    try:
        missing = [found.tar.shown for found in expand(words, "--shards")]
        missing = [name for name in missing if not Path(name).exists()]
    except ShardError as error:
        missing = [error.what]
    if missing:
        say(f"note: no shards are there yet: {missing[0]}")
