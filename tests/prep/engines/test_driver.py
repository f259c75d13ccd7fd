"""What a driver makes of what its nodes tell: who tries a lost shard, when a clip is set aside, when a node is.

Its nodes are told of here, and nothing is encoded; test_ray.py has real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cogcommon.errors import RunError
from cogcommon.model.families import Resolution
from cogprep.dataset.lists import Sample
from cogprep.encode.outcome import Outcome
from cogprep.engines.actor import EncodeActor, Fault, Status
from cogprep.engines.driver import Driver
from cogprep.engines.fleet import Fleet, Gpu, Node
from cogprep.plan.plan import PlannedSample, PlannedShard
from cogprep.source.clip import Hashed

SIZE = Resolution(9, 64, 96)
CRASH = Fault("RuntimeError: CUDA error", "encoder.py:7", None, told=False)
DISK = Fault("the disk is full", "/mnt/out", "make room there", told=True)


def a_shard(number: int) -> PlannedShard:
    sources = [f"{number}-{name}.mp4" for name in "ab"]
    samples = [
        PlannedSample(source, Sample(line, "a caption", source, ""), Hashed(1, 1, b""), b"", SIZE)
        for line, source in enumerate(sources, 1)
    ]
    return PlannedShard("train", number, SIZE, samples)


class Cluster:
    """A driver of some shards, and nodes of one GPU each that say what a test has them say."""

    def __init__(self, shards: int, nodes: str) -> None:
        self.begun = 0
        self.given: list[tuple] = []  # node, shard, what is set aside, carefully
        rows = {name: Node(name, name, 1) for name in nodes}
        ray = SimpleNamespace(
            remote=lambda actor: actor,
            kill=lambda _actor: None,
            exceptions=SimpleNamespace(RayError=RuntimeError),
            nodes=lambda: [
                {"NodeID": name, "Alive": node.alive, "Resources": {"GPU": 1.0}} for name, node in rows.items()
            ],
        )
        fleet = Fleet(ray, EncodeActor, ())
        fleet.nodes |= rows
        job = SimpleNamespace(shards=[a_shard(number) for number in range(shards)], begin=self.begin, outcome=Outcome())
        self.fleet, self.job = fleet, job
        self.driver = Driver(fleet, job, SimpleNamespace(node_timeout=60.0, clip_timeout=60.0))
        self.start()

    def begin(self) -> None:
        self.begun += 1

    def start(self) -> None:
        """An actor on every node that may have one and has none, with its models loaded."""
        for node in self.fleet.usable:
            if all(gpu.node is not node for gpu in self.fleet.gpus):
                encode = lambda *given, name=node.name: self.given.append((name, *given)) or "a call"  # noqa: E731
                gpu = Gpu(node, SimpleNamespace(encode=SimpleNamespace(remote=encode)), None)
                self.fleet.gpus.append(gpu)
                self.driver._settle(gpu, None)
        self.driver._hand_out()

    def at(self, name: str) -> Gpu:
        return next(gpu for gpu in self.fleet.gpus if gpu.node.name == name)

    def tell(self, name: str, result: object, clip: str = "") -> None:
        """A node's call ends, with a clip at hand."""
        gpu = self.at(name)
        gpu.call, gpu.status = None, Status(clip, 0, 0.0, "")
        self.driver._settle(gpu, result)
        self.start()


def numbers(cluster: Cluster) -> list[tuple[str, int]]:
    return [(name, shard.number) for name, shard, *_ in cluster.given]


