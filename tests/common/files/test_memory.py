"""Free host memory where control groups have a say: their files given, and a real group where there may be one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cogcommon.files.memory import free_host_memory, host_memory_left

GIB = 2**30
HOST = 512 * GIB


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(v2="/a/b", root="/") -> folder under which groups lie; free_host_memory(tmp_path / "proc") sees them."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=HOST))
    proc = tmp_path / "proc"
    proc.mkdir()

    def make(*, v1=None, v2=None, root="/", name="sys fs"):
        mounts, groups = ["23 1 0:5 / / rw - ext4 /dev/a rw"], ["1:name=systemd:/x", "7:cpu,cpuacct:/y"]
        top = tmp_path / name
        top.mkdir(parents=True)
        at = str(top).replace(" ", "\\040")
        if v1 is not None:
            groups.append(f"4:memory:{v1}")
            mounts.append(f"30 23 0:28 / {at}/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct")
            mounts.append(f"31 23 0:29 {root} {at} rw,relatime shared:10 master:1 - cgroup cgroup rw,memory")
        if v2 is not None:
            groups.append(f"0::{v2}")
            mounts.append(f"35 23 0:30 {root} {at} rw,relatime - cgroup2 cgroup2 rw,nsdelegate")
        (proc / "cgroup").write_text("\n".join(groups) + "\n")
        (proc / "mountinfo").write_text("\n".join(mounts) + "\n")
        return top

    return make


def v2(folder, limit, used, cache=0, high="max"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    stat = f"anon {used - cache}\nfile {cache}\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n"
    (folder / "memory.stat").write_text(stat + "slab_reclaimable 0\n")


def v1(folder, limit, used, cache=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"cache 1\ninactive_file 7\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache - cache // 2}\n"
    (folder / "memory.stat").write_text(stat)


def test_without_a_limit_the_system_says_what_is_free(machine, tmp_path):
    top = machine(v2="/user/session")
    v2(top / "user" / "session", "max", 3 * GIB)
    v2(top / "user", "max", 9 * GIB)
    assert free_host_memory(tmp_path / "proc") == HOST
    assert host_memory_left(tmp_path / "proc").where == "the memory of this machine"
    assert free_host_memory(tmp_path / "no proc here") == HOST


def test_a_limit_less_what_is_used_and_file_cache_is_not(machine, tmp_path):
    top = machine(v2="/pod/box")
    v2(top / "pod", "max", 200 * GIB)
    v2(top / "pod" / "box", 64 * GIB, 20 * GIB, cache=12 * GIB)
    left = host_memory_left(tmp_path / "proc")
    assert left.bytes == free_host_memory(tmp_path / "proc") == (64 - 20 + 12) * GIB
    assert left.where == f"the memory limit of this container or job: {top}/pod/box"


def test_the_tightest_of_nested_limits_holds_with_what_all_below_it_use(machine, tmp_path):
    top = machine(v2="/pod/box/run")
    v2(top / "pod" / "box" / "run", 60 * GIB, 1 * GIB)
    v2(top / "pod" / "box", "max", 2 * GIB)
    v2(top / "pod", 64 * GIB, 50 * GIB)  # others in the pod have the most of it
    assert free_host_memory(tmp_path / "proc") == 14 * GIB


def test_above_memory_high_a_process_hardly_runs(machine, tmp_path):
    v2(machine(v2="/box") / "box", 64 * GIB, 2 * GIB, high=32 * GIB)
    assert free_host_memory(tmp_path / "proc") == 30 * GIB


def test_more_in_use_than_the_limit_leaves_nothing(machine, tmp_path):
    v2(machine(v2="/box") / "box", 4 * GIB, 5 * GIB)
    assert free_host_memory(tmp_path / "proc") == 0


@pytest.mark.parametrize("shown", ["/", "/../../elsewhere"], ids=["a namespace of its own", "a path of the host"])
def test_a_container_sees_its_own_group_as_the_root(machine, tmp_path, shown):
    v2(machine(v2=shown), 32 * GIB, 2 * GIB)
    assert free_host_memory(tmp_path / "proc") == 30 * GIB


def test_version_1_and_its_nested_limits(machine, tmp_path):
    top = machine(v1="/kubepods/pod1/box", v2="/")  # a hybrid: version 2 is there, without its memory files
    v1(top / "kubepods" / "pod1" / "box", 9223372036854771712, 3 * GIB)
    v1(top / "kubepods" / "pod1", 48 * GIB, 40 * GIB, cache=8 * GIB)
    v1(top / "kubepods", 9223372036854771712, 300 * GIB)
    assert free_host_memory(tmp_path / "proc") == 16 * GIB


def test_version_1_in_a_container_without_a_namespace(machine, tmp_path):
    """What docker does there: the path is the host's, and the mount shows that group as its root."""
    v1(machine(v1="/docker/4f5e", root="/docker/4f5e"), 16 * GIB, 1 * GIB)
    assert free_host_memory(tmp_path / "proc") == 15 * GIB


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def real_group():
    """A memory group of 1 GiB, its own child in one of 1 GiB more; where this user may make one."""
    outer = GROUPS / f"cogtune-test-{os.getpid()}"
    try:
        outer.mkdir()
        (outer / "run").mkdir()
        (outer / "memory.limit_in_bytes").write_text(str(GIB))
        (outer / "run" / "memory.limit_in_bytes").write_text(str(2 * GIB))
    except OSError as error:
        pytest.skip(f"no memory group can be made here: {error.strerror}")
    yield outer / "run"
    (outer / "run").rmdir()
    outer.rmdir()


def test_a_real_group_is_seen_from_inside(real_group):
    script = (
        f"import os; open({str(real_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from cogcommon.files.memory import free_host_memory, host_memory_left\n"
        "before = free_host_memory(); held = bytearray(os.urandom(1 << 20)) * 256; print(before, free_host_memory())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert 0.93 * GIB < before <= GIB < free_host_memory()
    assert before - after == pytest.approx(GIB / 4, rel=0.05)


@pytest.mark.full  # two imports of torch
def test_what_threads_have_freed_is_given_back():
    """Pieces as a loader's, of some megabytes, made in threads: the C library would keep them in each."""
    script = (
        "import sys, threading, torch\n"
        "from cogcommon.files.memory import give_back_what_is_freed, held_here\n"
        "if sys.argv[1] == 'give back': give_back_what_is_freed()\n"
        "before, kept = held_here(), []\n"
        "def work():\n"
        "    for _ in range(4):\n"
        "        pieces = [torch.zeros(1 << 20) for _ in range(8)]\n"
        "        kept.append(torch.zeros(1000)); del pieces\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "print(held_here() - before)\n"
    )
    kept = [
        int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("give back", "as it is")
    ]
    print(f"held after 4 threads have made and freed 32 MiB each: {kept[0] >> 20} MiB, and else {kept[1] >> 20}")
    assert kept[0] < 8 << 20, kept
