"""Hands planned shards to the GPUs of a cluster until every one of them is committed.

It keeps nothing: a shard is done when its record is there, so a driver that was lost is started again and plans
what is left. That a shard has one writer is held by its lock, not by the driver.

What happens to a shard whose actor is lost, or hangs, or raises what nobody expects::

    1st loss      it goes to another node, one clip at a time from now on, so that the clip at hand is to blame
    3rd loss      a clip that was at hand at two of them is set aside: it is left for the next run, by name

What the disk or the models of a node refuse is no clip's fault: that node gets no more shards, and says why.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cogcommon.cli.progress import say, stage
from cogcommon.cli.stages import Stage
from cogcommon.errors import RunError
from cogcommon.words import in_words

from ..encode.engine import Job
from ..encode.outcome import NodeWork, Outcome
from ..plan.folder import shard_label
from ..plan.plan import PlannedShard
from ..settings.encode import EncodeSettings
from .actor import Fault
from .fleet import LOGS, Fleet, Gpu, Node, why_lost

TRIES = 3  # of a clip, before it is set aside; of a shard that is lost with no clip at hand, before the run gives up
_REFUSED = 2  # nodes that may refuse a shard for no clip's fault, before the run gives up
_SICK = 4  # different shards that a node loses without finishing one between: it is the node
_WAIT_S = 0.25  # for an answer of the cluster
_BUSY_S = 2.0  # before a shard that another process writes is tried again
_LEFT_S = 60.0  # and at least so long, before it is left to that process: one that we end may take a while to go
_TELL_S = 60.0  # between two lines about all nodes


@dataclass(eq=False)
class _Task:
    """A shard that is not committed yet."""

    shard: PlannedShard
    held: bool = False  # a GPU has it
    careful: bool = False
    failed_on: set[str] = field(default_factory=set)  # ids of nodes
    suspects: Counter[str] = field(default_factory=Counter)  # keys of clips at hand when it was lost
    set_aside: dict[str, str] = field(default_factory=dict)  # keys, and why
    lost: int = 0  # with no clip at hand, by a node that is still there
    refused: list[str] = field(default_factory=list)
    not_before: float = 0.0
    busy_since: float | None = None  # another process writes it

    @property
    def label(self) -> str:
        return shard_label(self.shard.split, self.shard.number)

    def source(self, key: str) -> str:
        """A clip, as the list names it."""
        return next(planned.sample.source for planned in self.shard.samples if planned.key == key)


class Driver:
    """Encodes the shards of a job on a fleet.

    Args:
        fleet: without actors yet.
        settings: as the actors have them.
    """

    def __init__(self, fleet: Fleet, job: Job, settings: EncodeSettings) -> None:
        self._fleet = fleet
        self._job = job
        self._settings = settings
        self._tasks = [_Task(shard) for shard in job.shards]
        self._settled = 0  # samples of shards that are done
        self._begun = False
        self._told = time.monotonic()

    def run(self) -> None:
        """Encode and commit every shard.

        Raises:
            RunError: no node can encode, or several refuse a shard for no clip's fault.
        """
        total = sum(len(task.shard.samples) for task in self._tasks)
        with self._job.clock("encode"), stage("encoding", total, "clip") as bar:
            while self._tasks or not self._begun:
                self._fleet.look()
                self._give_up_if_hopeless()
                self._start_actors()
                self._hand_out()
                for gpu, result in self._fleet.wait(_WAIT_S):
                    self._settle(gpu, result)
                self._part_with_stalled()
                self._leave_to_others()
                self._show(bar)
        self._job.outcome.nodes.extend(
            NodeWork(node.name, node.clips, round(node.per_minute, 1), node.outcome.waits_for)
            for node in self._fleet.nodes.values()
            if node.since is not None
        )

    # What there is to do, and who may do it.

    def _waiting(self) -> Iterator[_Task]:
        now = time.monotonic()
        return (task for task in self._tasks if not task.held and now >= task.not_before)

    def _may(self, node: Node, task: _Task) -> bool:
        """Whether a node may try a shard: one that lost it only where there is no other."""
        return node.id not in task.failed_on or all(other.id in task.failed_on for other in self._fleet.usable)

    def _start_actors(self) -> None:
        """As many as there are shards, at most one a GPU; and where a shard waits for another node, there."""
        waiting = [task for task in self._tasks if not task.held]
        able = sum(
            gpu.shard is not None
            or (gpu.node.usable and (not gpu.loaded or any(self._may(gpu.node, task) for task in waiting)))
            for gpu in self._fleet.gpus
        )
        nodes = sorted(self._fleet.usable, key=lambda node: node.losses)
        if waiting:
            nodes = [node for node in nodes if any(self._may(node, task) for task in waiting)]
        while able < max(1, len(self._tasks)) and self._fleet.start_actor(nodes):
            able += 1

    def _hand_out(self) -> None:
        for gpu in self._fleet.gpus:
            if gpu.loaded and gpu.call is None and gpu.node.usable:
                if not self._begun:
                    self._job.begin()
                    self._begun = True
                task = next((task for task in self._waiting() if self._may(gpu.node, task)), None)
                if task is not None:
                    task.held = True
                    gpu.give(task.shard, task.set_aside, task.careful)

    def _task_of(self, gpu: Gpu) -> _Task | None:
        return next((task for task in self._tasks if task.shard is gpu.shard), None)

    # What comes back.

    def _settle(self, gpu: Gpu, result: object) -> None:
        """A call has ended: models are loaded, a shard is done, or something failed."""
        if isinstance(result, Exception):
            self._lose(gpu, why_lost(result))
        elif isinstance(result, Fault) and (result.told or not gpu.loaded):
            self._refuse(gpu, result)
        elif isinstance(result, Fault):
            self._lose(gpu, result.what)
        elif isinstance(result, Outcome):
            self._finish(gpu, result)
        else:
            gpu.loaded = True
            gpu.node.failed_loads = 0

    def _finish(self, gpu: Gpu, outcome: Outcome) -> None:
        task = self._task_of(gpu)
        assert task is not None
        if outcome.encoder.why and not gpu.node.outcome.encoder.why:
            say(f"node {gpu.node.name} runs diffusers' encoder, which takes three times as long: {outcome.encoder.why}")
        gpu.node.outcome.add(outcome)
        gpu.node.clips += outcome.samples - (gpu.status.settled if gpu.status else 0)
        gpu.shard = None
        gpu.node.lost.clear()
        task.held = False
        if outcome.busy:
            task.not_before = time.monotonic() + _BUSY_S
            task.busy_since = task.busy_since or time.monotonic()
            return
        self._job.outcome.add(outcome)
        self._done(task)

    def _done(self, task: _Task) -> None:
        self._tasks.remove(task)
        self._settled += len(task.shard.samples)

    def _lose(self, gpu: Gpu, why: str) -> None:
        """An actor has died, hangs, or has failed on what may be a clip: its shard is for another one."""
        task = self._task_of(gpu)
        clip = gpu.status.clip if gpu.careful and gpu.status else ""
        self._fleet.part_with(gpu, why)
        if task is None:
            say(f"node {gpu.node.name} lost an actor that had no shard: {why}")
            return
        say(f"node {gpu.node.name} lost {task.label}, which another one goes on with: {why}")
        task.held, task.careful, task.busy_since = False, True, None
        task.failed_on.add(gpu.node.id)
        self._look_after(gpu.node, task, why)
        if clip:
            self._suspect(task, clip, gpu.node, why)
        elif self._fleet.still_alive(gpu.node):
            task.lost += 1
            if task.lost >= TRIES:
                raise RunError(
                    f"{task.label} was lost {TRIES} times while no clip was at hand: {why}",
                    where=f"node {gpu.node.name}",
                    fix=f"look at {LOGS}; what is committed is kept",
                )

    def _look_after(self, node: Node, task: _Task, why: str) -> None:
        """A node that loses one shard after the other gets no more, where there are others."""
        node.lost.add(task.label)
        if len(node.lost) >= _SICK and any(other is not node for other in self._fleet.usable):
            node.fault = Fault(
                f"it lost {len(node.lost)} shards and finished none between: {why}", None, None, told=True
            )
            say(f"node {node.name} gets no more shards: {node.fault.what}")

    def _suspect(self, task: _Task, clip: str, node: Node, why: str) -> None:
        """Set a clip aside that was at hand too often."""
        task.suspects[clip] += 1
        if task.suspects[clip] >= TRIES - 1:  # the first loss had no suspect
            task.set_aside[clip] = (
                f"the process that encoded it was lost {TRIES} times, the last time on node {node.name}: {why}"
            )
            say(f"{task.source(clip)} is set aside, after {TRIES} tries; the rest of {task.label} goes on")

    def _refuse(self, gpu: Gpu, fault: Fault) -> None:
        """A node cannot do the work, for no clip's fault: it gets no more shards."""
        task = self._task_of(gpu)
        gpu.node.fault = fault
        self._fleet.part_with(gpu, fault.what)
        say(f"node {gpu.node.name} gets no more shards: {fault.what}" + (f" ({fault.where})" if fault.where else ""))
        if task is not None:
            task.held = False
            task.failed_on.add(gpu.node.id)
            task.refused.append(gpu.node.name)
            if len(task.refused) >= _REFUSED:
                raise self._error(fault, ", ".join(task.refused))

    def _give_up_if_hopeless(self) -> None:
        there = [node for node in self._fleet.nodes.values() if node.alive]
        faults = [(node, node.fault) for node in there if node.fault is not None]
        if faults and len(faults) == len(there):
            node, fault = faults[-1]
            raise self._error(fault, node.name)

    def _error(self, fault: Fault, nodes: str) -> RunError:
        where = f"node {nodes}" + (f": {fault.where}" if fault.where else "")
        return RunError(fault.what, where=where, fix=fault.fix or f"look at {LOGS}; what is committed is kept")

    # Who does not get on.

    def _part_with_stalled(self) -> None:
        now = time.monotonic()
        # A clip whose decoder hangs is given up by the actor itself, after two tries.
        slowest = max(self._settings.node_timeout, 3 * self._settings.clip_timeout)
        for gpu in list(self._fleet.gpus):
            if gpu.shard is None:
                continue
            silent = now - gpu.answered
            if silent > self._settings.node_timeout:
                self._lose(gpu, f"no sign of life for {in_words(silent)}")
            elif gpu.status and gpu.status.idle_s > slowest:
                self._lose(gpu, f"it got no further for {in_words(gpu.status.idle_s)}")

    def _leave_to_others(self) -> None:
        """Shards that other processes write are left to them, when nothing else is to do and time is up."""
        now = time.monotonic()
        patience = max(self._settings.node_timeout, _LEFT_S)
        if all(task.busy_since is not None for task in self._tasks):
            for task in list(self._tasks):
                assert task.busy_since is not None
                if not task.held and now - task.busy_since > patience:
                    self._job.outcome.busy.append((task.shard.split, task.shard.number))
                    self._done(task)

    # What is to be seen of it.

    def _show(self, bar: Stage) -> None:
        under_way = sum(gpu.status.settled for gpu in self._fleet.gpus if gpu.shard is not None and gpu.status)
        nodes = standing(self._fleet.usable, self._fleet.gpus)
        bar.advance(*nodes, by=max(0, self._settled + under_way - bar.done))
        if nodes and time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            say("; ".join(nodes))


def standing(nodes: Sequence[Node], fleet: Sequence[Gpu]) -> list[str]:
    """A line about each node: clips a minute, and what it waits for; the slowest first."""
    lines = []
    for node in sorted(nodes, key=lambda node: node.per_minute):
        gpus = [gpu for gpu in fleet if gpu.node is node]
        at_work = [gpu for gpu in gpus if gpu.shard is not None]
        silent = max((time.monotonic() - gpu.answered for gpu in at_work), default=0.0)
        if silent > 10:
            what = f"no sign of life for {in_words(silent)}"
        elif at_work:
            what = Counter(gpu.status.waits_for if gpu.status else "beginning" for gpu in at_work).most_common(1)[0][0]
        elif any(not gpu.loaded for gpu in gpus):
            what = "loading the models"
        else:
            what = "nothing to do"
        lines.append(f"{node.name}: {node.per_minute:.1f} clips/min, {what}")
    return lines