def test_a_lost_shard_goes_to_another_node_and_a_clip_at_hand_twice_is_set_aside(capsys):
    cluster = Cluster(1, "ab")
    assert numbers(cluster) == [("a", 0)] and cluster.begun == 1
    cluster.tell("a", CRASH, "0-a.mp4")  # not carefully: whichever clip it was, nobody knows
    cluster.tell("b", CRASH, "0-b.mp4")
    cluster.tell("a", CRASH, "0-b.mp4")
    assert numbers(cluster) == [("a", 0), ("b", 0), ("a", 0), ("b", 0)]
    assert [careful for *_, careful in cluster.given] == [False, True, True, True]
    (reason,) = cluster.given[-1][2].values()
    assert cluster.given[-1][2].keys() == {"0-b.mp4"} and "lost 3 times, the last time on node a" in reason
    cluster.tell("b", Outcome(encoded=1))
    assert cluster.job.outcome.encoded == 1 and not cluster.driver._tasks
    assert "0-b.mp4 is set aside, after 3 tries" in capsys.readouterr().err


def test_a_shard_that_is_lost_while_no_clip_is_at_hand_ends_the_run():
    cluster = Cluster(1, "a")
    cluster.tell("a", CRASH)
    cluster.tell("a", CRASH)
    with pytest.raises(RunError, match="lost 3 times while no clip was at hand: RuntimeError: CUDA error"):
        cluster.tell("a", CRASH)


def test_a_node_that_leaves_is_to_blame_itself():
    cluster = Cluster(1, "abcd")
    for _ in range(3):
        name = cluster.given[-1][0]
        cluster.at(name).node.alive = False
        cluster.tell(name, RuntimeError("the node has died"))
    assert numbers(cluster) == [("a", 0), ("b", 0), ("c", 0), ("d", 0)]


def test_what_a_disk_refuses_is_the_nodes_fault_unless_another_says_so_too():
    cluster = Cluster(2, "abc")
    cluster.tell("a", DISK)
    assert not cluster.fleet.nodes["a"].usable
    cluster.tell("b", Outcome(encoded=2))
    assert numbers(cluster) == [("a", 0), ("b", 1), ("c", 0)]
    with pytest.raises(RunError, match="the disk is full") as caught:
        cluster.tell("c", DISK)
    assert caught.value.fix == "make room there" and "a, c" in caught.value.where


def test_a_node_that_loses_one_shard_after_the_other_is_sick():
    cluster = Cluster(6, "ab")
    for number in (0, 2, 3, 4):
        assert cluster.at("a").shard.number == number
        cluster.tell("a", CRASH)
    assert not cluster.fleet.nodes["a"].usable
    for _ in range(6):
        cluster.tell("b", Outcome(encoded=2))
    assert not cluster.driver._tasks and cluster.job.outcome.encoded == 12


def test_idle_gpus_of_a_node_that_gets_no_shards_do_not_count(monkeypatch):
    """As many actors are started as there are shards, on nodes that may take one."""
    monkeypatch.setattr("cogprep.engines.driver.time", SimpleNamespace(monotonic=lambda: 0.0))
    cluster, started = Cluster(1, "ab"), []
    cluster.tell("a", Outcome(busy=[("train", 0)]))  # a is idle for a while
    cluster.fleet.gpus.remove(cluster.at("b"))
    cluster.fleet.gpus.append(second := Gpu(cluster.fleet.nodes["a"], None, None))
    cluster.driver._settle(second, DISK)

    def start_actor(nodes: list[Node]) -> bool:
        started.append([node.name for node in nodes])
        return len(started) == 1

    monkeypatch.setattr(cluster.fleet, "start_actor", start_actor)
    cluster.driver._start_actors()
    assert started == [["b"]]


def test_a_shard_that_another_process_writes_is_tried_again_and_left_to_it_in_the_end(monkeypatch):
    cluster = Cluster(1, "a")
    now = [0.0]
    monkeypatch.setattr("cogprep.engines.driver.time", SimpleNamespace(monotonic=lambda: now[0]))
    for now[0] in (10.0, 40.0, 69.0):
        cluster.driver._hand_out()
        cluster.tell("a", Outcome(busy=[("train", 0)]))
        cluster.driver._leave_to_others()
        assert cluster.driver._tasks
    now[0] = 71.0
    cluster.driver._leave_to_others()
    assert not cluster.driver._tasks and cluster.job.outcome.busy == [("train", 0)]
