"""What torchrun does with the processes of a run, seen from one of them.

After any exit code but 0 it starts them again, as often as ``--max-restarts`` says, and whenever a host joins; the
command line is the same, RANK and WORLD_SIZE may be others (torch/distributed/elastic/agent/server/api.py).
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_RUN_ID = "TORCHELASTIC_RUN_ID"  # which the launcher sets for its processes, and is not set for itself
_SLURM = "slurm "


def restarts_left() -> int:
    """How often the launcher will still start this process again if it fails."""
    most, made = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return int(most) - int(made)


def launcher() -> str:
    """Which process of which machine has started this one, so that no other has the same; empty: no launcher."""
    agent = _agent()
    if agent is None:
        return ""
    boot, stat = Path("/proc/sys/kernel/random/boot_id"), Path(f"/proc/{agent.pid}/stat")
    try:  # its start in ticks since the machine's, which setting the clock does not change
        name = f"{boot.read_text()} {agent.pid} {stat.read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        name = f"{os.uname().nodename} {agent.pid} {agent.create_time():.0f}"
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def slurm_job() -> str:
    """The job of Slurm that this process belongs to, which keeps its number when it is queued again; empty: none."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{_SLURM}{job}" if job else ""


def is_restart(before: Collection[str], now: Collection[str]) -> bool:
    """Whether a run is started again by what has started it before, and not by a person.

    Args:
        before, now: its launchers, and its job of Slurm. Of several hosts at least one has outlived the others.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0) > 0
    return any(one in before and (requeued or not one.startswith(_SLURM)) for one in now)


class _Wish:
    final = False


def not_again() -> None:
    """Have the launcher end when this process does (`at_end`): it would start it again only to be refused again."""
    _Wish.final = True


def at_end() -> None:
    """The last act of a process, once everything is said."""
    if _Wish.final:
        end_launcher()


def end_launcher() -> None:
    """Send the launcher of this host a SIGTERM, after which it ends its processes and itself; one of them does so."""
    if restarts_left() <= 0 or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    agent = _agent()
    with suppress(Exception):  # it has ended
        if agent and _is_torchs(agent):
            agent.send_signal(signal.SIGTERM)


def _agent() -> psutil.Process | None:
    """The launcher's process on this host: the nearest one above that has not got its variables."""
    if _RUN_ID not in os.environ:
        return None
    import psutil

    for process in psutil.Process().parents():
        with suppress(psutil.Error):
            if _RUN_ID not in process.environ():
                return process
    return None


def _is_torchs(process: psutil.Process) -> bool:
    """Not whatever has taken in the children of a launcher that has died."""
    return any("torch" in word or "accelerate" in word for word in process.cmdline())
