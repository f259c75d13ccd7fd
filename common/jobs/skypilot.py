"""A managed job of SkyPilot, which starts it again elsewhere when its machines are taken away.

The dataclasses hold the fields that we write: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import SettingError
from ..store.address import address_of
from .document import from_yaml, said, to_yaml
from .job import Job


@dataclass(frozen=True)
class Recovery:
    max_restarts_on_errors: int


@dataclass(frozen=True)
class Resources:
    image_id: str
    cpus: str
    accelerators: str | None = None
    memory: str | None = None
    infra: str | None = None
    use_spot: bool | None = said("Machines that may be taken away at any moment.", None)
    job_recovery: Recovery | None = said(
        "A job whose machines are gone is started anew by itself; so often it is when the command fails, too.", None
    )


@dataclass(frozen=True)
class Bucket:
    source: str
    mode: Literal["MOUNT_CACHED"] = "MOUNT_CACHED"


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    num_nodes: int
    resources: Resources
    volumes: dict[str, str] = said("A volume that all machines share: `sky volumes apply` makes it.", {})
    file_mounts: dict[str, Bucket] = said(
        "A bucket as a folder. What one machine writes, another sees late: for a run on several machines, take a "
        "volume.", {},
    )  # fmt: skip
    run: str = said("What every machine runs.")


def render(job: Job) -> str:
    """The task; `sky jobs launch` carries it out and takes its machines down, `sky launch` leaves them up."""
    settings = job.settings
    source, path = settings.mount or ("", "")
    bucket = address_of(source) is not None
    if bucket and job.meets:
        raise SettingError(
            "the machines of a run must see at once what one of them writes, which a bucket does not give",
            where=f"--volume {settings.volume}",
            fix="a volume of SkyPilot (sky volumes apply), or --nodes 1",
        )
    task = Task(
        name=job.name,
        num_nodes=settings.nodes,
        resources=Resources(
            infra=settings.queue,
            accelerators=f"{settings.gpu}:{settings.gpus}" if settings.gpus else None,
            cpus=f"{settings.cpus * job.processes}+",
            memory=f"{-(-host >> 30)}+" if (host := settings.host_bytes) else None,
            use_spot=settings.spot or None,
            image_id=f"docker:{settings.image}",
            job_recovery=Recovery(3),
        ),
        volumes={path: source} if source and not bucket else {},
        file_mounts={path: Bucket(source)} if bucket else {},
        run="\n".join(_run(job, path)),
    )
    head = f"# {job.program} {job.words[0]} on {job.machines}, for SkyPilot.\n"
    return f"{head}# A managed job: its machines go when it ends.\n{to_yaml(task)}"


def _run(job: Job, path: str) -> list[str]:
    part = (
        []
        if job.together or job.settings.nodes == 1
        else ['--worker "$((SKYPILOT_NODE_RANK + 1))/$SKYPILOT_NUM_NODES"']
    )
    return [
        *([f"cd {path}"] if path else []),
        *job.shell_lines(),
        *job.meeting('"$SKYPILOT_NODE_RANK"', '"$(head -n1 <<< "$SKYPILOT_NODE_IPS")"'),
        job.call(*part),
    ]


def check(text: str) -> str:
    """Read the file back as the document that it is. Returns and raises as `slurm.check`."""
    try:
        from_yaml(Task, text)
    except ValueError as error:
        raise SettingError(f"this is no task of SkyPilot: {error}", where="the job file") from error
    return "a task of SkyPilot"


def shell_of(text: str) -> list[str]:
    """The shell in the file."""
    return [from_yaml(Task, text).run]
