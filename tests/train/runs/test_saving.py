"""Checkpoints that a thread writes beside the next steps: whole, in order, known before anything depends on them."""

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
from forked import Forked
from waiting import wait_until

from cogcommon.errors import DiskError
from cogtrain.distributed.signals import Stopped
from cogtrain.distributed.snapshot import EMA, OPTIMIZER, WEIGHTS, Snapshot
from cogtrain.runs import checkpoint as checkpoints
from cogtrain.settings.training import LoraSettings
from cogtrain.trainer import saver

COMMON = {"rank": 4, "lr": 1e-2, "save_every": 1, "keep": 9}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, samples=4)
    return folder


@pytest.fixture
def here(tmp_path, shards, train_here):
    """here(after_step, **settings) -> run folder; trains in this process."""

    def run(after_step=None, **settings):
        common = COMMON | {"shards": [str(shards)], "out": tmp_path / "run"}
        return train_here(LoraSettings(**common | settings), after_step=after_step)

    return run


@pytest.fixture
def gate(monkeypatch):
    """Opened, it lets the threads write; ``done`` is what was done, in order."""
    gate = threading.Event()
    gate.done = []
    write, copied = Snapshot.write, Snapshot.copied

    def slowly(snapshot, folder):
        assert threading.current_thread() is not threading.main_thread()
        assert gate.wait(60)
        write(snapshot, folder)
        gate.done.append("written")

    def noted(snapshot):
        gate.done.append("copied")
        return copied(snapshot)

    monkeypatch.setattr(Snapshot, "write", slowly)
    monkeypatch.setattr(Snapshot, "copied", noted)
    return gate


def names(run):
    return [path.name for path in checkpoints.list_checkpoints(run)]


def files(run, step):
    return [(run / f"checkpoint-{step}" / name).read_bytes() for name in (WEIGHTS, EMA, OPTIMIZER)]


def test_steps_are_made_while_it_is_written_and_it_holds_none_of_them(here, tmp_path, gate, monkeypatch, capsys):
    """Byte for byte what a run without room for copies writes while training waits; whose reason is said once."""
    seen, said = [], []

    def after_step(step):
        run = tmp_path / "run"
        said.append(capsys.readouterr().out)
        seen.append((step, names(run), "saved" in said[-1]))
        if step == 3:
            gate.set()  # from now on it may be written at any moment

    run = here(after_step, steps=4, save_every=2, ema=0.9)
    assert seen[:3] == [(1, [], False), (2, [], False), (3, [], False)]
    assert names(run) == ["checkpoint-2", "checkpoint-4"]
    assert f"saved {run}/checkpoint-2" in "".join(said) + capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(saver, "left_beside", lambda *_: 0)
    monkeypatch.setattr(Snapshot, "copied", None)
    monkeypatch.setattr(saver, "_COSTS", 1)
    waiting = here(steps=4, save_every=2, ema=0.9, out=tmp_path / "waiting")
    assert [files(run, step) for step in (2, 4)] == [files(waiting, step) for step in (2, 4)]
    said = capsys.readouterr().out
    assert said.count("training waits while a checkpoint of") == 1 and "host memory has no room" in said


def test_the_second_of_two_waits_for_the_first_and_so_does_the_end(here, gate):
    threading.Timer(0.3, gate.set).start()
    run = here(steps=3)
    assert gate.done == ["copied", "written"] * 3
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_old_ones_stay_until_the_new_one_is_whole(here, tmp_path, gate):
    gate.set()
    here(steps=1, keep=1)
    gate.clear()
    seen = []

    def after_step(step):
        seen.append(names(tmp_path / "run"))
        if step == 3:
            gate.set()

    assert names(here(after_step, steps=3, save_every=2, keep=1)) == ["checkpoint-3"]
    assert seen == [["checkpoint-1"]] * 2


