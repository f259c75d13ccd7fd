"""All the ways to start several processes."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from forked import Forked, ForkedRanks
from waiting import wait_for_steps

from cogcommon.errors import SettingError
from cogtrain.distributed import launch
from cogtrain.distributed.leaving import LOST
from cogtrain.settings.training import LoraSettings

LORA = ["lora", "--shards", "out", "--steps", "1", "--rank", "2", "--out", "run"]


@pytest.fixture
def folder(tmp_path, make_shards):
    make_shards(tmp_path / "out", samples=4)
    return tmp_path


# A host whose own name does not resolve, as in many containers; where we may not make one, the host as it is.
NAMELESS = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host; exec "$@"', "sh"]
if subprocess.run([*NAMELESS, "true"], capture_output=True, check=False).returncode:
    NAMELESS = []


def check(folder, processes):
    facts = json.loads((folder / "run" / "facts.json").read_text())
    assert facts["processes"] == facts["global_batch"] == processes


def test_srun(folder):
    """Two tasks of one step, as srun's environment tells them."""
    tasks = [
        Forked(
            ["cogtrain", *LORA], folder, {
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()),
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (first, said, _), (second, nothing, _) = ended = [task.end() for task in tasks]
    assert (first, second) == (0, 0), ended
    assert "next: cogtrain generate" in said and nothing == ""
    check(folder, 2)


# Two processes on a CPU need MPI with --cpu; --multi_gpu starts them through torch, and we find no GPU.
@pytest.mark.parametrize(("kind", "processes"), [pytest.param("--cpu", 1, marks=pytest.mark.full), ("--multi_gpu", 2)])
def test_accelerate_launch(folder, kind, processes):
    launcher = ["accelerate.commands.launch", kind, "--num_processes", str(processes), "-m", "cogtrain"]
    code, *said = Forked([*launcher, *LORA], folder).end()
    assert code == 0, said
    check(folder, processes)


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") or (
            name.startswith("SLURM_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ


def test_a_batch_script_of_slurm_is_not_a_step(environment):
    environment.update(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="5")
    assert not launch.join_environment()
    environment.update(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1")
    assert not launch.join_environment()
    environment.update(SLURM_STEP_NUM_TASKS="8", SLURM_STEP_NODELIST="gpu[07-09]", SLURM_LOCALID="0")
    assert launch.join_environment()
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "8", "gpu07")


@pytest.mark.parametrize(("gpus", "gpu"), [(8, "3"), (1, "0"), (0, "0")])
def test_a_task_of_slurm_knows_its_gpu_and_its_neighbours(environment, monkeypatch, gpus, gpu):
    monkeypatch.setattr("cogcommon.model.device.visible_gpus", lambda: gpus)
    environment.update(SLURM_PROCID="11", SLURM_LOCALID="3", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="20")
    environment.update(SLURM_STEP_TASKS_PER_NODE="8(x2),4")
    assert launch.join_environment()
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]) == ("11", gpu, "8")


def test_torchruns_environment_wins(environment):
    environment.update(RANK="1", WORLD_SIZE="2", SLURM_PROCID="0", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8")
    assert launch.join_environment() and environment["RANK"] == "1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[007-009,12],big1", "gpu007"),
        ("a,b", "a"),
        ("node-[3,5]", "node-3"),
        ("n[12]", "n12"),
        ("gpu[1-2]-ib0", "gpu1-ib0"),
        ("rack[1-2,7]n[01-04],x", "rack1n01"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert launch.first_host(nodes) == first


def test_more_processes_than_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.wanted_processes(LoraSettings()) == 2
    assert launch.wanted_processes(LoraSettings(nproc=1)) == 1
    with pytest.raises(SettingError, match="3 processes on 2 GPUs"):
        launch.wanted_processes(LoraSettings(nproc=3))


def test_an_error_is_said_once_by_all_processes_together(folder):
    """Even one that each finds on its own command line, before they have met."""
    ended = ForkedRanks(2, ["cogtrain", *LORA, "--rank", "0"], folder).end()
    assert all(code != 0 for code, *_ in ended)
    assert "".join(err for *_, err in ended).count("error: 0 is too small") == 1


def test_a_damaged_sample_on_one_process_stops_all_with_its_name(folder):
    """Started as the installed program is, from a folder with modules of the user's own: none of them is imported."""
    (folder / "queue.py").write_text("raise SystemExit('mine')")
    (folder / "cogcommon").mkdir()
    tar = sorted((folder / "out").glob("*.tar"))[0]
    with tar.open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"XXXXXXXX")
    words = [*NAMELESS, sys.executable, "-P", "-m", "cogtrain", *LORA, "--nproc", "2", "--steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    err = done.stderr
    assert done.returncode == 2, (done.stdout, err)
    assert err.count("error: a damaged shard") == 1 and tar.name in err and "Traceback" not in err


def test_a_dead_process_ends_the_run_and_says_so(folder):
    words = ["lora", "--shards", "out", "--steps", "500", "--rank", "2", "--out", "run", "--nproc", "2"]
    process = Forked(["cogtrain", *words], folder)
    assert wait_for_steps(folder / "run", 1, process), process.end()
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    children[1].send_signal(signal.SIGKILL)
    code, out, err = process.end()
    assert code == LOST, (out, err)
    assert err.count("error:") == 1 and "Traceback" not in err
    assert "was killed by signal 9" in err and "continues from its last checkpoint" in err
