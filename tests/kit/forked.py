"""Commands and scripts in real processes of their own, of which none spends its first seconds on importing torch.

They are forked from a server that has imported what the commands import. All else is as from a shell: arguments,
output, exit code, signals, a process group of its own. ``cogtrain ... --nproc 2`` forks its processes, too.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "cogprep.cli", "cogprep.encode.part", "cogprep.encode.models", "diffusers.models.autoencoders",
        "transformers.models.t5.modeling_t5", "transformers.models.t5.tokenization_t5", "cogtrain.cli",
        "cogtrain.memory.ready", "cogtrain.trainer.trainer", "diffusers.models.transformers.cogvideox_transformer_3d",
        "peft", "accelerate", "torch.distributed.run", "deepspeed", "cogtrain.distributed.zero_files",
    ]
)  # fmt: skip


class Forked:
    """``python -m PROGRAM WORDS...``, begun."""

    def __init__(
        self, words: Sequence[object], cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Args:
        words: the program, ``cogprep`` or ``cogtrain``, or a script (``a.py``), and its command line.
        environment: added to that of the server.
        """
        self._said = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115, closed by `end`
        out, err = (file.name for file in self._said)
        arguments = ([*map(str, words)], str(cwd or Path.cwd()), dict(environment or {}), out, err)
        self._process = _SERVER.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> bool:
        """End it and what it has started; gives whether it was still running."""
        running = self.running
        if running:
            for send in (os.kill, os.killpg):
                with suppress(ProcessLookupError):  # it has just ended; it has begun no group yet
                    send(self.pid, signal.SIGKILL)
        self.end()
        return running

    def lose(self) -> bool:
        """As `kill`; it must not have failed by itself before."""
        running, (code, out, err) = self.kill(), self.end()
        assert code in (0, -signal.SIGKILL), (code, out, err)
        return running

    def end(self, timeout: float = 300) -> tuple[int, str, str]:
        """Wait for its end; exit code, stdout, stderr."""
        self._process.join(timeout)
        if self.running:
            self.kill()
            raise AssertionError(f"it ran for {timeout} s")
        said = [file.read() for file in self._said if not file.seek(0)]
        assert self._process.exitcode is not None
        return self._process.exitcode, said[0], said[1]


def held_port() -> socket.socket:
    """A port of this machine where processes can meet, which no other is given as long as the socket lives.

    It does not listen, so one that sets SO_REUSEADDR, as torch's stores do, can.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


class ForkedRanks:
    """`Forked` as so many processes of one run, as torchrun would begin them."""

    def __init__(self, world: int, words: Sequence[object], cwd: Path) -> None:
        same = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        if world > 1:  # one process meets nobody
            self._port = held_port()
            same |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port.getsockname()[1])}
        self._ranks = [Forked(words, cwd, same | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]

    @property
    def running(self) -> bool:
        return all(rank.running for rank in self._ranks)

    def kill(self) -> bool:
        """End all of them at once; gives whether they were still running."""
        running = self.running
        for number in (signal.SIGSTOP, signal.SIGKILL):  # a stopped one does not see another die, and leave
            for rank in self._ranks:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(rank.pid, number)
        for rank in self._ranks:
            rank.kill()
        return running

    def lose(self) -> bool:
        """As `kill`; none of them must have failed by itself before."""
        running, ended = self.kill(), [rank.end() for rank in self._ranks]
        assert all(code in (0, -signal.SIGKILL) for code, *_ in ended), ended
        return running

    def end(self, timeout: float = 300) -> list[tuple[int, str, str]]:
        """Wait for their end; exit code, stdout, stderr of each."""
        try:
            return [rank.end(timeout) for rank in self._ranks]
        finally:
            self.kill()


def _fork_ranks() -> None:
    """Let `cogtrain.distributed.launch.relaunch`, and accelerate, fork the processes of a run, as this one was."""
    import torch.distributed.launcher.api as launcher
    import torch.distributed.run as torchrun

    launch = launcher.elastic_launch

    def elastic_launch(config: launcher.LaunchConfig, entrypoint: str) -> Callable[..., object]:
        config.start_method = "fork"
        return lambda *words: launch(config, _start)([*words[words.index("-m") + 1 :]])  # after python's own options

    launcher.elastic_launch = torchrun.elastic_launch = elastic_launch  # type: ignore[misc, assignment]


def _run(words: list[str], cwd: str, environment: dict[str, str], *files: str) -> None:
    os.setsid()
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.update(environment)
    if words[0] in ("cogtrain", "accelerate.commands.launch"):
        _fork_ranks()
    _start(words)


def _start(words: list[str]) -> None:
    sys.argv = words
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
