"""A run that its launcher starts again, with the same command line: it goes on in its own folder.

`torchrun --max-restarts`, and a job that Slurm queues again, give the same ``--resume`` each time. ``never``, or the
path of another run's checkpoint, is meant for the first. That this is a later one is told by what started the run
(`distributed.elastic`), which its folder's facts remember; a person who types the command again is not taken for it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cogcommon.errors import RunError
from cogcommon.files.ownership import is_file

from ..distributed.elastic import is_restart
from ..distributed.peers import Peers
from ..settings.training import TrainSettings
from .folder import FACTS_FILE, RunFacts, run_facts

RUNS = Path("runs")  # where folders lie that nobody has named


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
