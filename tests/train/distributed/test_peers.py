"""A process that fails, or dies, takes the others with it in seconds; one reason is said."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forked import Forked, held_port
from places import CHILDREN, CHILDREN_PATH

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
    began = time.monotonic()
    ended = leave(how, victim)
    assert time.monotonic() - began < 100
    codes = [2, 2] if how == "raises" else [LOST, LOST]
    codes[victim] = -signal.SIGKILL if how != "raises" else 2
    assert [code for code, *_ in ended] == codes, ended
    errors = "".join(err for *_, err in ended)
    assert errors.count("error:") == 1 and says in errors and "Traceback" not in errors
    # As a bare PyTorchJob starts them, with no word of what is on the same host.
    assert [out for _, out, _ in ended] == ["rank 0, 2 here\n", "rank 1, 2 here\n"]


def leave(*words):
    """How both processes of `leaving.py` end."""
    with held_port() as port:
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
        both = [Forked([CHILDREN / "leaving.py", "leave", *words], None, meeting | {"RANK": rank}) for rank in "01"]
        return [process.end(120) for process in both]


def test_process_0_of_a_run_that_stops_has_time_to_close_its_files():
    """The launcher of its host would end it as soon as another has left, with its last line unsaid."""
    ended = leave("stops", 0)
    assert [(code, err) for code, _, err in ended] == [(143, "")] * 2, ended
    assert ended[0][1].endswith("here\nis waited for\n")


@pytest.fixture
def two_networks():
    """Names of two network namespaces, 10.77.0.1 and 10.77.0.2, with a cable between them."""
    names = [f"cogtrain-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.mark.full
def test_a_host_that_answers_nothing_any_more_is_lost(two_networks):
    """Nothing ends its connections, as where its power is gone. The processes of both sides leave."""
    run = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29555", "PYTHONPATH": CHILDREN_PATH}
    words = [sys.executable, CHILDREN / "leaving.py", "leave", "raises", "7"]  # nobody's number: all sleep
    both = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | run | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "cable"},
        )
        for rank, name in enumerate(two_networks)
    ]  # fmt: skip
    try:
        assert [process.stdout.readline() for process in both] == ["rank 0, 2 here\n", "rank 1, 2 here\n"]
        time.sleep(1)
        subprocess.run(["ip", "-n", two_networks[1], "link", "set", "cable", "down"], check=True)
        began = time.monotonic()
        ended = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [LOST, LOST]
    assert 10 < time.monotonic() - began < 40
    assert all(f"process {other} of 2, on " in err for (_, err), other in zip(ended, (1, 0), strict=True))


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
