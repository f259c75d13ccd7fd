"""A job for Kubernetes: a JobSet for a run on several machines, else an indexed Job.

Why a JobSet: the processes of a run must be there together, find each other by name, and be started again together,
which a Job cannot do. Kubeflow's TrainJob is made into a JobSet by its operator, through a runtime that each cluster
names and fills as it likes; the JobSet itself says all in one file, and needs only its own controller.

The dataclasses hold the fields that we write, of batch/v1 and core/v1 (Kubernetes 1.31 or newer) and of
jobset.x-k8s.io/v1alpha2: https://kubernetes.io/docs/concepts/workloads/controllers/job, https://jobset.sigs.k8s.io
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from ..errors import SettingError
from .document import from_yaml, said, to_yaml
from .job import Job

_INDEX = "batch.kubernetes.io/job-completion-index"
_STOPPED = [143]  # exit codes of a process that was asked to stop, by TERM, and has saved
_SHM, _DATA = "shm", "data"  # names of volumes
_GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class Metadata:
    name: str
    labels: dict[str, str] = said("The queue of Kueue that admits the job.", {})


@dataclass(frozen=True)
class Variable:
    name: str
    value: str


@dataclass(frozen=True)
class Resources:
    limits: dict[str, int | str] = field(default_factory=dict)
    requests: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mount:
    name: str
    mountPath: str


@dataclass(frozen=True, kw_only=True)
class Container:
    name: str
    image: str
    workingDir: str | None = said("Paths begin here.", None)
    env: list[Variable] = said("Kubernetes tells a pod its number, but not how many there are.", [])
    command: list[str]
    args: list[str] = said("The command. `exec`: it is process 1 then, and gets TERM itself when the pod is to go.")
    resources: Resources
    volumeMounts: list[Mount]


@dataclass(frozen=True)
class Claim:
    claimName: str


@dataclass(frozen=True)
class EmptyDir:
    medium: Literal["Memory"] = "Memory"


@dataclass(frozen=True)
class Volume:
    name: str
    emptyDir: EmptyDir | None = None
    persistentVolumeClaim: Claim | None = None


@dataclass(frozen=True, kw_only=True)
class PodSpec:
    restartPolicy: Literal["Never"]
    terminationGracePeriodSeconds: int = said(
        "A pod that is to go (pre-empted, its node drained, the job deleted) gets TERM: it saves, and has so many "
        "seconds for it."
    )
    nodeSelector: dict[str, str] = said("Which card, as NVIDIA's GPU feature discovery labels the nodes.", {})
    containers: list[Container]
    volumes: list[Volume] = said(
        "Shared memory, of which a container has 64 MB by itself, and NCCL needs more; and the shared storage."
    )


@dataclass(frozen=True)
class PodTemplate:
    spec: PodSpec


@dataclass(frozen=True)
class OnCodes:
    operator: Literal["In"]
    values: list[int]


@dataclass(frozen=True)
class OnCondition:
    type: Literal["DisruptionTarget"]
    status: Literal["True"]


@dataclass(frozen=True)
class PodRule:
    action: Literal["FailJob", "Ignore"]
    onPodConditions: list[OnCondition] = field(default_factory=list)
    onExitCodes: OnCodes | None = None


@dataclass(frozen=True)
class PodPolicy:
    rules: list[PodRule]


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    completionMode: Literal["Indexed"]
    completions: int
    parallelism: int
    backoffLimit: int | None = said("One pod that fails ends all: they are a run together.", None)
    backoffLimitPerIndex: int | None = said("How often a pod that fails is started again.", None)
    podFailurePolicy: PodPolicy | None = said(
        "Pods that the cluster takes away, or that have saved and stopped (143), do not count as failures: they are "
        "started again, and go on. To stop for good, delete the job; it saves then, too.",
        None,
    )
    activeDeadlineSeconds: int | None = said(
        "The time limit. Then the pods get TERM. To go on, delete the job and apply this file again.", None
    )
    template: PodTemplate


@dataclass(frozen=True)
class IndexedJob:
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


@dataclass(frozen=True)
class JobTemplate:
    spec: JobSpec


@dataclass(frozen=True)
class ReplicatedJob:
    name: str
    replicas: int
    template: JobTemplate


@dataclass(frozen=True)
class SetRule:
    name: str
    action: Literal["FailJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[Literal["DeadlineExceeded", "PodFailurePolicy"]]


@dataclass(frozen=True)
class FailurePolicy:
    maxRestarts: int
    rules: list[SetRule] = said("What does not count among these: pods that were taken away. What ends it: its time.")


@dataclass(frozen=True, kw_only=True)
class JobSetSpec:
    failurePolicy: FailurePolicy = said(
        "When a pod fails, all are started again, so often; the run goes on from its last checkpoint."
    )
    replicatedJobs: list[ReplicatedJob]


@dataclass(frozen=True)
class JobSet:
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


def render(job: Job) -> str:
    """The manifest; `kubectl` puts it into the namespace of its context."""
    settings = job.settings
    metadata = Metadata(job.name, {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {})
    head = f"# {job.program} {job.words[0]} on {job.machines}, for Kubernetes"
    if not job.meets:
        head += ": an indexed Job.\n"
        if not job.together:
            head += "# Each pod encodes its own part of the shards.\n"
        return head + to_yaml(IndexedJob("batch/v1", "Job", metadata, _spec(job)))
    head += f": a JobSet, whose pods are one run.\n# The cluster needs its controller: {_SETUP}\n"
    rules = [
        SetRule("timeIsUp", "FailJobSet", ["DeadlineExceeded"]),
        SetRule("takenAway", "RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"]),
    ]
    workers = ReplicatedJob("workers", 1, JobTemplate(_spec(job)))
    spec = JobSetSpec(failurePolicy=FailurePolicy(3, rules), replicatedJobs=[workers])
    return head + to_yaml(JobSet("jobset.x-k8s.io/v1alpha2", "JobSet", metadata, spec))


_SETUP = "https://jobset.sigs.k8s.io/docs/installation"


def _spec(job: Job) -> JobSpec:
    settings = job.settings
    taken = [OnCondition("DisruptionTarget", "True")]
    action: Literal["FailJob", "Ignore"] = "FailJob" if job.meets else "Ignore"
    rules = [PodRule(action, onPodConditions=taken), PodRule(action, onExitCodes=OnCodes("In", _STOPPED))]
    return JobSpec(
        completionMode="Indexed",
        completions=settings.nodes,
        parallelism=settings.nodes,
        backoffLimit=0 if job.meets else None,
        backoffLimitPerIndex=None if job.meets else 3,
        podFailurePolicy=PodPolicy(rules),
        activeDeadlineSeconds=settings.seconds,
        template=PodTemplate(_pod(job)),
    )


def _pod(job: Job) -> PodSpec:
    settings = job.settings
    assert settings.image is not None  # Target.needs
    mounts, volumes = [Mount(_SHM, "/dev/shm")], [Volume(_SHM, emptyDir=EmptyDir())]
    if settings.mount:
        mounts.append(Mount(_DATA, settings.mount[1]))
        volumes.append(Volume(_DATA, persistentVolumeClaim=Claim(settings.mount[0])))
    limits: dict[str, int | str] = {_GPU: settings.gpus} if settings.gpus else {}
    requests: dict[str, int | str] = {"cpu": settings.cpus * job.processes}
    if host := settings.host_bytes:
        requests["memory"] = host
    meeting = job.meeting('"$JOB_COMPLETION_INDEX"', f"{job.name}-workers-0-0.{job.name}")
    container = Container(
        name=job.program,
        image=settings.image,
        workingDir=settings.mount[1] if settings.mount else None,
        command=["/bin/bash", "-c"],
        args=["\n".join([*job.shell_lines(), *meeting, f"exec {job.call()}"])],
        env=[] if job.together else [Variable("JOB_COMPLETION_COUNT", str(settings.nodes))],
        resources=Resources(limits, requests),
        volumeMounts=mounts,
    )
    return PodSpec(
        restartPolicy="Never",
        terminationGracePeriodSeconds=settings.grace,
        nodeSelector={f"{_GPU}.product": settings.gpu} if settings.gpu else {},
        containers=[container],
        volumes=volumes,
    )


def check(text: str) -> str:
    """Read the file back as the document that it is. Returns and raises as `slurm.check`."""
    document = _read(text)
    return f"{document.kind} of {document.apiVersion}"


def shell_of(text: str) -> list[str]:
    """The shell in the file."""
    document = _read(text)
    spec = document.spec if isinstance(document, IndexedJob) else document.spec.replicatedJobs[0].template.spec
    return spec.template.spec.containers[0].args


@lru_cache(maxsize=1)  # the same file is checked, and its shell is
def _read(text: str) -> JobSet | IndexedJob:
    kind: type[JobSet] | type[IndexedJob] = JobSet if "\nkind: JobSet\n" in text else IndexedJob
    try:
        return from_yaml(kind, text)
    except ValueError as error:
        raise SettingError(f"this is no {kind.__name__}: {error}", where="the job file") from error
