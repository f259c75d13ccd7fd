"""Every option of `launch`, which both programs have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..cli.settings import check_least, setting, size_of
from ..errors import SettingError

Scheduler = Literal["slurm", "kubernetes", "skypilot"]

# What all three take as a name, with room for what Kubernetes appends to it (63 characters in all).
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_MACHINES, _JOB, _FILE = "Machines", "Job", "File"


@dataclass(frozen=True)
class LaunchSettings:
    """Settings of ``cogtrain launch`` and ``cogprep launch``."""

    command: list[str] = setting(
        [], "what to run, with its options; checked now, not when the queue has come to it", shown="required",
        positional=True, after_dashes=True,
    )  # fmt: skip
    on: Scheduler | None = setting(None, "who starts it", shown="required", section=_MACHINES)
    nodes: int = setting(1, "machines", section=_MACHINES)
    gpus: int = setting(8, "GPUs of each machine; 0: none", section=_MACHINES)
    gpu: str | None = setting(
        None, "which card, by the scheduler's name for it: h100 (Slurm's type), NVIDIA-H100-80GB-HBM3 (the node "
        "label nvidia.com/gpu.product), H100 (SkyPilot, required)", section=_MACHINES,
    )  # fmt: skip
    cpus: int = setting(8, "CPU cores for each GPU, or of each machine without one", section=_MACHINES)
    host: str | None = setting(None, "memory of each machine, as 200GB", shown="the scheduler's own", section=_MACHINES)
    name: str | None = setting(None, "name of the job", shown="<command>-<name of --out>", section=_JOB)
    time: str | None = setting(
        None, "time limit, as 24h, 90m or 1-12:00:00 (Slurm: of each run between two requeues)",
        shown="the scheduler's own", section=_JOB,
    )  # fmt: skip
    grace: int = setting(300, "seconds to save in, before the time limit or once a job is pre-empted", section=_JOB)
    queue: str | None = setting(
        None, "Slurm: the partition; Kubernetes: a local queue of Kueue; SkyPilot: where, as aws or k8s",
        section=_JOB,
    )  # fmt: skip
    account: str | None = setting(None, "Slurm: the account that pays", section=_JOB)
    image: str | None = setting(
        None, "container image with this program in it (required but for Slurm, which needs Pyxis for one)",
        section=_JOB,
    )  # fmt: skip
    volume: str | None = setting(
        None, "storage that all machines share, and where it is mounted, as claim:/data: a claim (Kubernetes), a "
        "volume or a bucket as s3://mine (SkyPilot)", section=_JOB,
    )  # fmt: skip
    spot: bool = setting(False, "SkyPilot: machines that may be taken away", section=_JOB)
    line: list[str] = setting(
        [], "line of shell to run first, as 'module load cuda'; with Slurm also an option of sbatch, as "
        "'#SBATCH --constraint=ib'; again, for more", shown="none", section=_JOB, one_word=True,
    )  # fmt: skip
    file: Path | None = setting(None, "the job file", shown="<name>.sbatch, .yaml or .sky.yaml", section=_FILE)
    submit: bool = setting(False, "hand the file to the scheduler, too", section=_FILE)
    json: bool = setting(False, "print the result as JSON", section=_FILE)

    def __post_init__(self) -> None:
        if self.on is None:
            raise SettingError("for which scheduler?", where="--on", fix="--on slurm, kubernetes or skypilot")
        check_least(self, nodes=1, gpus=0, cpus=1, grace=1)
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise SettingError(
                f"{self.name!r} is no name for a job",
                where="--name",
                fix="at most 40 small letters, digits and dashes, a letter first",
            )
        _ = self.host_bytes
        if self.seconds is not None and self.seconds <= self.grace:
            raise SettingError(
                f"no time is left to train before the {self.grace} s to save in",
                where=f"--time {self.time}, --grace {self.grace}",
                fix="a longer --time, or a shorter --grace",
            )
        _ = self.mount

    @property
    def host_bytes(self) -> int | None:
        """--host in bytes."""
        return None if self.host is None else size_of(self, "host", "200GB")

    @property
    def seconds(self) -> int | None:
        """--time in seconds."""
        if self.time is None:
            return None
        if short := re.fullmatch(r"(\d{1,6})([smhd])", self.time):
            return int(short[1]) * _UNITS[short[2]]
        if clock := re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,4}):([0-5]\d):([0-5]\d)", self.time):
            days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
            return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        raise SettingError(f"{self.time!r} is no time", where="--time", fix="for example --time 24h, or 1-12:00:00")

    @property
    def mount(self) -> tuple[str, str] | None:
        """--volume as what it is and where it is mounted."""
        if self.volume is None:
            return None
        source, _, path = self.volume.rpartition(":/")
        if not source or not path or path.startswith("/"):
            raise SettingError(
                f"{self.volume!r} does not say where it is mounted", where="--volume", fix="for example claim:/data"
            )
        return source, f"/{path.rstrip('/')}"
