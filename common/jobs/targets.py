"""The schedulers that a job can be written for, a row each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..cli.settings import default_of, flag_of
from ..errors import SettingError
from . import kubernetes, skypilot, slurm
from .job import Job
from .settings import LaunchSettings, Scheduler


@dataclass(frozen=True)
class Target:
    """A scheduler.

    Attributes:
        suffix: of its job files, another one for each, so that none replaces what another took.
        render: the file's text.
        check: what of a text it has checked, in words; raises SettingError.
        shell_of: the shell in a text, for `bash -n`.
        submit: the command that takes the file, which is its last word.
        ours: whether the job sees this machine's files.
        ignores: options that mean nothing to it.
        needs: options that it cannot do without, with an example.
    """

    title: str
    suffix: str
    render: Callable[[Job], str]
    check: Callable[[str], str]
    shell_of: Callable[[str], list[str]]
    submit: tuple[str, ...]
    ours: bool
    ignores: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()


_IMAGE = (("image", "registry.example/me/cogtune"),)  # nothing else has the program in it

TARGETS: dict[Scheduler, Target] = {
    "slurm": Target(
        "Slurm", ".sbatch", slurm.render, slurm.check, lambda text: [text], ("sbatch",), True, ignores=("spot",)
    ),
    "kubernetes": Target(
        "Kubernetes", ".yaml", kubernetes.render, kubernetes.check, kubernetes.shell_of, ("kubectl", "apply", "-f"),
        False, ignores=("spot", "account"), needs=_IMAGE,
    ),
    "skypilot": Target(
        "SkyPilot", ".sky.yaml", skypilot.render, skypilot.check, skypilot.shell_of, ("sky", "jobs", "launch"), False,
        ignores=("account", "time"), needs=_IMAGE,
    ),
}  # fmt: skip


def check_options(target: Target, settings: LaunchSettings) -> None:
    """Refuse options that a scheduler does not know, and a lack of those that it needs.

    Raises:
        SettingError: names the option.
    """
    fields = LaunchSettings.__dataclass_fields__
    for name in target.ignores:
        if getattr(settings, name) != default_of(fields[name]):
            flag = flag_of(fields[name])
            raise SettingError(f"{target.title} knows no {flag}", where=flag, fix=f"leave {flag} out")
    needs = [*target.needs, *([("gpu", "H100")] if target is TARGETS["skypilot"] and settings.gpus else [])]
    for name, example in needs:
        if not getattr(settings, name):
            raise SettingError(
                f"{target.title} needs --{name}", where=f"--on {settings.on}", fix=f"--{name} {example}, for example"
            )
    has_lines = any(line.lstrip().startswith("#SBATCH") for line in settings.line)
    if has_lines and target is not TARGETS["slurm"]:
        raise SettingError("#SBATCH is for Slurm", where="--line", fix="leave it out")
    if settings.volume and target is TARGETS["slurm"] and not settings.image:
        raise SettingError(
            "without a container there is nothing to mount", where="--volume", fix="leave it out, or --image"
        )


def check_text(target: Target, text: str) -> str:
    """Check a job file without a scheduler.

    Returns:
        What was checked, in words.

    Raises:
        SettingError: it would be refused, or its shell cannot be read.
    """
    checked = target.check(text)
    bash = shutil.which("bash")
    for script in target.shell_of(text) if bash else []:
        done = subprocess.run([str(bash), "-n"], input=script, capture_output=True, text=True)
        if done.returncode:
            raise SettingError(
                f"bash cannot read this: {done.stderr.strip()}", where="--line", fix="a quote may be missing"
            )
    return checked if not bash or "bash -n" in checked else f"{checked}, bash -n"


def submit(target: Target, file: Path) -> None:
    """Hand a file to the scheduler's own program, which says what it thinks of it.

    Raises:
        SettingError: the program is not installed, or refuses the job.
    """
    program = target.submit[0]
    command = " ".join([*target.submit, str(file)])
    if shutil.which(program) is None:
        raise SettingError(
            f"{program} is not installed here; the file is written",
            where=f"--submit, {target.title}",
            fix=f"where it is: {command}",
        )
    # A job may inherit our environment, and its lines of the user's may run scripts that import what lies beside them.
    ours = () if sys.flags.safe_path else ("PYTHONSAFEPATH",)  # ours, of `environment.set_variables`
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([*target.submit, str(file)], env=environment)
    if done.returncode:
        raise SettingError(
            f"{program} has refused the job (exit code {done.returncode})", where=command, fix="see above"
        )
