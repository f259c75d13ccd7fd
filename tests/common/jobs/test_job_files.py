"""Job files: what is in them, what is refused before they are written, and whose they are."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from importlib import import_module

import pytest
import typer.main
import yaml
from slurm import Job

from cogcommon.errors import SettingError
from cogcommon.jobs import kubernetes, skypilot
from cogcommon.jobs.document import from_yaml, to_yaml

LORA = ["lora", "--shards", "s3://mine/*.tar", "--out", "runs/mine", "--steps", "5"]
ENCODE = ["encode", "--data-root", "ds", "--resolution", "17x64x96", "1x64x96", "--id-token", "it's $HOME"]
POD = ["--image", "registry.example/cogtune:1", "--volume", "claim:/data"]
SKY = [*POD, "--gpu", "H100"]
ON = {"slurm": [], "kubernetes": POD, "skypilot": SKY}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a data root, in which commands run."""
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds/prompts.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*words, program="cogtrain"):
    app = import_module(f"{program}.cli").app
    typer.main.get_command(app).main(["launch", *map(str, words)], prog_name=program, standalone_mode=False)


def written(here, on, *options, program="cogtrain"):
    """The text of the file that a launch writes."""
    command = LORA if program == "cogtrain" else ENCODE
    launch("--on", on, *ON[on], *options, "--file", "job", "--", *command, program=program)
    return (here / "job").read_text()


@pytest.mark.parametrize("program", ["cogtrain", "cogprep"])
@pytest.mark.parametrize(("on", "kind"), [("kubernetes", kubernetes), ("skypilot", skypilot)])
def test_a_yaml_file_says_what_its_document_does_and_no_field_that_is_unknown(here, on, kind, program):
    text = written(here, on, "--nodes", 2, "--host", "64GB", "--queue", "q", program=program)
    loaded = yaml.safe_load(text)
    cls = {"JobSet": kubernetes.JobSet, "Job": kubernetes.IndexedJob}.get(loaded.get("kind"), skypilot.Task)
    assert to_yaml(from_yaml(cls, text)).splitlines() == [
        line for number, line in enumerate(text.splitlines()) if not line.startswith("#") or number > 3
    ]
    assert text.count("# ") >= 6  # it explains itself
    for wrong in (text + "\nspce: {}\n", text.replace("name: ", "name: 5 # ", 1)):
        with pytest.raises(SettingError):
            kind.check(wrong)


def test_a_run_on_kubernetes_is_a_jobset_whose_pods_meet_and_are_started_again(here):
    text = written(here, "kubernetes", "--nodes", 3, "--gpus", 4, "--time", "2h", "--grace", 60, "--name", "mine")
    spec = yaml.safe_load(text)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert job["completions"] == job["parallelism"] == 3 and job["backoffLimit"] == 0
    assert job["activeDeadlineSeconds"] == 7200 and pod["terminationGracePeriodSeconds"] == 60
    assert spec["failurePolicy"]["maxRestarts"] == 3
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}, "requests": {"cpu": 32}}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/data"}
    said = shell(container["args"][0], "cogtrain", here, JOB_COMPLETION_INDEX="2")
    assert said["words"] == LORA
    assert {name: value for name, value in said["environment"].items() if name.startswith("PET_")} == {
        "PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "mine-workers-0-0.mine", "PET_MASTER_PORT": "29500",
    }  # fmt: skip


def test_a_run_on_one_machine_needs_nothing_that_a_cluster_may_lack(here):
    loaded = yaml.safe_load(written(here, "kubernetes", "--nodes", 1))
    [container] = loaded["spec"]["template"]["spec"]["containers"]
    assert (loaded["apiVersion"], loaded["kind"], loaded["spec"]["backoffLimitPerIndex"]) == ("batch/v1", "Job", 3)
    assert "PET_" not in container["args"][0] and "env" not in container


def test_an_encode_on_kubernetes_is_an_indexed_job_that_knows_how_many_there_are(here):
    loaded = yaml.safe_load(written(here, "kubernetes", "--nodes", 4, program="cogprep"))
    [container] = loaded["spec"]["template"]["spec"]["containers"]
    assert (loaded["kind"], loaded["spec"]["completionMode"], loaded["spec"]["completions"]) == ("Job", "Indexed", 4)
    assert container["env"] == [{"name": "JOB_COMPLETION_COUNT", "value": "4"}]
    assert shell(container["args"][0], "cogprep", here)["words"] == ENCODE


