"""What the file system refuses, told by its number, whoever the error went through."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from cogcommon.errors import CogError, DiskError, ShardError
from cogcommon.files import failures
from cogcommon.files.failures import check_writable, disk_errors, machines_fault, number_of, room_of
from cogcommon.media.video import write_mp4

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


def told(number, **named):
    with pytest.raises(DiskError) as caught, disk_errors(Path("runs/a"), **named):
        raise OSError(number, os.strerror(number), "runs/a/file")
    return caught.value


@pytest.mark.parametrize(
    ("number", "what", "do"),
    [
        (errno.ENOSPC, "disk is full", "make room"),
        (errno.EDQUOT, "quota", "quota"),
        (errno.EFBIG, "larger than files may be", "ulimit -f"),
        (errno.EROFS, "read-only", "mount it for writing"),
        (errno.EACCES, "no permission", "ls -ld"),
        (errno.EPERM, "does not allow it", "lsattr"),
        (errno.ENOENT, "has gone", "nothing else moves or removes"),
        (errno.ENAMETOOLONG, "name is longer", "shorter path"),
        (errno.ELOOP, "links in a circle", "the folder itself"),
        (errno.EMFILE, "this process may not open more files", "ulimit -n"),
        (errno.ENFILE, "the machine may not open more files", "fs.file-max"),
        (errno.EIO, "could not read or write", "dmesg"),
        (errno.ESTALE, "network drive has lost", "mount the drive again"),
        (errno.ENOTCONN, "not connected", "mount the drive again"),
        (errno.ENOTDIR, "is a file, not a folder", "name another folder"),
    ],
)
def test_each_number_has_words_of_its_own(number, what, do):
    error = told(number, go_on="run it again")
    assert what in error.what and do in error.fix and error.fix.endswith("then run it again")
    assert error.where == "runs/a/file" and error.errno == number


def test_a_number_that_is_not_in_the_table_is_told_in_the_systems_words():
    assert os.strerror(errno.EDOM) in told(errno.EDOM).what


def test_a_full_disk_says_how_much_is_needed_and_how_much_is_free(tmp_path, monkeypatch):
    disk = os.statvfs(tmp_path)

    def as_full_as_before(path):
        Path(path).stat()
        return disk

    monkeypatch.setattr(os, "statvfs", as_full_as_before)
    assert room_of(tmp_path) == disk.f_bavail * disk.f_frsize
    with pytest.raises(DiskError) as caught, disk_errors(tmp_path / "not" / "there", needs=67_000_000_000):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "67 GB are to be written" in caught.value.what and "are free" in caught.value.what
    assert "of room" in caught.value.fix


def write_with_safetensors(file):
    safetensors.torch.save_file({"a": torch.ones(100_000)}, file)


def write_with_torch(file):
    torch.save({"a": torch.ones(100_000)}, file)


def write_with_torch_to_a_stream(file):
    with file.open("wb") as stream:
        torch.save({"a": torch.ones(100_000)}, stream)


def write_with_pyarrow(file):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": np.random.default_rng(0).random(100_000)}), file)


def write_with_av(file):
    write_mp4(file, np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), np.uint8), 8)


def write_with_pillow(file):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)).save(file, "PNG")


@pytest.fixture
def no_file_larger_than_8_kib():
    """The system itself refuses larger ones, with EFBIG: as a full disk does, but without a mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        write_with_safetensors,
        write_with_torch_to_a_stream,
        write_with_pyarrow,
        write_with_av,
        write_with_pillow,
    ],
)
def test_every_librarys_word_for_what_the_system_refused_is_understood(write, tmp_path, no_file_larger_than_8_kib):
    with pytest.raises(DiskError, match="larger than files may be") as caught, disk_errors(tmp_path / "a.mp4"):
        write(tmp_path / "a.mp4")
    assert caught.value.errno == errno.EFBIG


