"""The job file of `cogprep launch`, run as Slurm would: its tasks divide the shards, and a requeue goes on."""

from __future__ import annotations

import hashlib

import pytest
import typer.main
from slurm import Job
from waiting import wait_until

from cogcommon.errors import SettingError
from cogprep.cli import app


def tars(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.tar"))}


def test_a_job_that_the_output_folder_would_refuse_is_not_written(encoded, monkeypatch):
    monkeypatch.chdir(encoded)
    words = ["encode", "--data-root", "ds", "--out", "out", "--model", "tiny", "--resolution", "9x64x96"]

    def launch(*more):
        command = ["launch", "--on", "slurm", "--", *words, *more]
        typer.main.get_command(app).main(command, prog_name="cogprep", standalone_mode=False)

    with pytest.raises(SettingError, match="other settings") as caught:
        launch("--frames", "even")
    assert "--frames: 'even' here, 'auto' there" in caught.value.where
    with pytest.raises(SettingError):
        launch("--out", "ds")
    assert not list(encoded.glob("*.sbatch"))
    launch()
    launch("--out", "new", "--frames", "even")
    assert len(list(encoded.glob("*.sbatch"))) == 2


@pytest.mark.full
def test_two_tasks_encode_their_parts_and_go_on_after_the_limit(encoded, monkeypatch):
    """USR1 comes once the first shard is there; the same script is started again, and the bytes are the same."""
    monkeypatch.chdir(encoded)
    words = ["encode", "--data-root", "ds", "--out", "new", "--model", "tiny", "--resolution", "9x64x96"]
    words += ["--shard-samples", "2", "--workers", "1"]
    launch = ["launch", "--on", "slurm", "--gpus", "2", "--time", "10m", "--grace", "60", "--", *words]
    typer.main.get_command(app).main(launch, prog_name="cogprep", standalone_mode=False)
    script, new = encoded / "encode-new.sbatch", encoded / "new"
    first = Job(script, encoded / "slurm", 42)
    assert wait_until(lambda: any(new.glob("*.tar")) or any(new.glob(".*.tmp")), first), first.end()
    first.signal_step()
    code, requeued, said = first.end()
    assert (code, requeued) == (138, True), said
    assert "run the same command again" in said and "Traceback" not in said
    code, requeued, said = Job(script, encoded / "slurm", 42, restarts=1).end()
    assert (code, requeued) == (0, False), said
    assert "worker 1/2 (the srun step)" in said and "worker 2/2 (the srun step)" in said
    assert tars(new) == tars(encoded / "out")
