"""A process that fails, or dies, takes the others with it in seconds; one reason is said."""

import os
import signal
import socket
import time

import pytest
from forked import Forked
from places import CHILDREN

from cogtrain.distributed import peers
from cogtrain.distributed.leaving import LOST
from cogtrain.distributed.peers import Node


@pytest.mark.parametrize(
    ("how", "victim", "says"),
    [
        ("raises", 1, "error: its disk is full"),
        ("dies", 1, "process 1 of 2, on "),
        ("dies-unasked", 1, "ended without a word"),
        ("dies", 0, "process 0 of 2, on "),  # to whom all are connected
    ],
)
def test_all_leave_when_one_does(how, victim, says):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = CHILDREN / "leaving.py"
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    began = time.monotonic()
    words = [script, "leave", how, victim]
    both = [Forked(words, environment=meeting | {"RANK": str(rank)}) for rank in range(2)]
    ended = [process.end(120) for process in both]
    assert time.monotonic() - began < 100
    codes = [2, 2] if how == "raises" else [LOST, LOST]
    codes[victim] = -signal.SIGKILL if how != "raises" else 2
    assert [code for code, *_ in ended] == codes, ended
    errors = "".join(err for *_, err in ended)
    assert errors.count("error:") == 1 and says in errors and "Traceback" not in errors
    # As a bare PyTorchJob starts them, with no word of what is on the same host.
    assert [out for _, out, _ in ended] == ["rank 0, 2 here\n", "rank 1, 2 here\n"]


def test_a_process_has_a_gpu_of_its_own_among_those_that_it_sees(monkeypatch):
    places = (Node("m1", "a"), Node("m2", "b"), Node("m1", "a"), Node("m2", "b"), Node("m2", "c"))
    for rank, visible, gpu, here in ((2, 8, "1", "2"), (3, 8, "1", "2"), (3, 1, "0", "2"), (4, 8, "0", "1")):
        monkeypatch.setattr("cogcommon.model.device.visible_gpus", lambda visible=visible: visible)
        monkeypatch.setattr(os, "environ", {})
        peers._set_local_rank(peers.Peers(rank, 5, places))
        assert os.environ == {"LOCAL_RANK": gpu, "LOCAL_WORLD_SIZE": here}


def test_alone_there_is_nobody_to_ask():
    assert peers.ALONE.all_gather(3) == [3] and peers.ALONE.all_reduce_max(3) == 3 and peers.ALONE.broadcast("x") == "x"
    assert peers.ALONE.together(lambda: 5) == 5
