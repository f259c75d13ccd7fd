"""Job files of `cogtrain launch`, run as a scheduler would: stopped before their time is up, and gone on with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from forked import Forked, held_port
from slurm import Job
from waiting import steps_made, wait_for_steps, wait_until

from cogcommon.errors import SettingError
from cogtrain.cli import app
from cogtrain.distributed.launch import Hosts
from cogtrain.runs import checkpoint as checkpoints
from cogtrain.settings.training import LoraSettings

STEPS = 12
LORA = [
    "lora",
    "--shards",
    "out",
    "--out",
    "run",
    "--steps",
    STEPS,
    "--rank",
    "2",
    "--lr",
    "1e-2",
    "--save-every",
    "100",
]
HOSTS = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "29500"}


@pytest.fixture
def folder(tmp_path, make_shards, monkeypatch):
    make_shards(tmp_path / "out", samples=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*words):
    typer.main.get_command(app).main(["launch", *map(str, words)], prog_name="cogtrain", standalone_mode=False)


def alone(folder, train_here, losses):
    """The losses of an undisturbed run of one process with the same global batch."""
    settings = LoraSettings(
        shards=["out"], out=folder / "alone", steps=STEPS, rank=2, lr=1e-2, save_every=100, accumulate=2
    )
    return losses(train_here(settings))


def test_a_job_names_the_pattern_of_which_a_shell_has_made_all_shards_of_a_folder(folder):
    """Also of a folder whose name is a pattern itself, and not of some shards."""
    (folder / "out").rename(folder / "set [v2]")
    shards = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.tar"))
    assert len(shards) > 1
    script = folder / "lora-run.sbatch"
    for words, named in [
        (shards, "'set [v2]/*.tar'"),
        (shards[1:], " ".join(f"'{name}'" for name in shards[1:])),
        (["set [v2]/*.tar"], "'set [v2]/*.tar'"),
    ]:
        launch("--on", "slurm", "--gpus", 2, "--", "lora", "--shards", *words, "--out", "run")
        assert f"--shards {named} \\\n  --out run" in script.read_text()


@pytest.mark.full
def test_a_batch_script_saves_before_its_limit_and_goes_on_when_it_is_requeued(folder, train_here, losses):
    """Two tasks over gloo, by stand-ins for sbatch, srun and scontrol; USR1 comes as --signal asks for."""
    launch("--on", "slurm", "--gpus", 2, "--cpus", 1, "--time", "10m", "--grace", 60, "--", *LORA)
    script, run = folder / "lora-run.sbatch", folder / "run"
    first = Job(script, folder / "slurm", 41)
    assert wait_for_steps(run, 2, first), first.end()
    first.signal_step()
    code, requeued, said = first.end()
    assert (code, requeued) == (138, True), said
    [saved] = checkpoints.list_checkpoints(run)
    made = int(saved.name.partition("-")[2])
    assert 2 <= made < STEPS and "stopped; to resume: cogtrain lora" in said and "Traceback" not in said
    code, requeued, said = Job(script, folder / "slurm", 41, restarts=1).end()
    assert (code, requeued) == (0, False), said
    assert "next: cogtrain generate" in said
    assert losses(run) == pytest.approx(alone(folder, train_here, losses), rel=1e-4)


@pytest.mark.full
def test_the_pods_of_a_jobset_are_one_run_that_saves_when_one_of_them_is_taken_away(folder, train_here, losses):
    """Two pods on this machine, each the process that the manifest starts; TERM comes to one alone."""
    launch("--on", "kubernetes", "--nodes", 2, "--gpus", 0, "--image", "i", "--volume", "c:/data", "--", *LORA)
    pod = yaml.safe_load((folder / "lora-run.yaml").read_text())
    [container] = pod["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    run = folder / "run"

    def start(port):
        script = container["args"][0].replace("lora-run-workers-0-0.lora-run", "127.0.0.1")
        told = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return [
            subprocess.Popen(
                [*container["command"], script.replace("29500", str(port))], cwd=folder, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, env=told | {"JOB_COMPLETION_INDEX": str(index)},
            )
            for index in range(2)
        ]  # fmt: skip

    pods = start(29711)
    wait_until(lambda: steps_made(run) >= 2 or any(pod.poll() is not None for pod in pods))
    pods[1].terminate()
    said = [pod.communicate(timeout=200)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [143, 143], said
    assert len(checkpoints.list_checkpoints(run)) == 1
    pods = start(29712)
    said = [pod.communicate(timeout=200)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert losses(run) == pytest.approx(alone(folder, train_here, losses), rel=1e-4)


def test_two_hosts_that_know_of_each_other_are_one_run(folder):
    """By torchrun's own variables, without torchrun."""
    words = ["cogtrain", *LORA, "--steps", "1"]
    with held_port() as port:
        told = HOSTS | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port.getsockname()[1])}
        hosts = [Forked(words, folder, told | {"PET_NODE_RANK": str(rank)}) for rank in (0, 1)]
        (first, said, _), (second, nothing, _) = ended = [host.end() for host in hosts]
    assert (first, second) == (0, 0), ended
    assert "next: cogtrain generate" in said and nothing == ""
    assert re.search(r'"processes": 2\b', (folder / "run/facts.json").read_text())


def test_what_tells_a_host_of_the_others():
    assert Hosts.of({}) == Hosts.of({"PET_NNODES": "1"}) == Hosts(1, 0, "127.0.0.1:0")
    assert Hosts.of(HOSTS | {"PET_NODE_RANK": "1"}) == Hosts(2, 1, "a:29500")
    for name, wrong in [
        ("PET_NNODES", "1:2"),
        ("PET_NODE_RANK", "2"),
        ("PET_MASTER_ADDR", ""),
        ("PET_MASTER_PORT", ""),
    ]:
        with pytest.raises(SettingError, match="does not know the others"):
            Hosts.of(HOSTS | {name: wrong})
