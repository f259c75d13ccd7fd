"""`cogprep encode --engine ray` on a real cluster of several nodes on this machine, each with one logical GPU.

Nodes and processes are killed and stopped in the middle of their work. Whatever happens, the folder's bytes are those
of a local run, and nothing that is whole is encoded twice.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cogprep.encode.part import encode_slice
from cogprep.encode.report import Report
from cogprep.engines.actor import EncodeActor
from cogprep.engines.ray_engine import ray_engine
from cogprep.plan.plan import PlannedSample
from cogprep.settings import EncodeSettings
from cogprep.store.extents import whole_extents

ray = pytest.importorskip("ray")


class ACluster:
    """A head and nodes of one logical GPU each; every node is a process of its own, with its workers below it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.nodes: list = []
        self._named = 0

    def add(self) -> None:
        self._named += 1
        name = f"node-{self._named}"
        self.nodes.append(self._cluster.add_node(num_cpus=1, num_gpus=1, node_name=name, object_store_memory=80 << 20))

    def grow(self, count: int) -> None:
        """At least so many nodes."""
        while len(self.nodes) < count:
            self.add()

    def kill_node_of(self, pid: int) -> None:
        """Kill the node that a process belongs to, at once."""
        parent = parent_of(pid)
        node = next(node for node in self.nodes if node.all_processes["raylet"][0].process.pid == parent)
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        self._cluster.shutdown()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[ACluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes cannot import a test
        handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place
        cluster = ACluster()
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.end()
            signal.signal(signal.SIGTERM, handler)


def actor(log: Path, seconds: float = 0.0, poison: str = "", how: str = "die") -> type[EncodeActor]:
    """An actor that notes each clip that it begins in a log, takes its time, and dies of a poisonous one, or hangs."""

    class Noting(EncodeActor):
        def at_hand(self, planned: PlannedSample) -> None:
            super().at_hand(planned)
            with log.open("a") as file:
                file.write(f"{time.time()} {os.getpid()} {planned.key}\n")
            time.sleep(seconds)

        def encode(self, shard, set_aside, careful):
            from cogprep.vae.encoder import LatentEncoder

            keys = {planned.key for planned in shard.samples if planned.sample.source == poison}
            start = LatentEncoder.start

            def start_or_die(encoder, key, *rest):
                if key in keys and how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if key in keys:
                    time.sleep(600)
                return start(encoder, key, *rest)

            LatentEncoder.start = start_or_die
            try:
                return super().encode(shard, set_aside, careful)
            finally:
                LatentEncoder.start = start

    return Noting


def files_of(out: Path) -> dict[str, str]:
    """Everything that a trainer reads, by content."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("*.tar", "*.parquet", "contract.json", "empty-caption.safetensors")
        for path in sorted(out.rglob(kind))
    }


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*") if path.is_file() and path.name.endswith((".tmp", ".new")))


def begun(log: Path) -> list[tuple[float, int, str]]:
    """Time, process and key of every clip that was begun."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [(float(at), int(pid), key) for at, pid, key in (line.split() for line in lines)]


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


class Run(threading.Thread):
    """An encode on a cluster, in a thread: nodes can be started in the main one only.

    Leaving the ``with`` waits for its end; ``report`` is what came of it.
    """

    def __init__(self, settings: EncodeSettings, actor: type[EncodeActor]) -> None:
        super().__init__()
        self._settings, self._actor = settings, actor
        self._report: Report | Exception = RuntimeError("not at its end")

    def run(self) -> None:
        try:
            with ray_engine(self._settings, self._actor) as engine:
                self._report = encode_slice(self._settings, engine)
        except Exception as error:
            self._report = error

    def __enter__(self) -> Run:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.join()

    @property
    def report(self) -> Report:
        if isinstance(self._report, Exception):
            raise self._report
        return self._report

    def middle(self, number: int | None = None) -> int:
        """The process that writes a shard, as soon as the shard's first sample is whole and before it is committed.

        Args:
            number: of the shard; any, by default.
        """
        out = self._settings.out
        pattern = ".*.tar.tmp" if number is None else f".{number:06d}.tar.tmp"
        end = time.monotonic() + 120
        while self.is_alive() and time.monotonic() < end:
            for tar in out.glob(pattern):
                with suppress(OSError):
                    if tar.stat().st_size and (pids := holders(tar)):
                        return pids[0]
            time.sleep(0.02)
        return self.report and pytest.fail("no shard was seen in the middle")


def test_a_node_killed_in_the_middle_and_one_added(cluster, encoded, settings_of, tmp_path):
    cluster.grow(2)
    out, log = encoded / "new", tmp_path / "log"
    with Run(settings_of(encoded, out=out, engine="ray", ray_address=cluster.address), actor(log, 0.4)) as run:
        pid = run.middle()
        cluster.kill_node_of(pid)
        killed_at, whole = time.time(), whole_keys(out)
        cluster.add()
    assert files_of(out) == files_of(encoded / "out")
    assert not leftovers(out)
    assert whole and not [key for at, _, key in begun(log) if key in whole and at > killed_at], "encoded twice"
    report = run.report
    assert report.encoded + report.recovered + report.reused == 5 and not report.unfinished