def test_torchs_own_writer_keeps_no_number_so_the_disk_is_asked(tmp_path, monkeypatch, no_file_larger_than_8_kib):
    for free, number in ((10**9, errno.EIO), (0, errno.ENOSPC)):
        monkeypatch.setattr(failures, "room_of", lambda path, free=free: free)
        with pytest.raises(DiskError) as caught, disk_errors(tmp_path / "a.pt"):
            write_with_torch(tmp_path / "a.pt")
        assert caught.value.errno == number


def test_what_is_no_fault_of_the_disk_passes_unchanged(tmp_path):
    for error in (ValueError("no"), RuntimeError("CUDA error"), BrokenPipeError(errno.EPIPE, "x"), ShardError("mine")):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
            raise error
        assert caught.value is error


def test_a_slip_while_an_error_of_the_disk_is_handled_is_not_the_disks(tmp_path):
    with pytest.raises(KeyError), disk_errors(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            {}["ours"]


def test_a_folder_that_may_not_be_written_is_refused_before_there_is_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(DiskError, match="no permission") as caught:
        check_writable(tmp_path / "new" / "folder")
    assert caught.value.where == str(tmp_path / "new" / "folder")


@pytest.mark.parametrize("below", ["", "x/y"])
def test_a_file_where_a_folder_is_to_be_is_told_as_one(tmp_path, below):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DiskError, match="this is a file, not a folder") as early:
        check_writable(file / below)
    with pytest.raises(DiskError, match="this is a file, not a folder") as late, disk_errors(file / below):
        (file / below).mkdir(parents=True, exist_ok=True)
    assert early.value.where == late.value.where == str(file)


def test_a_link_that_points_nowhere_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DiskError, match="something of that name already"):
        check_writable(tmp_path / "link")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc on this system")
def test_where_the_kernel_shows_itself_no_folder_has_gone(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: True)  # as for root
    with pytest.raises(DiskError, match="the system lets nobody make"):
        check_writable(Path("/proc/x/y"))
    with pytest.raises(DiskError, match="the system lets nobody make"), disk_errors(Path("/proc/x/y")):
        Path("/proc/x/y").mkdir(parents=True, exist_ok=True)


def test_only_what_must_be_the_machines_is_caught_at_the_end():
    assert isinstance(machines_fault(OSError(errno.EMFILE, "x")), CogError)
    assert machines_fault(FileNotFoundError(errno.ENOENT, "x", "lost")) is None
    assert machines_fault(ZeroDivisionError()) is None
    assert number_of(ConnectionResetError(errno.ECONNRESET, "x"), Path()) is None


@needs_full
@pytest.mark.parametrize("program", ["cogprep", "cogtrain"])
def test_output_that_goes_to_a_full_disk_is_one_message(program):
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", program, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr and "ignored" not in done.stderr


@needs_full
def test_where_nothing_can_be_said_the_exit_code_says_it():
    """As with a log of both streams on the disk that is full."""
    with FULL.open("w") as full:
        words = [sys.executable, "-m", "cogprep", "inspect", "nowhere"]
        assert subprocess.run(words, stdout=full, stderr=full, timeout=120).returncode == 2


def test_no_folder_for_temporary_files_is_one_message(full_disk, tmp_path):
    """What torch says where the disk of /tmp and of the working folder is full, while it is loaded."""
    code = "import tempfile\nfrom cogcommon.cli.command import run_app\nrun_app(tempfile.gettempdir)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=full_disk("/*"), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "error: no folder takes temporary files" in done.stderr and "'/tmp'" in done.stderr
    assert "export TMPDIR=FOLDER" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(DiskError, match="no folder takes temporary files"), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, f"No usable temporary directory found in {['/tmp', str(tmp_path)]}")


def test_too_few_open_files_is_one_message(tmp_path):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds/videos.txt").write_text("a.mp4\n")
    (tmp_path / "ds/prompts.txt").write_text("a\n")
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 24 && exec "$0" "$@"', sys.executable, "-m", "cogprep", "encode", "--data-root", "ds",
         "--resolution", "17x64x96", "--model", "tiny", "--workers", "8"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
