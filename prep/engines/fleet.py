"""The GPUs of a cluster: which nodes are there, and an actor on each of their GPUs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cogcommon.cli.progress import say
from cogcommon.words import counted, first_line

from ..encode.outcome import Outcome
from ..plan.plan import PlannedShard
from .actor import EncodeActor, Fault, Status

_LOOK_S = 1.0  # between two looks at the nodes
_ASK_S = 1.0  # between two questions to an actor how it gets on
_CAREFUL_ASK_S = 0.05  # likewise, where each clip waits for it
LOGS = "/tmp/ray/session_latest/logs there"
_LOADS = 3  # actors in a row that died before they had loaded their models: it is not chance


@dataclass(eq=False)
class Node:
    """A host of the cluster that has GPUs."""

    id: str
    name: str
    gpus: int
    alive: bool = True
    fault: Fault | None = None  # why it gets no more shards
    losses: int = 0  # of its actors
    failed_loads: int = 0  # in a row
    lost: set[str] = field(default_factory=set)  # shards, since it last finished one
    clips: int = 0  # that it has settled
    outcome: Outcome = field(default_factory=Outcome)  # of its shards that are done
    since: float | None = None  # it got its first shard

    @property
    def usable(self) -> bool:
        return self.alive and self.fault is None

    @property
    def per_minute(self) -> float:
        """Clips a minute, since it got its first shard."""
        return 0.0 if self.since is None else 60 * self.clips / max(time.monotonic() - self.since, 1e-3)


@dataclass(eq=False)
class Gpu:
    """One GPU of a node, and the actor on it."""

    node: Node
    actor: Any
    call: Any  # what it was asked to do and has not answered; None: it is idle
    loaded: bool = False
    shard: PlannedShard | None = None
    careful: bool = False
    status: Status | None = None  # the last one
    asked: Any = None  # a question for its status, under way
    answered: float = field(default_factory=time.monotonic)  # the last sign of life

    def ask(self) -> None:
        """Ask how it gets on, unless a question is under way or was answered just now."""
        wait = _CAREFUL_ASK_S if self.careful else _ASK_S
        if self.asked is None and time.monotonic() - self.answered >= wait:
            self.asked = self.actor.status.remote(self.status.clip if self.status else "")

    def heard(self, status: Status) -> None:
        """It has said how it gets on."""
        if self.shard is not None:
            before = self.status.settled if self.status else 0
            self.node.clips += max(0, status.settled - before)
        self.status, self.answered = status, time.monotonic()

    def give(self, shard: PlannedShard, set_aside: Mapping[str, str], careful: bool) -> None:
        """Have it encode a shard."""
        self.shard, self.careful, self.status, self.asked = shard, careful, None, None
        self.answered = time.monotonic()
        self.node.since = self.node.since or self.answered
        self.call = self.actor.encode.remote(shard, set_aside, careful)


class Fleet:
    """Nodes come and go; actors are started on their GPUs, and end with this process at the latest.

    Args:
        ray: the library, connected.
        actor: what runs on each GPU.
        given: its arguments, but for the number of GPUs that share the node.
    """

    def __init__(self, ray: Any, actor: type[EncodeActor], given: Sequence[Any]) -> None:
        self._ray = ray
        self._actor = ray.remote(actor)
        self._given = given
        self.nodes: dict[str, Node] = {}
        self.gpus: list[Gpu] = []
        self._looked = 0.0

    @property
    def usable(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.usable]

    def look(self) -> None:
        """Take notice of nodes that have come or gone, at most once a second."""
        if time.monotonic() - self._looked >= _LOOK_S:
            self._look_now()

    def _look_now(self) -> None:
        first = not self._looked
        self._looked = time.monotonic()
        alive = {
            row["NodeID"]: row for row in self._ray.nodes() if row["Alive"] and row["Resources"].get("GPU", 0) >= 1
        }
        for id_, row in alive.items():
            if id_ not in self.nodes:
                node = self.nodes[id_] = Node(id_, self._name(row), int(row["Resources"]["GPU"]))
                if not first:
                    say(f"node {node.name} has joined, with {counted(node.gpus, 'GPU')}")
        for node in self.nodes.values():
            if node.alive and node.id not in alive:
                node.alive = False
                self.gpus = [gpu for gpu in self.gpus if gpu.node is not node or gpu.call is not None]
                say(f"node {node.name} has left")

    def _name(self, row: Mapping[str, Any]) -> str:
        """A host's name, unless the node was given one of its own; never that of another node."""
        own = row.get("NodeName") or ""
        name = own if own and own != row["NodeManagerAddress"] else row["NodeManagerHostname"]
        taken = any(node.name == name for node in self.nodes.values())
        return f"{name}-{row['NodeID'][:6]}" if taken else name

    def start_actor(self, wanted: Sequence[Node]) -> bool:
        """Start an actor on the first node of these that has a GPU without one; returns whether there was any."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in wanted:
            if sum(gpu.node is node for gpu in self.gpus) < node.gpus:
                where = NodeAffinitySchedulingStrategy(node.id, soft=False)
                options = {"num_gpus": 1, "num_cpus": 0, "max_concurrency": 2, "scheduling_strategy": where}
                actor = self._actor.options(**options).remote(*self._given, node.gpus)
                self.gpus.append(Gpu(node, actor, actor.load.remote()))
                return True
        return False

    def wait(self, seconds: float) -> list[tuple[Gpu, Any]]:
        """What has been answered by now: a GPU, and the result of its call, or the exception that ended it.

        Statuses are noted with their GPU.
        """
        for gpu in self.gpus:
            gpu.ask()
        calls = {gpu.call: gpu for gpu in self.gpus if gpu.call is not None}
        asked = {gpu.asked: gpu for gpu in self.gpus if gpu.asked is not None}
        if not calls and not asked:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait([*calls, *asked], num_returns=len(calls) + len(asked), timeout=0)
        if not ready:
            ready, _ = self._ray.wait([*calls, *asked], num_returns=1, timeout=seconds)
        ended = []
        for ref in ready:
            if ref in asked:
                asked[ref].asked = None
                with suppress(self._ray.exceptions.RayError):  # the call tells of it
                    asked[ref].heard(self._ray.get(ref))
        for ref in ready:
            if ref in calls:
                calls[ref].call = None
                try:
                    ended.append((calls[ref], self._ray.get(ref)))
                except self._ray.exceptions.RayError as error:
                    ended.append((calls[ref], error))
        return ended

    def part_with(self, gpu: Gpu, why: str) -> None:
        """End an actor, which is of no use any more; its locks go with its process."""
        self.gpus.remove(gpu)
        gpu.node.losses += 1
        self._kill(gpu)
        if not gpu.loaded:
            gpu.node.failed_loads += 1
            if gpu.node.failed_loads >= _LOADS:
                gpu.node.fault = Fault(f"its actors end before they have loaded the models: {why}", None, None, True)

    def end(self) -> None:
        """End every actor."""
        for gpu in self.gpus:
            self._kill(gpu)
        self.gpus.clear()

    def _kill(self, gpu: Gpu) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(gpu.actor)

    def still_alive(self, node: Node) -> bool:
        """Whether a node is there now."""
        self._look_now()
        return node.alive


def why_lost(error: Exception) -> str:
    """An exception of Ray's, in a few words."""
    text = str(error)
    if type(error).__name__ == "ActorUnavailableError":
        return "the connection to it was lost"
    if "node has died" in text:
        return "the node has gone"
    if "out of memory" in text.lower() or "OOM" in text:
        return "it was killed, since the node's memory was full"
    if "worker process has died" in text:
        return f"its process has died; {LOGS} may say why"
    told = [line.strip() for line in text.splitlines() if line.strip().startswith("The actor died because")]
    return told[0] if told else first_line(error)
