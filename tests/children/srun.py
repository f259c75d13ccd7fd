"""A stand-in for srun and scontrol on one machine: the tasks of a job step as processes, with srun's environment.

``srun [--kill-on-bad-exit=N] [--cpus-per-task=N] PROGRAM WORDS...``. The number of tasks is SLURM_NTASKS; their process
ids go to the file STEP. ``scontrol requeue`` and ``scontrol show job`` leave a word in, or read one from, the folder
CONTROL.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

control = Path(os.environ["CONTROL"])


def scontrol(words):
    if words[0] == "requeue":
        (control / "requeued").write_text(words[1])
    else:
        preempted = control / "preempted"
        print(f"JobId={words[2]} PreemptEligibleTime=2026-01-01 PreemptTime=" + ("2026" * preempted.exists() or "None"))


def srun(words):
    own = list(itertools.takewhile(lambda word: word.startswith("--"), words))
    options, words = dict(word.partition("=")[::2] for word in own), words[len(own) :]
    tasks = int(os.environ["SLURM_NTASKS"])
    step = {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
    }  # fmt: skip
    started = [
        subprocess.Popen(words, env=os.environ | step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
        for task in range(tasks)
    ]
    (control / "step").write_text(" ".join(str(process.pid) for process in started))
    looks = 0  # since one has failed; a machine that stops for a while takes none of them
    while any(process.poll() is None for process in started):
        if options["--kill-on-bad-exit"] == "1" and any(process.poll() for process in started):
            looks += 1
        if looks > 10:  # for a second they may leave by themselves
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(30)  # Slurm's KillWait
                    except subprocess.TimeoutExpired:
                        process.kill()
        time.sleep(0.1)
    codes = [128 - code if code < 0 else code for code in (process.returncode for process in started)]
    sys.exit(max(codes))


if __name__ == "__main__":
    {"srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:])
