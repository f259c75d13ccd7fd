"""`cogprep encode --engine ray` on a real cluster of several nodes on this machine, each with one logical GPU.

Nodes and processes are killed and stopped in the middle of their work. Whatever happens, the folder's bytes are those
of a local run, and nothing that is whole is encoded twice.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from places import CHILDREN, CHILDREN_PATH
from ray_nodes import Nodes, Run, a_refusing_actor, an_actor, begun, raylet_of, whole_keys, writer_of_a_shard

from cogcommon.errors import RunError
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE
from cogprep.commands.encode import encode

pytest.importorskip("ray")
CAMPAIGN = int(os.environ.get("COGTUNE_RAY_RUNS", "10"))  # runs with random kills


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Under a short name, since sockets lie there, too.
    short = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    with pytest.MonkeyPatch.context() as patch, short as folder:
        patch.setenv("RAY_TMPDIR", folder)  # else all clusters write one file, /tmp/ray/..., which may not exist
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it kills workers where other programs fill the memory
        nodes = Nodes()
        try:
            yield nodes
        finally:
            nodes.end()


@pytest.fixture
def settings_on(settings_of, nodes, encoded):
    """Of an encode of the five clips on the nodes, to a new folder."""
    given = {"out": encoded / "new", "engine": "ray", "ray_address": nodes.address}
    return lambda **more: settings_of(encoded, **(given | more))


def files_of(out: Path) -> dict[str, str]:
    """Everything that a trainer reads, by content."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("*.tar", "*.parquet", CONTRACT_FILE, EMPTY_CAPTION_FILE)
        for path in sorted(out.rglob(kind))
    }


def assert_as_a_local_run(encoded: Path) -> None:
    assert files_of(encoded / "new") == files_of(encoded / "out")
    half = [path.name for path in (encoded / "new").rglob("*") if path.name.endswith((".tmp", ".new"))]
    assert not [name for name in half if not name.startswith(".encode.")]  # the mark of a killed one; the next run's


