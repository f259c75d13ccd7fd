"""Starts the processes of a run, or joins those that torchrun, accelerate or srun started."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogcommon.cli.progress import say
from cogcommon.errors import SettingError
from cogcommon.libraries import importing

from ..settings.training import TrainSettings
from .leaving import PeerLost
from .signals import StopRequest, end_by

_MEET_S = 600  # for all hosts to be there: images are pulled, nodes boot
_SLURM_PORTS = (29500, 3000)  # first port, and how many: below those that Linux gives to anyone (32768)


def join_environment() -> bool:
    """Whether a launcher started this process; sets RANK, WORLD_SIZE, ... for one that srun started.

    torchrun and accelerate set RANK and WORLD_SIZE. srun sets SLURM_*, which
    count only inside a step of more than one task: a batch script's own
    process has them too.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ or tasks < 2:
        return False
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    step = os.environ["SLURM_STEP_ID"]
    job = int(os.environ.get("SLURM_JOB_ID", "0")) + 97 * int(step if step.isdecimal() else 0)  # a job may run two
    from cogcommon.jobs.slurm import tasks_of_a_host

    first, count = _SLURM_PORTS
    os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=str(tasks))
    os.environ.setdefault("LOCAL_RANK", str(_gpu_of_task(int(os.environ.get("SLURM_LOCALID", "0")))))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(tasks_of_a_host(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))))
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(first + job % count))
    return True


def _gpu_of_task(task: int) -> int:
    """The number of a task's GPU among those it sees: all of the host's, or with ``--gpus-per-task`` its own alone."""
    from cogcommon.model.device import visible_gpus

    return task % max(1, visible_gpus())


def first_host(nodes: str) -> str:
    """The first host of SLURM's list: ``gpu[007-009,12]-ib0,big1`` is ``gpu007-ib0``."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[\]])+", nodes)  # up to a comma outside of brackets
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else "127.0.0.1"


@dataclass(frozen=True)
class Hosts:
    """The hosts of a run that are not srun's: how many, which this is (from 0), and where they meet."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1:0"

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Hosts:
        """As torchrun's own variables tell, which `cogtrain launch` and Kubeflow's TrainJob set; one host without them.

        Raises:
            SettingError: they do not tell all.
        """
        if environment.get("PET_NNODES", "1") == "1":
            return cls()
        names = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
        count, rank, host, port = (environment.get(name, "") for name in names)
        if not (count.isdigit() and rank.isdigit() and int(rank) < int(count) and host and port.isdigit()):
            raise SettingError(
                "this host does not know the others of the run",
                where=", ".join(f"{name}={environment.get(name, '')}" for name in names),
                fix="export the number of hosts, this one's from 0, and the first one's address and port; or torchrun",
            )
        return cls(int(count), int(rank), f"{host}:{port}")


def wanted_processes(settings: TrainSettings) -> int:
    """``--nproc``, else the GPUs of this host, at least one.

    Raises:
        SettingError: more than there are GPUs.
    """
    with importing():
        import torch

    gpus = torch.cuda.device_count()
    if settings.nproc is not None and 0 < gpus < settings.nproc:
        raise SettingError(f"{settings.nproc} processes on {gpus} GPUs", where="--nproc", fix=f"--nproc {gpus}")
    return settings.nproc or max(1, gpus)


def relaunch(processes: int, hosts: Hosts = Hosts()) -> int:
    """Run this command again in ``processes`` processes on this host, through torch's elastic launcher.

    Args:
        hosts: each of which does the same.

    Returns:
        The exit code: 0, or that of the process that ended first.

    Raises:
        PeerLost: a process was killed.
    """
    # The launcher would pass a signal on and kill everything 30 s later, which is too soon to save a
    # large model. We pass it on ourselves and let the processes end by themselves; one is left to the launcher.
    # torch 2.8 reads the environment, newer ones the field.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    where: dict[str, Any] = {"rdzv_backend": "c10d", "local_addr": "127.0.0.1"}  # its own name need not resolve
    if hosts.count > 1:
        where = {"rdzv_backend": "static", "rdzv_configs": {"rank": hosts.rank, "timeout": _MEET_S}}
    newer: dict[str, Any] = {"signals_to_handle": "SIGQUIT"} if hasattr(LaunchConfig, "signals_to_handle") else {}
    config = LaunchConfig(
        run_id="cogtrain" if hosts.count > 1 else str(os.getpid()),
        min_nodes=hosts.count,
        max_nodes=hosts.count,
        nproc_per_node=processes,
        rdzv_endpoint=hosts.address,
        max_restarts=0,
        monitor_interval=0.2,
        **where,
        **newer,
    )
    passing = _PassOn()
    try:
        with passing.listening():
            elastic_launch(config, sys.executable)("-m", "cogtrain", *sys.argv[1:])
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if passing.signal and failure.exitcode in (-passing.signal, -signal.SIGKILL):
            say("stopped; nothing was trained since the last checkpoint, if there is one")
            return 128 + passing.signal
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        raise PeerLost(
            f"process {rank} of {processes} was killed by signal {-failure.exitcode}",
            where="its last lines are above; the system's log says whether memory ran out",
            fix="run the same command with --out and the folder of the run: it continues from its last checkpoint",
        ) from error


class _PassOn(StopRequest):
    """Passes a signal on to the processes of the run; the second time it ends them, since they may be stuck."""

    def take(self, number: int, again: bool) -> None:
        import psutil

        children = psutil.Process().children()
        if not children:
            end_by(number)
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if again else number)
