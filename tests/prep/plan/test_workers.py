"""The division of work: fixed, complete, and taken from the launcher only where it is one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from cogcommon.cli.command import run_app
from cogcommon.errors import RunError, SettingError
from cogprep.cli import app
from cogprep.commands.encode import encode
from cogprep.encode import part as encode_slice
from cogprep.encode.gpus import encode_in_parts, gpu_count
from cogprep.plan.slice import Slice, choose_slice, local_count, local_rank


@pytest.mark.parametrize(
    "worker, environment, expected",
    [
        (None, {}, "1/1"),
        ("3/8", {"RANK": "0", "WORLD_SIZE": "2"}, "3/8"),
        (None, {"RANK": "2", "WORLD_SIZE": "4"}, "3/4"),
        (None, {"RANK": "0", "WORLD_SIZE": "1"}, "1/1"),
        (None, {"RANK": "5"}, "1/1"),
        # the shell of an sbatch script of 8 tasks, and inside srun
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, "1/1"),
        (None, {"SLURM_PROCID": "6", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, "7/8"),
        (None, {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, "1/1"),
        (None, {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETION_COUNT": "4"}, "3/4"),
        (None, {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "1"}, "1/1"),
        (None, {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETION_COUNT": "4", "RANK": "1", "WORLD_SIZE": "2"}, "2/2"),
        ("1/8", {"JOB_COMPLETION_INDEX": "2"}, "1/8"),
    ],
)
def test_where_the_slice_comes_from(worker, environment, expected):
    assert str(choose_slice(worker, environment)) == expected


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "1", "a/b", "-1/4", "1/0"])
def test_a_slice_that_is_none(wrong):
    with pytest.raises(SettingError, match="not a slice"):
        choose_slice(wrong, {})


@pytest.mark.parametrize("count", [{}, {"JOB_COMPLETION_COUNT": "2"}])
def test_an_indexed_job_must_say_how_many_pods_it_has(count):
    """Kubernetes does not; every pod would encode everything."""
    with pytest.raises(SettingError, match="indexed job") as caught:
        choose_slice(None, {"JOB_COMPLETION_INDEX": "2", **count})
    assert "JOB_COMPLETION_COUNT" in caught.value.fix


def test_every_division_takes_every_shard_once():
    for count in (1, 2, 3, 8):
        for number in range(50):
            assert sum(Slice(index + 1, count, "").takes(number) for index in range(count)) == 1
    parts = [Slice(2, 3, "").split(part, 4) for part in range(4)]
    assert {str(part) for part in parts} == {"5/12", "6/12", "7/12", "8/12"}


def test_the_gpu_of_a_process():
    assert local_rank({"LOCAL_RANK": "3"}) == 3
    assert local_rank({"SLURM_LOCALID": "2"}) == 0
    assert local_rank({"SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}) == 2


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 1),  # of the batch script's own shell
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_ID": "0"}, 4),
        ({"LOCAL_WORLD_SIZE": "none"}, 1),
    ],
)
def test_processes_that_share_a_host(said, count):
    assert local_count(said) == count


def test_how_many_gpus():
    assert [gpu_count("all", found) for found in (0, 1, 8)] == [1, 1, 8]
    assert gpu_count("2", 8) == 2 and gpu_count("1", 0) == 1
    for wrong in ("9", "0", "some"):
        with pytest.raises(SettingError):
            gpu_count(wrong, 8)


def tars(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.tar"))}


def test_two_processes_of_one_host_give_the_same_bytes_and_one_report(encoded, settings_of):
    out = encoded / "new"
    (encoded / "ds" / "3.mp4").write_bytes(b"no video")
    report = encode_in_parts(settings_of(encoded, out=out), Slice(1, 1, "default"), 2)
    assert (report.encoded, report.rejected, report.unfinished, report.worker) == (4, 1, [], "1/1")
    report.write(out)
    assert json.loads((out / "report.json").read_text())["encoded"] == 4
    assert {name: digest for name, digest in tars(out).items() if name == "000000.tar"} == {
        "000000.tar": tars(encoded / "out")["000000.tar"]
    }


def test_a_process_that_another_overtook_has_all_it_needs(encoded, settings_of, monkeypatch):
    """Two processes by mistake: the slower one finds every shard committed when it comes to it."""
    plan = encode_slice.survey_and_plan

    def overtaken(settings, *rest):
        planned = plan(settings, *rest)
        for path in (encoded / "out").glob("[0-9]*"):
            shutil.copy(path, settings.out)
        return planned

    monkeypatch.setattr(encode_slice, "survey_and_plan", overtaken)
    report = encode(settings_of(encoded, out=encoded / "new"))
    assert (report.encoded, report.reused, report.unfinished, report.usable) == (0, 5, [], True)


def test_a_process_that_fails_is_named(encoded, settings_of, capfd):
    (encoded / "new").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="2 of 2 processes failed") as caught:
        encode_in_parts(settings_of(encoded, out=encoded / "new"), Slice(1, 1, "default"), 2)
    assert "slice 1/2" in str(caught.value) and "[gpu 0] error" in capfd.readouterr().err
    assert caught.value.code == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 75), (signal.SIGTERM, 143)])
def test_a_process_that_is_killed_leaves_nothing_to_mend(number, code, encoded, monkeypatch, capfd):
    """A job's queue takes 75 for an end from which the same command goes on."""
    start = SpawnProcess.start

    def start_and_kill(process):
        start(process)
        if process.name == "cogprep-gpu-1":
            os.kill(process.pid, number)

    monkeypatch.setattr(SpawnProcess, "start", start_and_kill)
    monkeypatch.setattr("cogprep.commands.encode.visible_gpus", lambda: 2)
    folders = "--data-root", str(encoded / "ds"), "--out", str(encoded / "out")
    monkeypatch.setattr("sys.argv", ["cogprep", "encode", *folders, "--model", "tiny", "--resolution", "9x64x96"])
    with pytest.raises(SystemExit) as ended:
        run_app(app)
    said = capfd.readouterr().err
    assert ended.value.code == code, said
    assert f"1 of 2 processes killed by signal {number.value}" in said and "gpu 1, slice 2/2" in said
    assert "run the same command again" in said
