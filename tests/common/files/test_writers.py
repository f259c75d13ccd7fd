"""Many writers, and file systems that lack hard links or locks: real processes, told apart by locks alone."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogcommon.files import atomic, locks
from cogcommon.files.atomic import TEMPORARY, commit_bytes, fsync_folder, temporary_beside
from cogcommon.files.locks import Busy, NoLocks, locked_elsewhere, open_locked, remove_unless_held

# Put before a child's own lines: what a file system without them answers, by the same numbers as the system.
LACKS = {
    "nothing": "",
    "hard links": "def _no(*a, **k): raise OSError(errno.EPERM, os.strerror(errno.EPERM))\nos.link = _no\n",
    "locks": "def _nl(*a, **k): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\nfcntl.flock = _nl\n",
}
LACKS["both"] = LACKS["hard links"] + LACKS["locks"]
# As in containers of one host name, each with its own process 1.
CONTAINER = "os.getpid = lambda: 1\nsocket.gethostname = lambda: 'localhost'\n"


def start(lines: str, *arguments: object, lacks: str = "nothing") -> subprocess.Popen:
    head = "import errno, fcntl, os, socket, sys\nfrom pathlib import Path\n" + LACKS[lacks] + CONTAINER
    tail = "from cogcommon.files.atomic import commit_bytes\nfrom cogcommon.files.locks import NoLocks\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + tail + lines, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("lacks", ["nothing", "hard links", "locks"])
def test_four_containers_that_are_each_process_1_write_one_file(tmp_path, lacks):
    commits = 150 if lacks == "nothing" else 30
    lines = (
        f"for _ in range({commits}):\n"
        "    commit_bytes(Path(sys.argv[1]), sys.argv[2].encode() * 1000)\n"
        "    assert len(Path(sys.argv[1]).read_bytes()) == 1000\n"
    )
    writers = [start(lines, tmp_path / "report.json", letter, lacks=lacks) for letter in "abcd"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("lacks", ["nothing", "hard links"])
def test_of_several_exclusive_writers_one_wins(tmp_path, lacks):
    lines = (
        "wins = [commit_bytes(Path(sys.argv[1]) / str(n), sys.argv[2].encode(), exclusive=True) for n in range(40)]\n"
        "print(sum(wins))\n"
    )
    writers = [start(lines, tmp_path, letter, lacks=lacks) for letter in "abcd"]
    assert sum(int(writer.communicate(timeout=120)[0]) for writer in writers) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(40)))


def test_without_hard_links_and_without_locks_it_is_refused_by_name(tmp_path):
    lines = (
        "try:\n    commit_bytes(Path(sys.argv[1]), b'x', exclusive=True)\nexcept NoLocks as error:\n    print(error)\n"
    )
    said, _ = start(lines, tmp_path / "contract.json", lacks="both").communicate(timeout=60)
    assert "keeps no locks" in said and str(tmp_path) in said and "Lustre" in said
    assert list(tmp_path.iterdir()) == []


def test_a_lock_goes_with_its_process_and_tells_whether_it_lives(tmp_path):
    path = tmp_path / ".000001.tar.tmp"
    lines = (
        "from cogcommon.files.locks import open_locked\nheld = open_locked(Path(sys.argv[1]))\n"
        "print(1, flush=True)\ninput()"
    )
    head = f"import sys\nfrom pathlib import Path\n{lines}"
    holder = subprocess.Popen(
        [sys.executable, "-c", head, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    holder.stdout.readline()
    assert locked_elsewhere(path)
    with pytest.raises(Busy):
        open_locked(path)
    holder.kill()
    holder.communicate()
    assert not locked_elsewhere(path)
    open_locked(path).close()


def test_nfs_takes_locks_on_writable_descriptors_only(tmp_path, monkeypatch):
    """There flock is a lock of bytes, which wants the file open for writing."""
    real = fcntl.flock

    def flock(file, operation) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "a"
    with open_locked(path):
        assert locked_elsewhere(path)
    assert not locked_elsewhere(path)
    commit_bytes(path, b"x")
    assert path.read_bytes() == b"x"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", _refuse(number))
    with pytest.raises(NoLocks, match="keeps no locks") as caught:
        open_locked(tmp_path / "a")
    assert caught.value.where == str(tmp_path) and "another file system" in caught.value.fix


def test_a_folder_that_knows_no_fsync_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _refuse(errno.EINVAL))
    fsync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", _refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        fsync_folder(tmp_path)


def _refuse(number: int) -> Callable:
    def refuse(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_lock_is_never_taken_through_a_link(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic links"):
        open_locked(tmp_path / "link")
    assert locked_elsewhere(tmp_path / "link")  # nobody can tell: it is left alone


def test_temporary_names_are_known_and_never_the_same(monkeypatch):
    path = Path("folder/contract.json")
    for host in ("node-7.cluster.example", "höst", "", "x" * 300):
        monkeypatch.setattr(atomic.socket, "gethostname", lambda host=host: host)
        names = {temporary_beside(path).name for _ in range(100)}
        assert len(names) == 100 and all(map(TEMPORARY.fullmatch, names))
    for name in (
        ".x.12345678901234567890.tmp",
        ".mine.tmp",
        "a.host-0123456789abcdef.tmp",
        ".x.a-0123456789abcdeg.tmp",
    ):
        assert not TEMPORARY.fullmatch(name)


def test_a_file_that_is_removed_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    """Whoever tidies up sees a file that nobody holds yet; its maker must not end with the lock of a lost one."""
    path, lock, seen = tmp_path / "mark", locks.lock, []

    def removed_first(stream, at) -> None:
        monkeypatch.setattr(locks, "lock", lock)
        seen.append(remove_unless_held(path))
        lock(stream, at)

    monkeypatch.setattr(locks, "lock", removed_first)
    with open_locked(path):
        assert seen == [True] and locked_elsewhere(path)
        assert not remove_unless_held(path) and path.exists()
    assert remove_unless_held(path) and not path.exists()
