"""Which signals save, and when they do not."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from forked import Forked
from waiting import wait_for_steps

from cogtrain.distributed import signals
from cogtrain.distributed.signals import SIGNALS, StopRequest
from cogtrain.runs.folder import ask_to_stop, asked_to_stop, read_run
from cogtrain.settings.training import LoraSettings


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_once_and_ends_when_it_comes_again(number, monkeypatch):
    ended, now = [], [100.0]
    monkeypatch.setattr(signals, "end_by", ended.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        for _ in range(2):  # a scheduler sends it to a launcher and its processes
            os.kill(os.getpid(), number)
        assert stop.signal == number and not ended
        now[0] += 3
        other = next(one for one in SIGNALS if one != number)
        os.kill(os.getpid(), other)  # `sbatch --signal` first, then the end of the time
        assert stop.signal == number and not ended
        os.kill(os.getpid(), number)
        assert ended == [number]
    assert signal.getsignal(number) == before


def test_what_nohup_silenced_stays_silent():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


FIRST = ["unshare", "--pid", "--fork"]  # a process that is the first of its container


@pytest.mark.skipif(subprocess.run([*FIRST, "true"], capture_output=True).returncode != 0, reason="no unshare here")
def test_the_first_process_of_a_container_ends_by_a_signal_too_while_it_loads():
    """None ends it by default, and its pod would be killed minutes later."""
    waits = "import time; from cogtrain.distributed.signals import ending_at_once as e\n"
    waits += "with e(): print('here', flush=True); time.sleep(60)"
    process = subprocess.Popen([*FIRST, sys.executable, "-c", waits], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    [first] = psutil.Process(process.pid).children()
    first.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_run_can_be_started_from_a_thread(tmp_path, make_shards, train_here):
    make_shards(tmp_path / "out", samples=2)
    settings = LoraSettings(shards=[str(tmp_path / "out")], rank=2, steps=1, out=tmp_path / "run")
    faults = []

    def run():
        try:
            train_here(settings)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not faults and (tmp_path / "run" / "checkpoint-1").is_dir()


def test_a_signal_in_a_validation_cuts_it_short(tmp_path, make_shards, train_here, monkeypatch):
    """The scheduler's patience is for the checkpoint."""
    from cogtrain.validation import validate

    make_shards(tmp_path / "out", samples=2)
    make_shards(tmp_path / "held", samples=6, seed=3, captions=("held out",))
    read, seen = validate.Validation._read, []

    def read_and_be_told(self, *held_out_and_index):
        seen.append(held_out_and_index)
        if len(seen) == 6 + 2:  # the base model's, and two more
            os.kill(os.getpid(), signal.SIGUSR1)
        return read(self, *held_out_and_index)

    monkeypatch.setattr(validate.Validation, "_read", read_and_be_told)
    settings = LoraSettings(
        shards=[str(tmp_path / "out")], validate_shards=[str(tmp_path / "held")], rank=2, steps=3, validate_every=1,
        save_every=100, out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(signals.Stopped) as stopped:
        train_here(settings)
    assert stopped.value.code == 138 and len(seen) == 8
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_run_that_is_asked_by_its_folder_saves_and_stops_and_goes_on(tmp_path, make_shards, train_here):
    """What the button of `cogtrain watch` does."""
    make_shards(tmp_path / "out", samples=2)
    folder = tmp_path / "run"
    settings = LoraSettings(shards=[str(tmp_path / "out")], rank=2, steps=4, out=folder)
    with pytest.raises(signals.Stopped) as stopped:
        train_here(settings, after_step=lambda step: ask_to_stop(folder) if step == 2 else None)
    assert stopped.value.code == 128 + signal.SIGTERM and not asked_to_stop(folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    begun = read_run(folder).facts.begun
    train_here(settings)
    done = read_run(folder)
    assert len(done.steps) == 4 and done.facts.begun == begun > 0


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_finds_no_processes_ends_the_launcher(number):
    code = (
        "import time; from cogtrain.distributed.launch import _PassOn\n"
        "with _PassOn().listening(): print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=50) == -number and time.monotonic() - began < 50


WITHOUT_OUTPUT = """
import os, runpy, sys
reader, writer = os.pipe()
os.close(reader)
for name in {lost}:
    os.dup2(writer, getattr(sys, name).fileno())
    stream = open(getattr(sys, name).fileno(), "w", buffering=1, closefd=False)
    setattr(sys, name, stream)
    setattr(sys, f"__{{name}}__", stream)
sys.argv = ["cogtrain", "lora", "--shards", "out", "--rank", "2", "--out", "run", "--steps", "{steps}"]
runpy.run_module("cogtrain", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(("lost", "steps", "stopped"), [(["stdout"], 2, False), (["stdout", "stderr"], 500, True)])
def test_a_run_outlives_its_output(lost, steps, stopped, tmp_path, make_shards):
    """`| head` has enough; `2>&1 | tee log` has died of the Ctrl-C that stops the run."""
    make_shards(tmp_path / "out", samples=2)
    (tmp_path / "without.py").write_text(WITHOUT_OUTPUT.format(lost=lost, steps=steps))
    process = Forked([str(tmp_path / "without.py")], tmp_path)
    if stopped:
        assert wait_for_steps(tmp_path / "run", 1, process), process.end()
        os.kill(process.pid, signal.SIGINT)
    code, out, err = process.end()
    assert (code, out) == (130 if stopped else 0, ""), err
    assert err.count("the standard output cannot be written") == (not stopped)
    done = read_run(tmp_path / "run")
    assert (tmp_path / "run" / f"checkpoint-{done.steps[-1].step}").is_dir() and (stopped or len(done.steps) == steps)