def test_a_signal_is_answered_once_the_checkpoint_is_whole(here, tmp_path, gate):
    def after_step(step):
        if step == 2:  # while that of step 1 is being written
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.3, gate.set).start()

    with pytest.raises(Stopped) as stopped:
        here(after_step, steps=9)
    assert stopped.value.code == 143 and names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


@pytest.fixture
def small_files():
    """small_files(bytes): a file that grows larger is refused by the system from now on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_fault_while_it_is_written_ends_the_run_with_the_weights_kept(here, tmp_path, small_files, losses):
    whole = here(steps=6, save_every=2, out=tmp_path / "whole")
    weights, optimizer = ((whole / "checkpoint-6" / name).stat().st_size for name in (WEIGHTS, OPTIMIZER))
    assert weights < 1.5 * weights < optimizer
    run = tmp_path / "run"

    def after_step(step):
        if step == 3:
            wait_until((run / "checkpoint-2").exists)
            small_files(int(1.5 * weights))

    with pytest.raises(DiskError) as fault:
        here(after_step, steps=6, save_every=2)
    rescued = next(run.glob("step-*"))
    assert "the file grew larger than files may be there" in str(fault.value)
    assert "goes on from checkpoint-2, which is whole" in fault.value.fix
    assert f"the weights after step {rescued.name[5:]} are in {rescued}" in fault.value.fix
    assert rescued.name in ("step-4", "step-5", "step-6") and not list(run.glob(".checkpoint*"))
    small_files(resource.RLIM_INFINITY)
    assert losses(here(steps=6, save_every=2)) == losses(whole)


def test_a_fault_of_the_last_one_costs_the_checkpoint_alone(here, tmp_path, small_files, capsys):
    whole = here(steps=2, save_every=2, out=tmp_path / "whole")
    limit = int(1.5 * (whole / "checkpoint-2" / WEIGHTS).stat().st_size)
    run = here(lambda step: small_files(limit), steps=2, save_every=2)
    said = capsys.readouterr().out
    assert "note: there is no checkpoint of step 2: the file grew larger" in said and names(run) == []
    assert said.index("note: there is no checkpoint") < said.index(f"wrote {run}/pytorch_lora_weights.safetensors")


KILLED = """
import os, signal, sys
from pathlib import Path
from cogtrain.distributed import snapshot
write = snapshot.Snapshot.write
def killed(self, folder):
    write(self, folder)
    if "checkpoint-3" in folder.name:
        with (folder / snapshot.OPTIMIZER).open("r+b") as stream:
            stream.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
snapshot.Snapshot.write = killed
from cogtrain.cli import main
main()
"""


def test_killed_while_it_is_written_the_one_before_is_resumed(here, tmp_path, shards, losses):
    whole = here(steps=5)
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    words = ["lora", "--shards", shards, "--steps", 5, "--rank", 4, "--lr", 1e-2, "--save-every", 1, "--keep", 9]
    code, _, said = Forked([program, *words, "--out", tmp_path / "killed"], tmp_path).end()
    assert code == -signal.SIGKILL, said
    assert names(tmp_path / "killed")[-1] == "checkpoint-2" and list((tmp_path / "killed").glob(".checkpoint-3.*"))
    run = here(steps=5, out=tmp_path / "killed")
    assert losses(run) == losses(whole) and names(run)[-1] == "checkpoint-5"
    assert not list(Path(run).glob(".checkpoint*"))
    assert json.loads((run / "checkpoint-5" / "state.json").read_text())["step"] == 5


def test_it_is_written_while_training_waits_where_no_copy_can_be_made(here, monkeypatch, losses, capsys):
    def refused(snapshot):
        raise RuntimeError("CUDA error: out of memory")  # as page-locked memory is refused

    monkeypatch.setattr(Snapshot, "copied", refused)
    monkeypatch.setattr(saver, "_COSTS", 1)
    run = here(steps=2)
    assert "is written: no copy of it can be made in host memory" in capsys.readouterr().out
    assert set(losses(run)) == {1, 2}
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
