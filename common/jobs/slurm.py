"""The sbatch script of a job.

Its options are those of sbatch(1), its signals those of `scontrol` and srun(1): https://slurm.schedmd.com/sbatch.html
"""

from __future__ import annotations

import re

from ..cli.names import quoted
from ..errors import SettingError
from .job import Job

# The options that we write, and what a value of each looks like.
_OPTIONS = {
    "job-name": r"[a-z][a-z0-9-]*", "chdir": r"/.*", "output": r"\S+", "open-mode": "append", "nodes": r"\d+",
    "ntasks-per-node": r"\d+", "gpus-per-node": r"([^\s:]+:)?\d+", "cpus-per-task": r"\d+", "mem": r"\d+M",
    "time": r"\d+-\d\d:\d\d:\d\d", "signal": r"USR1@\d+", "requeue": "", "partition": r"\S+", "account": r"\S+",
}  # fmt: skip
_MOST_STARTS = 100  # a job that never gets as far as its first checkpoint must end some time


def tasks_of_a_host(counts: str) -> int:
    """The largest number of tasks on a host in Slurm's list (``8(x2),4`` is 8). They share the host's memory."""
    return max(int(number) for number in re.findall(r"(\d+)(?:\(x\d+\))?", counts))


def render(job: Job) -> str:
    """The script: options of sbatch, each group with what it is for, then the command."""
    settings = job.settings
    wants = [line.strip() for line in settings.line if line.lstrip().startswith("#SBATCH")]
    own = job.shell_lines()
    each = (
        "# One process (a task) for each GPU; they find each other by what srun tells them."
        if job.together
        else "# One process (a task) for each GPU; each encodes its own part of the shards."
    )
    out = [
        "#!/bin/bash",
        f"# {job.program} {job.words[0]} on {job.machines}, for Slurm.",
        "",
        _option("job-name", job.name),
        "# Paths begin in the folder that the job was written in. All nodes must see it.",
        _option("chdir", str(job.folder)),
        "# %x is the job's name, %j its number. A job that is started again writes on in the same file.",
        _option("output", "%x-%j.out"),
        _option("open-mode", "append"),
        "",
        each,
        _option("nodes", settings.nodes),
        _option("ntasks-per-node", job.processes),
        *(
            [_option("gpus-per-node", f"{settings.gpu}:" * bool(settings.gpu) + str(settings.gpus))]
            * bool(settings.gpus)
        ),
        "# Without this, each process would get one core.",
        _option("cpus-per-task", settings.cpus),
    ]
    if host := settings.host_bytes:
        out.append(_option("mem", f"{host >> 20}M"))
    out += [_option(name, value) for name in ("queue", "account") if (value := getattr(settings, name))]
    out.append("")
    if settings.seconds:
        minutes, seconds = divmod(settings.seconds, 60)
        hours, minutes = divmod(minutes, 60)
        out.append(_option("time", f"{hours // 24}-{hours % 24:02}:{minutes:02}:{seconds:02}"))
    out += [
        f"# {settings.grace} s before the time is up, Slurm sends USR1 to the processes: they save and stop.",
        _option("signal", f"USR1@{settings.grace}"),
        "# The job may be started again: by Slurm, when a node fails or the job is pre-empted, and by the end of",
        "# this file.",
        _option("requeue"),
        *wants,
        "",
        *own,
        *[""] * bool(own),
        _step(job),
        "code=$?",
        "",
        *_again(),
    ]
    return "\n".join(out) + "\n"


def _option(name: str, value: object = None) -> str:
    option = {"queue": "partition"}.get(name, name)
    return f"#SBATCH --{option}" + ("" if value is None else f"={_in_header(str(value))}")


def _in_header(value: str) -> str:
    """A value as sbatch reads it from a #SBATCH line: quotes hold blanks together."""
    return (
        value if re.fullmatch(r"[\w.,:/@%+=-]+", value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )


def _step(job: Job) -> str:
    settings = job.settings
    # A run leaves together, and must not wait for a process that was killed; parts of an encode are their own.
    options = [f"--kill-on-bad-exit={int(job.together)}", '--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    if settings.image:
        mounts = [f"{job.folder}:{job.folder}", *([":".join(settings.mount)] if settings.mount else [])]
        options += [
            f"--container-image={quoted(settings.image)}",
            f"--container-mounts={quoted(','.join(mounts))}",
            f"--container-workdir={quoted(job.folder)}",
        ]
    return " \\\n  ".join([f"srun {' '.join(options)}", job.call(found=not settings.image)])


def _again() -> list[str]:
    return [
        "# 138: stopped by USR1, the time is nearly up. 143: by TERM; if Slurm has noted a time of pre-emption,",
        "# it was that, and nobody who cancelled the job or stopped the run. 75: a process or a host was lost,",
        "# or another one was writing what this job is to write.",
        "# Then the job goes back into the queue, to go on where it was.",
        "again=no",
        '[ "$code" = 138 ] || [ "$code" = 75 ] && again=yes',
        '[ "$code" = 143 ] && scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]" && again=yes',
        f'if [ "$again" = yes ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {_MOST_STARTS} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]


def check(text: str) -> str:
    """Check a script's options; what is shell, `bash -n` has checked.

    Returns:
        What was checked, in words.

    Raises:
        SettingError: an option that sbatch does not have, or would not read.
    """
    known = 0
    begun = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#SBATCH"):
            begun = begun or not (line.startswith("#") or not line)
            continue
        option = re.fullmatch(r"#SBATCH\s+--([a-z-]+)(?:=(.*))?", line)
        if option and option[1] in _OPTIONS and not re.fullmatch(_OPTIONS[option[1]], (option[2] or "").strip('"')):
            raise SettingError(f"sbatch takes no such value: {line}", where=f"line {number}", fix="another value")
        if begun or not re.match(r"#SBATCH\s+-", line):
            raise SettingError(
                f"sbatch would not read this: {line}", where=f"line {number}", fix="--line '#SBATCH --option=value'"
            )
        known += 1
    return f"bash -n, {known} options of sbatch"