def test_skypilots_machines_know_their_number(here):
    machine = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    task = yaml.safe_load(written(here, "skypilot", "--nodes", 2, "--spot"))
    assert task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"] is True
    said = shell(task["run"].replace("cd /data", "cd ."), "cogtrain", here, **machine)
    assert (said["environment"]["PET_MASTER_ADDR"], said["environment"]["PET_NODE_RANK"]) == ("10.0.0.1", "1")
    task = yaml.safe_load(written(here, "skypilot", "--nodes", 2, program="cogprep"))
    said = shell(task["run"].replace("cd /data", "cd ."), "cogprep", here, **machine)
    assert said["words"] == [*ENCODE, "--worker", "2/2"]


def shell(script, program, here, **environment):
    """What a program was started with by a script."""
    (here / program).write_text(SPEAKS)
    (here / program).chmod(0o755)
    told = {"PATH": f"{here}:/usr/bin:/bin", "HOME": "/nowhere", **environment}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=here, env=told, check=True)
    return json.loads(done.stdout)


# A task of a step leaves when all have spoken, and no sooner where the stand-in for srun ends it after another's error.
SPEAKS = r"""#!/usr/bin/env -S python3 -S
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, (json.dumps({"words": sys.argv[1:], "environment": dict(os.environ)}) + "\n").encode())
if control := os.environ.get("CONTROL"):
    open(f"{control}/spoke-{os.environ['SLURM_PROCID']}", "w").close()
    while sum(name.startswith("spoke-") for name in os.listdir(control)) < int(os.environ["SLURM_NTASKS"]):
        time.sleep(0.02)
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.mark.parametrize(
    ("code", "preempted", "restarts", "again"),
    [(0, False, 0, False), (2, False, 0, False), (75, False, 0, True), (138, False, 0, True), (138, False, 100, False),
     (143, False, 0, False), (143, True, 0, True)],
)  # fmt: skip
def test_a_batch_script_asks_to_go_on_after_the_limit_and_after_pre_emption(
    here, monkeypatch, code, preempted, restarts, again
):
    """Not after an error, and not when somebody has cancelled the job or stopped the run."""
    (here / "bin").mkdir()
    (here / "bin/cogtrain").write_text(SPEAKS)
    (here / "bin/cogtrain").chmod(0o755)
    control = here / "control"
    control.mkdir()
    if preempted:
        (control / "preempted").touch()
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", str(here / "bin/python"))
        written(here, "slurm", "--nodes", 1, "--gpus", 2, "--time", "1-02:00:00", "--line", "export SAID=yes",
                "--line", "#SBATCH --constraint=ib", "--queue", "fast", "--host", "64GB")  # fmt: skip
    job = Job(here / "job", control, 7, restarts, CODE=str(code))
    ended, asked, said = job.end()
    assert (ended, asked) == (code, again), said
    tasks = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [task["words"] for task in tasks] == [LORA, LORA]
    assert sorted(task["environment"]["SLURM_PROCID"] for task in tasks) == ["0", "1"]
    assert all(task["environment"]["SAID"] == "yes" for task in tasks)
    wanted = {"time": "1-02:00:00", "signal": "USR1@300", "partition": "fast", "constraint": "ib", "mem": "61035M"}
    assert job.options.items() >= wanted.items()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--on", "slurm", "--", *LORA, "--stpes", "5"], "there is no option --stpes"),
        (["--on", "slurm", "--", *LORA, "--rank", "0"], "0 is too small"),
        (["--on", "slurm", "--", "train", *LORA[1:]], "there is no command 'train'"),
        (["--on", "slurm", "--", *LORA[:3]], "begin another run"),
        (["--on", "slurm", "--", *LORA, "--resume", "never"], "begin anew"),
        (["--on", "slurm", "--", *LORA, "--nproc", "2"], "the job says"),
        (["--on", "slurm", "--nodes", 2, "--", *LORA, "--global-batch", "24"], "cannot be divided among 16 processes"),
        (["--on", "slurm", "--", *LORA, "--out", "s3://mine/run"], "a run's folder is on a disk"),
        (["--on", "slurm", "--", *LORA, "--validate-videos", "2"], "no held-out samples to make videos of"),
        (["--on", "slurm", *LORA], "no -- before"),
        (["--on", "slurm", "--"], "nothing to run"),
        (["--on", "slurm", "--spot", "--", *LORA], "Slurm knows no --spot"),
        (["--on", "slurm", "--line", 'echo "', "--", *LORA], "bash cannot read this"),
        (["--on", "slurm", "--time", "soon", "--", *LORA], "no time"),
        (["--on", "slurm", "--time", "5m", "--", *LORA], "no time is left"),
        (["--on", "slurm", "--name", "My Run", "--", *LORA], "no name for a job"),
        (["--on", "kubernetes", "--", *LORA], "Kubernetes needs --image"),
        (["--on", "kubernetes", *POD[:2], "--", *LORA], "share no storage"),
        (["--on", "kubernetes", *POD, "--", *LORA, "--out", "/scratch/mine"], "not on the storage"),
        (["--on", "skypilot", *POD, "--", *LORA], "SkyPilot needs --gpu"),
        (["--on", "skypilot", *SKY, "--nodes", 2, "--volume", "s3://b:/data", "--", *LORA], "a bucket does not give"),
    ],
)
def test_what_would_be_refused_after_the_queue_is_refused_now(here, words, says):
    with pytest.raises(SettingError, match=says):
        launch(*words)
    assert [path.name for path in here.iterdir()] == ["ds"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*ENCODE, "--worker", "1/2"], "the job says"),
        ([*ENCODE, "--engine", "ray"], "by itself"),
        ([*ENCODE, "--data-root", "dss"], "no such data root"),
        ([*ENCODE[:3]], "no resolution"),
    ],
)
def test_so_is_an_encode(here, words, says):
    with pytest.raises(Exception, match=says):
        launch("--on", "slurm", "--", *words, program="cogprep")
    assert [path.name for path in here.iterdir()] == ["ds"]


def test_no_scheduler_takes_the_file_of_another(here):
    names = {}
    for on, options in ON.items():
        launch("--on", on, *options, "--", *LORA)
        names[on] = {path.name for path in here.iterdir()} - {"ds"} - set().union(*names.values())
    assert [*map(len, names.values())] == [1, 1, 1], names


def test_a_file_of_ours_is_written_anew_until_somebody_has_changed_it(here, capsys):
    first = written(here, "slurm")
    second = written(here, "slurm", "--nodes", 2)
    assert "--nodes=1" in first and "--nodes=2" in second
    (here / "job").write_text(second.replace("--nodes=2", "--nodes=3"))
    with pytest.raises(SettingError, match="changed since"):
        written(here, "slurm")
    assert "--nodes=3" in (here / "job").read_text()
    launch("--on", "slurm", "--json", "--", *LORA)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["file"] == "lora-mine.sbatch" and said["submit"] == "sbatch lora-mine.sbatch"


def test_submitting_takes_the_schedulers_own_program(here, monkeypatch, capfd):
    monkeypatch.setenv("PATH", f"{here}:/usr/bin:/bin")
    with pytest.raises(SettingError, match="sbatch is not installed here") as caught:
        launch("--on", "slurm", "--submit", "--", *LORA)
    assert "sbatch lora-mine.sbatch" in caught.value.fix
    (here / "sbatch").write_text('#!/bin/sh\necho "got $1 ${PYTHONSAFEPATH-and the path of scripts}"; exit $CODE\n')
    (here / "sbatch").chmod(0o755)
    monkeypatch.setenv("CODE", "0")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as our programs set it, for Python processes of theirs, not of a job's
    launch("--on", "slurm", "--submit", "--", *LORA)
    assert "got lora-mine.sbatch and the path of scripts" in capfd.readouterr().out
    monkeypatch.setenv("CODE", "1")
    with pytest.raises(SettingError, match="sbatch has refused the job"):
        launch("--on", "slurm", "--submit", "--", *LORA)


def test_one_machine_may_keep_its_run_in_a_bucket_instead_of_a_volume(here):
    mirrored = ["--", *LORA, "--mirror", "s3://mine/runs/mine"]
    launch("--on", "kubernetes", *POD[:2], *mirrored)
    assert "claimName" not in (here / "lora-mine.yaml").read_text()
    with pytest.raises(SettingError, match="share no storage"):
        launch("--on", "kubernetes", "--nodes", 2, *POD[:2], *mirrored)


def test_a_file_of_settings_that_only_the_job_sees_is_said_to_be_unchecked(here, capsys):
    launch("--on", "kubernetes", *POD, "--", *LORA, "--config", "/data/mine.toml", "--validate-videos", "2")
    assert "/data/mine.toml is not on this machine" in capsys.readouterr().err
    assert "--config /data/mine.toml" in (here / "lora-mine.yaml").read_text()


def test_texts_that_yaml_would_take_for_something_else_stay_texts():
    @dataclasses.dataclass
    class Words:
        words: list[str]

    words = ["yes", "null", "1", "1.5", "a: b", "# a", "é", "", "-c", "a\nb", "~", "off", "@a", "[a]", "a #b"]
    assert yaml.safe_load(to_yaml(Words(words))) == {"words": words}
