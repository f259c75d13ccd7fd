"""`cogprep launch`: an encode as a job of Slurm, Kubernetes or SkyPilot, which divides it among machines."""

from __future__ import annotations

from cogcommon.errors import ModelError, SettingError
from cogcommon.jobs.job import Program
from cogcommon.jobs.launch import launch
from cogcommon.jobs.settings import LaunchSettings

from ..dataset.lists import check_root
from ..plan.folder import read_contract
from ..settings.encode import EncodeSettings
from ..store.outlet import is_address
from ..store.proof import check_shards_output


def run(settings: LaunchSettings) -> None:
    """Write the job file. Raises as `launch`."""
    launch(settings, Program("cogprep", {"encode": EncodeSettings}, False, _check))


def _check(settings: EncodeSettings, ours: bool) -> None:
    """Refuse an encode that divides its work by itself, one of clips that are not there, or one that OUT refuses.

    Raises:
        SettingError: names the option.
        DataRootError: there is no such data root.
        ShardError: the output folder holds files that are not ours, or a contract that is damaged.
    """
    if settings.worker is not None or settings.gpus != "all":
        name = "--gpus" if settings.worker is None else "--worker"
        raise SettingError(
            "which GPU encodes what, the job says", where=name, fix="leave it out; --nodes and --gpus before the --"
        )
    if settings.engine != "local":
        raise SettingError(
            "a job divides the work by itself; each of its processes would begin an encode of the whole",
            where=f"--engine {settings.engine}",
            fix="leave it out; or start Ray on the machines, and cogprep encode on one of them",
        )
    if ours:
        check_root(settings.root, settings.prompts, settings.videos)
        if not is_address(settings.out):
            check_shards_output(settings.out, "--out", (settings.prompts, settings.videos))
            _check_contract(settings)


def _check_contract(settings: EncodeSettings) -> None:
    """Refuse settings that differ from those of the shards that are there. Reads no weights.

    Raises:
        SettingError: they differ.
    """
    if (theirs := read_contract(settings.out)) is None:
        return
    from .foretell import check_settings

    try:
        checkpoint = settings.open_model(geometry=True)
    except ModelError:  # it may be on the job's machines
        return
    check_settings(settings, checkpoint, theirs)
