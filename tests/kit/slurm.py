"""A stand-in for Slurm on this machine: it reads the options of a batch script, runs it, and signals its step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from places import CHILDREN


class Job:
    """A batch script in one of its runs, as sbatch would begin it. `control` is what the stand-ins share."""

    def __init__(self, script: Path, control: Path, number: int, restarts: int = 0, **environment: str) -> None:
        text = script.read_text()
        self.options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.M))
        self.control = control
        programs = control / "bin"
        programs.mkdir(parents=True, exist_ok=True)
        for name in ("srun", "scontrol"):
            if not (programs / name).exists():
                (programs / name).write_text(f"#!{sys.executable} -S\n" + (CHILDREN / "srun.py").read_text())
                (programs / name).chmod(0o755)
        for left in ("requeued", "step"):
            (control / left).unlink(missing_ok=True)
        tasks = int(self.options["nodes"]) * int(self.options["ntasks-per-node"])
        self._log = (control / "log").open("a+")
        self._process = subprocess.Popen(
            ["bash", str(script)], cwd=self.options["chdir"], stdout=self._log, stderr=subprocess.STDOUT,
            env=os.environ | environment | {
                "PATH": f"{programs}:{os.environ['PATH']}", "CONTROL": str(control), "SLURM_JOB_ID": str(number),
                "SLURM_NTASKS": str(tasks), "SLURM_CPUS_PER_TASK": self.options["cpus-per-task"],
                "SLURM_RESTART_COUNT": str(restarts), "SLURM_PROCID": "0", "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal_step(self, number: int | None = None) -> None:
        """Send what --signal asks for to every process of the step, as Slurm does; not to the batch shell."""
        number = number or signal.Signals[f"SIG{self.options['signal'].partition('@')[0]}"]
        for task in map(int, (self.control / "step").read_text().split()):
            with suppress(psutil.NoSuchProcess):
                for process in [psutil.Process(task), *psutil.Process(task).children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)

    def end(self, timeout: float = 300) -> tuple[int, bool, str]:
        """Wait for its end; exit code, whether it has asked to be started again, and what it said."""
        try:
            code = self._process.wait(timeout)
        finally:
            if self.running:
                self.signal_step(signal.SIGKILL)
                self._process.kill()
        self._log.seek(0)
        return code, (self.control / "requeued").exists(), self._log.read()
