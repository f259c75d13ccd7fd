"""What a job is, whoever starts it: a command line, on so many machines."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli.names import command_line, quoted
from ..errors import SettingError
from ..store.address import address_of
from .settings import LaunchSettings

PORT = 29500  # where the processes of a run meet


@dataclass(frozen=True)
class Program:
    """A program that can be launched.

    Attributes:
        commands: those that pay on several machines, and their settings.
        together: the processes of all machines are one run. Else each takes its own part of the work.
        check: refuses settings that make no job, given them and whether the machines share this one's files.
        check_all: refuses what can be told only where all settings are known, and none is set by a file that the job's
            machines have and this one has not.
    """

    name: str
    commands: Mapping[str, type[Any]]
    together: bool
    check: Callable[[Any, bool], None]
    check_all: Callable[[Any], None] = lambda settings: None


@dataclass(frozen=True)
class Job:
    """A command line that has been checked, and where it is to run.

    Attributes:
        words: the command and its options.
        folder: the folder that the command's paths begin in, absolute.
    """

    program: str
    words: Sequence[str]
    together: bool
    name: str
    folder: Path
    settings: LaunchSettings

    @property
    def processes(self) -> int:
        """On each machine: one a GPU."""
        return max(1, self.settings.gpus)

    @property
    def meets(self) -> bool:
        """Whether machines must find each other: those of a run do."""
        return self.together and self.settings.nodes > 1

    @property
    def machines(self) -> str:
        """``2 nodes of 8 GPUs``."""
        nodes, gpus = self.settings.nodes, self.settings.gpus
        each = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "CPUs"
        return f"{nodes} node{'s' * (nodes != 1)} of {each}"

    def call(self, *more: str, found: bool = False) -> str:
        """The command line for a shell, an option a line.

        Args:
            more: words of shell to add, already quoted.
            found: call the program by its full path, so that it is found whatever the shell's PATH.
        """
        beside = Path(sys.executable).with_name(self.program)
        program = str(beside) if found and beside.is_file() else self.program
        lines = [command_line(program, self.words[0])]
        for word in self.words[1:]:
            begins = re.match("--?[A-Za-z]", word) is not None
            lines += [quoted(word)] if begins else []
            if not begins:
                lines[-1] += " " + quoted(word)
        return " \\\n  ".join([*lines, *more])

    def shell_lines(self) -> list[str]:
        """The lines of --line that are shell."""
        return [line.strip() for line in self.settings.line if not line.lstrip().startswith("#SBATCH")]

    def meeting(self, rank: str, address: str) -> list[str]:
        """Lines of shell that tell a machine of the others, in the words of torchrun.

        Args:
            rank: the number of this machine, from 0, as the shell finds it.
            address: the first machine's, likewise.
        """
        if not self.meets:
            return []
        return [
            f"export PET_NNODES={self.settings.nodes} PET_NODE_RANK={rank}",
            f"export PET_MASTER_ADDR={address} PET_MASTER_PORT={PORT}",
        ]


def refuse_own_disk(out: str, mount: tuple[str, str] | None) -> None:
    """Refuse an output on a container's own disk, which goes with the container.

    Args:
        out: what --out names.
        mount: the shared storage, and where it is mounted.

    Raises:
        SettingError: it would not lie on shared storage.
    """
    if address_of(out) is not None:
        return
    if mount is None:
        raise SettingError(
            "the machines share no storage: what they write would go with them",
            where=f"--out {out}",
            fix="--volume with the storage and where it is mounted, for example --volume claim:/data",
        )
    if out.startswith("/") and not f"{out}/".startswith(f"{mount[1]}/"):
        raise SettingError(
            f"this is not on the storage that is mounted at {mount[1]}",
            where=f"--out {out}",
            fix=f"--out {mount[1]}/{Path(out).name}",
        )
