"""The engines as a command takes them: what is refused, before anything is connected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import pytest

from cogcommon.errors import SettingError
from cogcommon.model.families import Resolution
from cogprep.engines import driver, fleet, ray_engine
from cogprep.engines.actor import Status
from cogprep.engines.driver import standing
from cogprep.engines.fleet import Gpu, Node
from cogprep.engines.table import ENGINES
from cogprep.plan.plan import PlannedShard
from cogprep.settings.encode import EngineName


@pytest.mark.parametrize(
    ("given", "what", "fix"),
    [
        ({"ray_address": "ray://head:10001"}, "client", "on a host of the cluster"),
        ({"gpus": "2"}, "every GPU", "leave --gpus out"),
        ({"worker": "1/4"}, "one driver", "leave --worker out"),
    ],
)
def test_what_the_ray_engine_refuses(run_encode, given, what, fix):
    with pytest.raises(SettingError, match=what) as caught:
        run_encode(engine="ray", **given)
    assert fix in caught.value.fix


def test_one_driver_and_not_one_a_task(run_encode, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SettingError, match="one driver") as caught:
        run_encode(engine="ray")
    assert "slice 2/4" in caught.value.where


def test_without_ray_the_error_says_how_to_install_it(run_encode, monkeypatch):
    monkeypatch.setattr(ray_engine, "find_spec", lambda _name: None)
    with pytest.raises(SettingError, match="not installed") as caught:
        run_encode(engine="ray")
    assert caught.value.fix == 'pip install "cogtune[ray]"'


@pytest.mark.parametrize(
    ("address", "what"), [("127.0.0.1:1", "no Ray cluster answers"), ("head", "is no address"), (":7", "is no address")]
)
def test_an_address_where_no_cluster_is(run_encode, monkeypatch, address, what):
    """At once: Ray itself would try for minutes."""
    monkeypatch.setattr(ray_engine, "find_spec", lambda _name: True)
    with pytest.raises(SettingError, match=what) as caught:
        run_encode(engine="ray", ray_address=address)
    assert "--ray-address HEAD:6379" in caught.value.fix


def test_what_each_node_does_is_told_the_slowest_first(monkeypatch):
    now = 1000.0
    for module in (driver, fleet):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    fast, slow, new, lost, idle = (Node(name, name, 1) for name in ("fast", "slow", "new", "lost", "idle"))
    for node, clips in ((fast, 120), (slow, 30), (lost, 20), (idle, 240)):
        node.since, node.clips = now - 120, clips
    gpus = [Gpu(node, None, "a call", loaded=node is not new, answered=now) for node in (fast, slow, new, lost, idle)]
    for gpu, waits_for in zip(gpus[:2], ("the VAE", "decoding"), strict=True):
        gpu.status = Status("key", 1, 0.0, f"waiting for {waits_for}")
    for gpu in gpus:
        gpu.shard = PlannedShard("train", 0, Resolution(9, 64, 96), []) if gpu.node not in (new, idle) else None
    gpus[3].answered = now - 45
    assert standing([fast, slow, new, lost, idle], gpus) == [
        "new: 0.0 clips/min, loading the models",
        "lost: 10.0 clips/min, no sign of life for 45 s",
        "slow: 15.0 clips/min, waiting for decoding",
        "fast: 60.0 clips/min, waiting for the VAE",
        "idle: 120.0 clips/min, nothing to do",
    ]


def test_every_engine_that_can_be_named_is_there():
    assert set(ENGINES) == set(get_args(EngineName))


def test_signed_addresses_are_not_sent_to_other_hosts(monkeypatch):
    monkeypatch.setenv("COGPREP_SIGNED_CLIPS", "file")
    with pytest.raises(SettingError, match="does not leave this host"):
        ray_engine.RayEngine(None).encode(None)
