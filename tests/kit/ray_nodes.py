"""A real Ray cluster on this machine, encodes on it, and ways to disturb them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cogprep.encode.part import encode_slice
from cogprep.encode.report import Report
from cogprep.engines.actor import EncodeActor, Fault
from cogprep.engines.ray_engine import ray_engine
from cogprep.plan.plan import PlannedSample
from cogprep.settings.encode import EncodeSettings
from cogprep.store.extents import whole_extents


class Nodes:
    """A head, and nodes of one logical GPU each. A node is a process of its own, with its workers below it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self._nodes: list[Any] = []
        self._named = 0

    def add(self) -> None:
        """One more. Only the main thread can."""
        self._named += 1
        given = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20, "node_name": f"node-{self._named}"}
        self._nodes.append(self._cluster.add_node(**given))

    def have(self, count: int) -> None:
        """At least so many."""
        while len(self._nodes) < count:
            self.add()

    def node_of(self, pid: int) -> Any:
        """The node that a worker's process belongs to."""
        parents = {parent.pid for parent in psutil.Process(pid).parents()}
        return next(node for node in self._nodes if raylet_of(node) in parents)

    def kill(self, node: Any) -> None:
        """End a node and all that runs on it, at once."""
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()
        signal.signal(signal.SIGTERM, self._handler)


def raylet_of(node: Any) -> int:
    """The process that a node is."""
    return int(node.all_processes["raylet"][0].process.pid)


def an_actor(log: Path, seconds: float = 0.0, poison: str = "", how: str = "") -> type[EncodeActor]:
    """An actor that notes each clip that it begins, and takes its time.

    Args:
        log: gets a line for each clip that is begun: time, process, key.
        seconds: to wait before the VAE gets a clip.
        poison: the source of a clip that the VAE cannot bear.
        how: its process is killed ("die"), or nothing comes of it ("hang").
    """

    class Noting(EncodeActor):
        def at_hand(self, planned: PlannedSample) -> None:
            super().at_hand(planned)
            with log.open("a") as file:
                file.write(f"{time.time()} {os.getpid()} {planned.key}\n")

        def encode(self, shard: Any, set_aside: Any, careful: bool) -> Any:
            from cogprep.vae.encoder import LatentEncoder

            poisonous = {planned.key for planned in shard.samples if planned.sample.source == poison}
            start = LatentEncoder.start

            def try_to_start(encoder: Any, key: str, *rest: Any) -> Any:
                if key in poisonous and how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if key in poisonous:
                    time.sleep(600)
                time.sleep(seconds)
                return start(encoder, key, *rest)

            LatentEncoder.start = try_to_start  # type: ignore[method-assign]
            try:
                return super().encode(shard, set_aside, careful)
            finally:
                LatentEncoder.start = start  # type: ignore[method-assign]

    return Noting


def a_refusing_actor(refusals: Path, most: int) -> type[EncodeActor]:
    """An actor that cannot load its models; only the first ``most`` are so.

    Args:
        refusals: a folder, which gets a file for each.
    """

    class Refusing(EncodeActor):
        def load(self) -> Fault | None:
            for number in range(most):
                with suppress(FileExistsError):
                    (refusals / str(number)).touch(exist_ok=False)
                    return Fault("the GPU has fallen off the bus", "nvidia-smi", "restart the host", told=True)
            return super().load()

    return Refusing


def encode_on_nodes(settings: EncodeSettings, actor: type[EncodeActor]) -> Report:
    """What the command does, with another actor."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes cannot import what tests use
    with ray_engine(settings, actor) as engine:
        return encode_slice(settings, engine)


class Run(threading.Thread):
    """`encode_on_nodes` in a thread, since only the main one can add nodes. Leaving the ``with`` waits for its end."""

    def __init__(self, settings: EncodeSettings, actor: type[EncodeActor]) -> None:
        super().__init__()
        self._settings, self._actor = settings, actor
        self._report: Report | Exception = RuntimeError("not at its end")

    def run(self) -> None:
        try:
            self._report = encode_on_nodes(self._settings, self._actor)
        except Exception as error:
            self._report = error

    def __enter__(self) -> Run:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.join()

    @property
    def report(self) -> Report:
        """What came of it."""
        if isinstance(self._report, Exception):
            raise self._report
        return self._report


def writer_of_a_shard(out: Path, alive: Callable[[], bool]) -> int:
    """The process that writes a shard, as soon as the shard has a whole sample, and before it is committed.

    Args:
        alive: whether the encode runs; if it ends first, that is an error.
    """
    while alive():
        for tar in out.glob(".*.tar.tmp"):
            with suppress(OSError):
                if tar.stat().st_size and (pids := holders(tar)):
                    return pids[0]
        time.sleep(0.02)
    raise AssertionError("no shard was seen in the middle")


def holders(path: Path) -> list[int]:
    """Processes that have a file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.readlink() == path:
                found.append(int(link.parts[2]))
    return found


def whole_keys(out: Path) -> set[str]:
    """Samples that are whole in a tar, committed or not."""
    found = set()
    for tar in [*out.glob("*.tar"), *out.glob(".*.tar.tmp")]:
        with suppress(FileNotFoundError), tar.open("rb") as stream:
            found |= {extent.info["key"] for extent in whole_extents(stream)}
    return found


def begun(log: Path) -> Iterator[tuple[float, str]]:
    """Time and key of every clip that was begun."""
    for line in log.read_text().splitlines() if log.exists() else []:
        at, _pid, key = line.split()
        yield float(at), key
