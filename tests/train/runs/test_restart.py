"""A run that its launcher starts again goes on in its own folder; a person who types it again is taken at his word."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

from cogcommon.errors import RunError
from cogtrain.distributed.leaving import PeerLost
from cogtrain.distributed.peers import ALONE
from cogtrain.runs import checkpoint as checkpoints
from cogtrain.runs import claim
from cogtrain.runs.claim import claimed
from cogtrain.runs.opening import open_run
from cogtrain.settings.training import LoraSettings

STARTED = dataclasses.replace(ALONE, started_by=("agent 1", "agent 2"))
AGAIN = dataclasses.replace(ALONE, started_by=("agent 2", "agent 3"))


def opened(peers, **settings):
    return open_run(LoraSettings(**settings), torch.device("cpu"), 1, peers)


@pytest.fixture
def begin(tmp_path, make_shards, train_here, monkeypatch):
    """begin(peers, **settings) -> the run, opened; trained where it is to make steps."""
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "out", samples=4)

    def run(peers, **settings):
        from accelerate.state import AcceleratorState

        from cogtrain.distributed.signals import StopRequest
        from cogtrain.trainer.trainer import train

        AcceleratorState._reset_state(reset_partial_state=True)
        return train(opened(peers, shards=["out"], rank=2, **settings), StopRequest(), peers)

    return run


def test_only_a_launcher_that_started_it_before_goes_on(begin, tmp_path):
    other = begin(ALONE, steps=1, out=tmp_path / "other")
    run = begin(STARTED, steps=2, out=tmp_path / "run", resume=str(other / "checkpoint-1"))
    for resume in ("never", str(other / "checkpoint-1")):
        given = {"shards": ["out"], "rank": 2, "steps": 3, "out": run, "resume": resume}
        again = opened(AGAIN, **given).resume
        assert again and again.folder == run / "checkpoint-2"
        for peers in (ALONE, dataclasses.replace(ALONE, started_by=("agent 3",))):
            first = opened(peers, **given).resume
            assert (first and first.folder) == (None if resume == "never" else other / "checkpoint-1")


def test_a_folder_that_nobody_has_named_is_found_again(begin):
    run = begin(STARTED, steps=1)
    assert run.parent.name == "runs"
    assert begin(AGAIN, steps=2) == run
    assert opened(ALONE, shards=["out"], rank=2).resume is None


def test_a_restart_waits_for_the_process_before_it_and_nobody_else_does(tmp_path, capsys, monkeypatch):
    with claimed(tmp_path / "run"):
        with pytest.raises(RunError, match="another process trains") as caught, claimed(tmp_path / "run"):
            pass
        assert "rm" not in caught.value.fix
        with pytest.raises(RunError) as caught, claimed(tmp_path / "run", 0.1):
            pass
        assert caught.value.fix.endswith(f"rm {tmp_path / 'run' / '.lock'}")
    holding = claimed(tmp_path / "run")
    holding.__enter__()
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: holding.__exit__(None, None, None))
    monkeypatch.setattr(claim, "time", clock)  # while one waits, the other ends
    with claimed(tmp_path / "run", 30):
        assert "waits for another process" in capsys.readouterr().err


def test_what_was_made_meanwhile_is_not_taken_away(begin, tmp_path):
    """Between looking for the newest checkpoint and getting the folder's lock, another process may write one."""
    run = begin(ALONE, steps=2, out=tmp_path / "run", save_every=1)
    found = checkpoints.find_checkpoint(run)
    assert found.newest and not checkpoints.find_checkpoint(run / "checkpoint-1").newest
    begin(ALONE, steps=3, out=run, save_every=1)
    for before in (found, None):
        with pytest.raises(PeerLost, match="up to step 3"):
            checkpoints.check_newest(run, before)
    checkpoints.check_newest(run, checkpoints.find_checkpoint(run))
