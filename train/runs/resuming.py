"""How a run goes on: from which checkpoint, and which of its settings stay what they were.

`torchrun --max-restarts`, and a job that Slurm queues again, give the same ``--resume`` each time. ``never``, or the
path of another run's checkpoint, is meant for the first. That this is a later one is told by what started the run
(`distributed.elastic`), which its folder's facts remember; a person who types the command again is not taken for it.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from pathlib import Path

from cogcommon.errors import RunError
from cogcommon.files.ownership import is_file

from ..distributed.elastic import is_restart
from ..distributed.peers import Peers
from ..settings.training import TrainSettings
from .checkpoint import SavedCheckpoint, find_checkpoint, list_checkpoints
from .config import settings_json
from .folder import FACTS_FILE, RUNS, RunFacts, run_facts
from .mirror.restore import restore
from .run import PRECISION, STRATEGY

# They say where and how long, not what is trained.
_FREE = {"out", "config", "resume", "steps", "epochs", "nproc", "batch_size", "accumulate", "global_batch", "shards",
         "validate_shards", "save_every", "save_minutes", "keep", "patience", "validate_every",
         "validate_videos", "validate_prompt", "validate_prompts", "validate_image", "tracker", "model", "memory",
         "compile", "deepspeed", "nvme", "on_nonfinite", "strategy", "precision",
         "cache", "cache_size", "init_lora", "repeat", "follow", "mirror"}  # fmt: skip


def find_resume(settings: TrainSettings, peers: Peers) -> SavedCheckpoint | None:
    """The checkpoint that ``--resume`` asks for; of a run that its launcher starts again, its own."""
    own = own_folder(settings, peers)
    if own is not None and list_checkpoints(own):
        if settings.mirror is not None:  # the job may have gone further on another machine since
            restore(own, settings.mirror, seconds_to_wait(own, peers))
        return find_checkpoint(own)
    if settings.resume == "never":
        return None
    if settings.resume != "auto":
        return find_checkpoint(Path(settings.resume))
    if settings.mirror is not None and settings.out is not None:
        restore(settings.out, settings.mirror, seconds_to_wait(settings.out, peers))
    if settings.out is not None and list_checkpoints(settings.out):
        return find_checkpoint(settings.out)
    return None


def is_own(folder: Path, peers: Peers) -> bool:
    """Whether a folder is that of the run that these processes have been started again for."""
    facts = _facts(folder)
    return facts is not None and is_restart(facts.started_by, peers.started_by)


def own_folder(settings: TrainSettings, peers: Peers) -> Path | None:
    """The folder of the run that these processes have been started again for; None: this is its first start."""
    if not peers.started_by:
        return None
    if settings.out is not None:
        return settings.out if is_own(settings.out, peers) else None
    newest = sorted(RUNS.glob(f"*/{FACTS_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    return next((file.parent for file in newest if is_own(file.parent, peers)), None)


def seconds_to_wait(folder: Path, peers: Peers) -> float:
    """How long another process may yet hold the folder, which the launcher has ended, or its host's network has."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 or is_own(folder, peers)
    return 120.0 if restarted else 0.0  # a server of NFS keeps a lost host's locks for 90 s


def _facts(folder: Path) -> RunFacts | None:
    with suppress(RunError):
        if is_file(folder / FACTS_FILE):
            return run_facts(folder)
    return None


def as_it_began(settings: TrainSettings, resume: SavedCheckpoint | None) -> TrainSettings:
    """What is chosen by the number of processes and by the device stays what it was when the run began."""
    if resume is None:
        return settings
    facts, chosen = resume.state.facts, {}
    if settings.strategy == "auto" and settings.deepspeed is None and STRATEGY in facts:
        chosen["strategy"] = facts[STRATEGY]
    if settings.precision is None and PRECISION in facts:
        chosen["precision"] = facts[PRECISION]
    return dataclasses.replace(settings, **chosen)


def has_nothing_left(settings: TrainSettings, found: SavedCheckpoint, steps: int) -> bool:
    """Whether a run has made all its steps, or has ended before by a ``--patience`` that is no smaller than now's."""
    if found.state.step >= steps:
        return True
    patience = found.state.settings.get("patience")
    if not (found.newest and patience and settings.patience and settings.patience <= patience):
        return False
    try:
        facts = run_facts(found.folder.parent)
    except RunError:
        return False
    return bool(facts.ended) and facts.finished == found.state.step


def as_trained(settings: TrainSettings, found: SavedCheckpoint) -> TrainSettings:
    """The settings for a run of which nothing is left to train: what made its last step is what it says of itself.

    Where, how often and on what machine is as given; ``--keep-best`` stays on.
    """
    then = found.state.settings
    now = settings_json(settings)
    before = {name: then[name] for name in now if name in then and name not in _FREE and now[name] != then[name]}
    if settings.keep_best:
        before["keep_best"] = True
    return dataclasses.replace(settings, **before)


def changes_since(found: SavedCheckpoint, settings: TrainSettings) -> list[str]:
    """What is trained in another way than up to the checkpoint, in words."""
    now = settings_json(settings)
    return [
        f"{settings.option(name)} {found.state.settings.get(name)} -> {value}"
        for name, value in now.items()
        if name not in _FREE
        and not (name == "keep_best" and value)  # which takes nothing away, and which a finished run can still do
        and name in found.state.settings
        and found.state.settings[name] != value
    ]
