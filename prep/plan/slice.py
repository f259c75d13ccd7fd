"""Which of the planned shards this process takes: a fixed division, without communication."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from cogcommon.errors import SettingError

from .plan import Drop, PlannedShard

S = TypeVar("S", PlannedShard, Drop)

POD = "the indexed job"  # a source of slices
_POD, _PODS = "JOB_COMPLETION_INDEX", ("JOB_COMPLETION_COUNT", "JOB_COMPLETIONS")


@dataclass(frozen=True)
class Slice:
    """Worker ``index`` (from 1) of ``count``; ``source`` is where that was said."""

    index: int
    count: int
    source: str

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def index_of(self, number: int) -> int:
        """The worker, from 1, that takes a shard."""
        return number % self.count + 1

    def takes(self, number: int) -> bool:
        return self.index_of(number) == self.index

    def of(self, shards: Iterable[S]) -> list[S]:
        return [shard for shard in shards if self.takes(shard.number)]

    def split(self, part: int, parts: int) -> Slice:
        """The ``part``-th (from 0) of ``parts`` equal parts of this slice, for several GPUs of a host."""
        return Slice((self.index - 1) * parts + part + 1, self.count * parts, self.source)


def local_rank(environment: Mapping[str, str]) -> int:
    """Which GPU of this host is ours, as the launcher says; 0 without one."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environment.get(name, "").isdigit() and (name == "LOCAL_RANK" or "SLURM_STEP_ID" in environment):
            return int(environment[name])
    return 0


def local_count(environment: Mapping[str, str]) -> int:
    """How many processes of ours share this host, as the launcher says; 1 without one."""
    if (said := environment.get("LOCAL_WORLD_SIZE", "")).isdigit():
        return max(1, int(said))
    if "SLURM_STEP_ID" in environment and (counts := environment.get("SLURM_STEP_TASKS_PER_NODE")):
        from cogcommon.jobs.slurm import tasks_of_a_host

        return tasks_of_a_host(counts)
    return 1


def choose_slice(worker: str | None, environment: Mapping[str, str]) -> Slice:
    """The slice asked for, or the one that the launcher's environment implies.

    SLURM_* is believed only inside an srun step of more than one task: an sbatch script's own shell
    has SLURM_PROCID=0 and SLURM_NTASKS=8 too, and would encode an eighth and call it done. Kubernetes tells the
    pod of an indexed job its index, and nobody how many there are: that the manifest has to say.

    Raises:
        SettingError: ``worker`` is not i/n with 1 <= i <= n; an indexed job does not say how many pods it has.
    """
    if worker is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", worker)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise SettingError(
                f"{worker!r} is not a slice", where="--worker", fix="for example --worker 1/8 up to --worker 8/8"
            )
        return Slice(int(match[1]), int(match[2]), "--worker")
    for rank, size, source, counts in (
        ("RANK", "WORLD_SIZE", "RANK and WORLD_SIZE", True),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "the srun step", "SLURM_STEP_ID" in environment),
    ):
        if counts and environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
            index, count = int(environment[rank]) + 1, int(environment[size])
            if count > 1 and index <= count:
                return Slice(index, count, source)
    if environment.get(_POD, "").isdigit():
        count = next((int(environment[name]) for name in _PODS if environment.get(name, "").isdigit()), 0)
        index = int(environment[_POD]) + 1
        if not 1 <= index <= count:
            raise SettingError(
                f"pod {index} of an indexed job of {count}" if count else "an indexed job that does not say its count",
                where=f"{_POD}={environment[_POD]}, {_PODS[0]}={environment.get(_PODS[0], '')}",
                fix=f"set {_PODS[0]} to the job's completions, in the env of its manifest; "
                f"or --worker $(({_POD} + 1))/N",
            )
        return Slice(index, count, POD)
    return Slice(1, 1, "default")