def test_no_module_of_the_users_folder_is_imported(nodes, encoded, settings_on, tmp_path, monkeypatch):
    """As on one machine: a random.py or queue.py there is the user's own."""
    nodes.have(1)
    for name in ("queue", "random"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('no module of ours')")
    monkeypatch.chdir(tmp_path)
    assert encode(settings_on()).encoded == 5 and Path.cwd() == tmp_path
    assert_as_a_local_run(encoded)


def test_a_node_killed_in_the_middle_and_one_added(nodes, encoded, settings_on, tmp_path):
    nodes.have(2)
    log, out = tmp_path / "log", encoded / "new"
    with Run(settings_on(), an_actor(log, 0.4)) as run:
        nodes.kill(nodes.node_of(writer_of_a_shard(out, run.is_alive)))
        whole, killed_at = whole_keys(out), time.time()
        nodes.add()
    assert_as_a_local_run(encoded)
    assert whole and not [key for at, key in begun(log) if key in whole and at > killed_at], "encoded twice"
    report = run.report
    assert report.encoded + report.recovered + report.reused == 5 and not report.unfinished
    assert sum(node.clips for node in report.nodes) >= 5


@pytest.mark.full
@pytest.mark.parametrize("what", ["process", "node"])
def test_what_gives_no_sign_of_life_loses_its_shard(nodes, encoded, settings_on, tmp_path, what):
    """A stopped process is ended. A stopped node keeps its lock, until it lives again or is gone."""
    nodes.have(3)
    log, out = tmp_path / "log", encoded / "new"
    with Run(settings_on(node_timeout=5.0 if what == "process" else 60.0), an_actor(log, 0.4)) as run:
        pid = writer_of_a_shard(out, run.is_alive)
        stopped = [pid] if what == "process" else [raylet_of(nodes.node_of(pid)), pid]
        for one in stopped:
            os.kill(one, signal.SIGSTOP)
        whole, stopped_at = whole_keys(out), time.time()
        if what == "node":
            time.sleep(30)
            for one in stopped:
                os.kill(one, signal.SIGCONT)
    assert_as_a_local_run(encoded)
    assert whole and not [key for at, key in begun(log) if key in whole and at > stopped_at], "encoded twice"
    assert not run.report.unfinished
    assert not psutil.pid_exists(pid) or what == "node"


@pytest.mark.full
@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_poisonous_clip_is_set_aside_by_name_and_its_shard_is_not(nodes, encoded, settings_of, settings_on, how):
    """It takes the process of its VAE along, or keeps it for ever. A local run then finishes the shard."""
    nodes.have(3)
    log, out = encoded / "log", encoded / "new"
    settings = settings_on(shard_samples=5, clip_timeout=4.0, node_timeout=12.0)
    with Run(settings, an_actor(log, 0.0, "2.mp4", how)) as run:
        pass
    (aside,) = run.report.postponed_samples
    assert aside.source == "2.mp4" and "lost 3 times" in aside.reason
    assert run.report.encoded + run.report.recovered == 4 and not run.report.rejected
    times = {key: [key for _, key in begun(log)].count(key) for _, key in begun(log)}
    assert sorted(times.values())[-2:] == [3, 3] or max(times.values()) == 3  # once for each loss
    assert encode(settings_of(encoded, out=out, shard_samples=5)).encoded == 1
    encode(settings_of(encoded, out=encoded / "one", shard_samples=5))
    assert files_of(out) == files_of(encoded / "one")


@pytest.mark.full
def test_a_node_that_cannot_work_gets_no_shards(nodes, encoded, settings_on, tmp_path, capsys):
    nodes.have(3)
    with Run(settings_on(), a_refusing_actor(tmp_path, 1)) as run:
        pass
    assert_as_a_local_run(encoded)
    assert "gets no more shards: the GPU has fallen off the bus (nvidia-smi)" in " ".join(
        capsys.readouterr().err.split()
    )
    assert len(run.report.nodes) < 3


@pytest.mark.full
def test_where_no_node_can_work_the_run_says_why(nodes, settings_on, tmp_path):
    nodes.have(1)
    with Run(settings_on(), a_refusing_actor(tmp_path, 9)) as run:
        pass
    with pytest.raises(RunError, match="fallen off the bus") as caught:
        _ = run.report
    assert caught.value.fix == "restart the host"
    assert caught.value.where is not None and "nvidia-smi" in caught.value.where


class ADriver:
    """A driver in a process of its own, which can be lost, and started again."""

    def __init__(self, nodes: Nodes, folder: Path, log: Path, seconds: float) -> None:
        path = os.pathsep.join([CHILDREN_PATH, str(CHILDREN)])
        given = [str(folder), str(folder / "new"), nodes.address, str(log), str(seconds)]
        self.process = subprocess.Popen(
            [sys.executable, str(CHILDREN / "ray_driver.py"), *given],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def finish(self) -> None:
        said, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, said


@pytest.mark.full
def test_a_driver_that_is_lost_is_started_again(nodes, encoded, tmp_path):
    nodes.have(3)
    log, out = tmp_path / "log", encoded / "new"
    first = ADriver(nodes, encoded, log, 0.4)
    writer = writer_of_a_shard(out, first.is_alive)
    first.kill()
    psutil.wait_procs([psutil.Process(writer)] if psutil.pid_exists(writer) else [], timeout=30)
    whole, killed_at = whole_keys(out), time.time()
    ADriver(nodes, encoded, log, 0.0).finish()
    assert_as_a_local_run(encoded)
    assert whole and not [key for at, key in begun(log) if key in whole and at > killed_at], "encoded twice"


@pytest.mark.full
@pytest.mark.parametrize("seed", range(CAMPAIGN))
def test_random_kills(nodes, encoded, tmp_path, seed):
    """Two strikes a run, at a node, a process, or the driver, at random moments from the first clip on."""
    chance = random.Random(seed)
    nodes.have(3)
    log, out = tmp_path / "log", encoded / "new"
    driver = ADriver(nodes, encoded, log, 0.4)
    struck = []
    for _ in range(2):
        with suppress(AssertionError):  # it was done before
            pid = writer_of_a_shard(out, driver.is_alive)
            time.sleep(chance.uniform(0, 0.4))
            what = chance.choice(["node", "process", "stop", "driver"])
            with suppress(psutil.NoSuchProcess, StopIteration):
                if what == "node":
                    nodes.kill(nodes.node_of(pid))
                    nodes.add()
                elif what == "driver":
                    driver.kill()
                    driver = ADriver(nodes, encoded, log, 0.4)
                else:
                    psutil.Process(pid).send_signal(signal.SIGSTOP if what == "stop" else signal.SIGKILL)
                struck.append((what, whole_keys(out), time.time()))
    driver.finish()
    assert struck
    print(f"random kills, {seed}:", *(what for what, _, _ in struck))
    assert_as_a_local_run(encoded)
    for what, whole, at in struck:
        again = [key for begun_at, key in begun(log) if key in whole and begun_at > at + 0.5]
        assert not again, f"{what}: encoded twice"
