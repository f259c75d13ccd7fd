"""Hosts are lost and come back under torchrun: the run goes on, with the losses of one that nothing happened to."""

import os
import re
import socket
import time

import pytest
from forked import Forked, held_port
from places import CHILDREN
from torch.distributed import TCPStore
from waiting import steps_made, wait_until

from cogtrain.distributed import elastic
from cogtrain.distributed.signals import Stopped
from cogtrain.runs.folder import ask_to_stop, read_run
from cogtrain.settings.training import LoraSettings

STEPS = 500  # which no run here comes to
SETTINGS = {"global_batch": 2, "rank": 4, "lr": 1e-2, "save_every": 1, "keep": 2, "steps": STEPS}
WORDS = [word for name, value in SETTINGS.items() for word in ("--" + name.replace("_", "-"), value)]


@pytest.fixture
def address():
    """Where the agents of a test meet: the first one's, if nobody is there before."""
    with held_port() as port:
        yield port.getsockname()


@pytest.fixture
def agent(tmp_path, address):
    """agent(*words) -> an agent of torchrun for a host of one process, begun; all of a test meet. See agent.py."""
    begun = []

    def begin(*words):
        endpoint = "{}:{}".format(*address)
        begun.append(new := Forked([CHILDREN / "agent.py", 9, endpoint, "cogtrain", *words], tmp_path))
        with socket.socket() as probe:
            wait_for(lambda: probe.connect_ex(address) == 0, new)
        return new

    yield begin
    for one in begun:
        one.kill()


def wait_for(true, agent):
    assert wait_until(true, agent), agent.end(1)


@pytest.fixture
def one_host(tmp_path):
    """As long as this file is there, a host waits for no other."""
    return tmp_path / "one-host"


@pytest.fixture
def undisturbed(tmp_path, train_here, losses):
    """undisturbed(count) -> the losses of so many steps, on one process."""

    def train(count):
        def stop(step):
            if step == count:
                ask_to_stop(tmp_path / "alone")

        settings = LoraSettings(shards=[str(tmp_path / "out")], out=tmp_path / "alone", **SETTINGS)
        with pytest.raises(Stopped):
            train_here(settings, after_step=stop)
        return losses(tmp_path / "alone")

    return train


STRATEGIES = ["ddp"] + [
    pytest.param(strategy, marks=pytest.mark.full)
    for strategy in ("zero1", "zero2", "zero2-offload", "zero3", "zero3-offload")
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_host_is_lost_and_another_joins(strategy, tmp_path, make_shards, agent, one_host, undisturbed, losses):
    make_shards(tmp_path / "out", samples=8)
    run = tmp_path / "run"
    words = ["lora", "--shards", "out", "--out", "run", "--strategy", strategy, "--resume", "never", *WORDS]
    first, second = agent(*words), agent(*words)
    wait_for(lambda: steps_made(run) >= 3, first)
    assert read_run(run).facts.processes == 2
    one_host.touch()
    assert second.kill()
    began, made = time.monotonic(), steps_made(run)
    wait_for(lambda: steps_made(run) >= made + 2 and read_run(run).facts.processes == 1, first)
    print(f"goes on alone after {time.monotonic() - began:.1f} s")
    one_host.unlink()
    third = agent(*words)
    wait_for(lambda: read_run(run).facts.processes == 2, first)
    made = steps_made(run)
    wait_for(lambda: steps_made(run) >= made + 2, first)
    ask_to_stop(run)  # for good: torchrun does not start it again
    ended = [process.end(120) for process in (first, third)]
    assert [code for code, *_ in ended] == [1, 1] and all("agent: ended by a signal" in err for *_, err in ended), ended
    said = "".join(out for _, out, _ in ended)
    assert re.findall(rf"{strategy}, (\d)", said) == ["2", "1", "2"] and said.count("stopped; to resume") == 2
    assert "on 1 process instead of 2: 2 accumulation steps of 1 keep the global batch of 2" in said

    assert losses(run) == pytest.approx(undisturbed(len(losses(run))), rel=1e-5)


@pytest.mark.full
def test_the_host_of_process_0_is_lost(tmp_path, make_shards, agent, one_host, address, undisturbed, losses):
    """They meet at a process of its own, which loses no host."""
    store = TCPStore(*address, None, True, wait_for_workers=False)
    make_shards(tmp_path / "out", samples=8)
    run = tmp_path / "run"
    words = ["lora", "--shards", "out", "--out", "run", *WORDS]
    first, second = agent(*words), agent(*words)
    wait_for(lambda: steps_made(run) >= 3 and read_run(run).facts.processes == 2, first)
    one_host.touch()
    assert first.kill()
    wait_for(lambda: read_run(run).facts.processes == 1, second)
    made = steps_made(run)
    wait_for(lambda: steps_made(run) >= made + 2, second)
    ask_to_stop(run)
    code, out, err = second.end(120)
    assert code == 1 and "on 1 process instead of 2" in out and "agent: ended by a signal" in err, (out, err)
    assert losses(run) == pytest.approx(undisturbed(len(losses(run))), rel=1e-5)
    del store


def test_what_is_refused_is_said_once_and_not_started_again(tmp_path, make_shards, agent, one_host):
    one_host.touch()
    make_shards(tmp_path / "out", samples=2)
    code, _, err = agent("lora", "--shards", "out", "--out", "run", "--global-batch", 3, "--batch-size", 2).end(120)
    assert code == 1 and "agent: ended by a signal" in err
    assert err.count("error: a global batch of 3 cannot be divided") == 1, err


def test_a_restart_is_told_from_a_second_start(monkeypatch):
    for name in ("SLURM_RESTART_COUNT", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert elastic.launcher() == "" and elastic.slurm_job() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    mine = elastic.launcher()
    assert mine and mine == elastic.launcher()
    assert elastic.is_restart(["another", mine], [mine, "new"])  # of several hosts, one has outlived the others
    assert not elastic.is_restart([mine], ["new"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = elastic.slurm_job()
    assert not elastic.is_restart([job], [job])  # two commands of one batch script
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert elastic.is_restart([job], [job]) and not elastic.is_restart(["slurm 8"], [job])


def test_only_torch_is_ended_and_only_where_it_would_start_again(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "environ", os.environ | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0"})
    monkeypatch.setattr("psutil.Process.send_signal", lambda self, number: ended.append(number))
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: ["bash"])
    os.environ |= {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
    elastic.end_launcher()
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: ["/usr/bin/torchrun", "--nnodes=1:2"])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "3"
    elastic.end_launcher()
    os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["LOCAL_RANK"] = "2", "1"
    elastic.end_launcher()
    assert not ended
    os.environ["LOCAL_RANK"] = "0"
    elastic.end_launcher()
    assert len(ended) == 1
