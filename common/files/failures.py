"""The one door for what a machine refuses: a full disk, a folder that cannot be written, too many open files.

torch and safetensors turn the system's error into errors of their own, which say "unexpected pos" or are no OSError.
Whoever writes does so inside `disk_errors`, and what comes out is one message: what is wrong and, by the error's
number, what to do about it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CogError, DiskError
from ..words import in_bytes

_OTHER_DISK = "name a folder on another file system"
_ANOTHER = "name another folder"
_AGAIN = "look whether the disk is still there (`df`, `dmesg`)"
# By the system's number: what is wrong, and what to do about it. These come from the machine wherever they are met.
_MACHINES: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the quota for files is used up", "remove files of yours there, or ask for a larger quota"),
    errno.EFBIG: (
        "the file grew larger than files may be there",
        "`ulimit -f unlimited`, or a file system that takes larger files",
    ),
    errno.EROFS: ("the file system is read-only", "mount it for writing, or name another folder"),
    errno.EACCES: ("no permission", "change who may read and write there (`ls -ld`), or name another folder"),
    errno.EPERM: (
        "the file system does not allow it",
        "unlock what is locked against changes (`lsattr`), or name a folder on another file system",
    ),
    errno.ENAMETOOLONG: ("the name is longer than the file system takes", "name a folder with a shorter path"),
    errno.ELOOP: ("the path leads through links in a circle", "name the folder itself instead of a link"),
    errno.EMFILE: ("this process may not open more files", "`ulimit -n 4096`"),
    errno.ENFILE: ("the machine may not open more files", "end other programs, or raise the limit: sysctl fs.file-max"),
    errno.EIO: ("the disk could not read or write", "look at `dmesg` for what the disk says, and use another one"),
    errno.ENXIO: ("the disk is gone", _AGAIN),
    errno.ENODEV: ("the disk is gone", _AGAIN),
    errno.ESTALE: ("the network drive has lost the file", "mount the drive again"),
    errno.ENOTCONN: ("the network drive is not connected", "mount the drive again"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", _ANOTHER),
    errno.EISDIR: ("there is a folder where a file is to be", "move it away, or name another folder"),
}
# Of these a slip of ours may be the cause, unless they are met where files are written (`disk_errors`).
_PERHAPS_OURS: Mapping[int, tuple[str, str]] = {
    errno.ENOENT: (
        "a file or folder has gone while the command ran",
        "see that nothing else moves or removes things there",
    ),
    errno.EEXIST: ("there is something of that name already", "move it away, or name another folder"),
    errno.ENOTEMPTY: ("the folder is not empty", "see that nothing else writes there"),
    errno.EMLINK: ("the folder holds as many entries as it can", "name another folder"),
    errno.EHOSTDOWN: ("the network drive's server is down", "mount the drive again when it is back"),
    errno.EREMOTEIO: ("the network drive could not read or write", "look whether its server is well"),
    errno.ETIMEDOUT: ("the network drive does not answer", "look whether its server is well"),
    errno.ENOMEM: ("there is not enough memory", "end other programs"),
    errno.EBUSY: ("something else uses the file or folder", "end what uses it (`lsof`)"),
    errno.ETXTBSY: ("something else uses the file", "end what uses it (`lsof`)"),
    errno.EINVAL: ("the file system does not take that name, or cannot do this", _OTHER_DISK),
    errno.ENOSYS: ("the file system cannot do this", _OTHER_DISK),
    errno.EOPNOTSUPP: ("the file system cannot do this", _OTHER_DISK),
    errno.ENOLCK: ("the file system gives no more locks", _OTHER_DISK),
    errno.EXDEV: ("parts of the folder are on different disks", "name a folder that is whole on one disk"),
}
_SAID = {**_MACHINES, **_PERHAPS_OURS}
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)  # how a folder is refused that is to be made, or written, where a file lies
_NO_SUCH_PLACE = (errno.ENOENT, errno.EPERM, errno.EACCES, errno.EROFS)  # how the kernel refuses to make anything
# Python's tempfile, which torch asks while it is loaded: it says ENOENT where every such folder is full.
_NO_TEMPORARY = "No usable temporary directory found in"
# safetensors' (Rust) and pyarrow's way to tell the number.
_NUMBER = re.compile(r"(?:os error |\[errno )(\d+)", re.IGNORECASE)
_TORCHS_WRITER = re.compile("inline_container|PytorchStreamWriter")


@contextmanager
def disk_errors(
    path: Path, *, needs: int = 0, go_on: str | Callable[[], str] = "run the command again"
) -> Iterator[None]:
    """What the file system refuses is one clear message, whoever it was told to.

    Args:
        path: the file or folder that is being written.
        needs: bytes to be written in all, where it is known.
        go_on: what to type when the fault is mended, and what is kept until then; a function is asked at the fault.

    Raises:
        DiskError: in place of the library's or the system's own.
    """
    try:
        yield
    except CogError:
        raise
    except Exception as error:
        number = number_of(error, path)
        if number is None:
            raise
        then = go_on if isinstance(go_on, str) else go_on()
        raise disk_error(error, number, path, needs=needs, go_on=then) from error


def disk_error(
    error: BaseException, number: int, path: Path, *, needs: int = 0, go_on: str = "run the command again"
) -> DiskError:
    """The message for an error of the file system; see `disk_errors`."""
    named = getattr(error, "filename", None)
    where = os.fsdecode(named) if named else str(path)
    what, do = _SAID.get(number, (f"the file system refused: {os.strerror(number)}", _OTHER_DISK))
    if _NO_TEMPORARY in str(error):
        what = "no folder takes temporary files: the disk is full, or none may be written"
        where = str(error).partition(_NO_TEMPORARY)[2].strip(" []")
        do = "make room there (`df`), or `export TMPDIR=FOLDER` with one on another disk"
    elif number == errno.ENOSPC:
        what, do = _lack(path, needs) or (what, do)
    elif number in _NO_FOLDER and not getattr(error, "filename2", None) and (file := _file_among(Path(where))):
        what, where = "this is a file, not a folder", str(file)
    elif number in _NO_SUCH_PLACE and _is_the_systems(Path(where)):
        what, do = "the system lets nobody make files or folders there", _ANOTHER
    told = DiskError(what, where=where, fix=f"{do}; then {go_on}")
    told.errno = number
    return told


def machines_fault(error: BaseException) -> DiskError | None:
    """The message for an error that no `disk_errors` has caught, if the machine must be its cause."""
    number = number_of(error, Path())
    if number is None or (number not in _MACHINES and _NO_TEMPORARY not in str(error)):
        return None
    return disk_error(error, number, Path(getattr(error, "filename", None) or "."))


def number_of(error: BaseException, path: Path) -> int | None:
    """The system's number (``errno``) of an error, or of that which it was made from; None if there is none.

    Args:
        path: that was being written: torch's writer keeps no number, so the disk is asked.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        # Of a RuntimeError, as torch raises while it closes the file, also that in whose handling it came up. Of others
        # that would make a slip in an `except OSError` the disk's fault.
        link = link.__cause__ or (link.__context__ if isinstance(link, RuntimeError) else None)
    for link in chain:
        if isinstance(link, ConnectionError):  # a pipe whose reader has gone, a server
            return None
        if isinstance(number := getattr(link, "errno", None), int):
            return number
        if told := _NUMBER.search(str(link)):
            return int(told[1])
    if any(isinstance(link, RuntimeError) and _TORCHS_WRITER.search(str(link)) for link in chain):
        free = room_of(path)
        return errno.EIO if free and free > 1 << 20 else errno.ENOSPC
    return None


def check_writable(folder: Path) -> None:
    """Refuse, before long work, a folder in which nothing may be written; it need not be there, and is not touched.

    Raises:
        DiskError: the folder, or the one above that it would be made in, is a file, or may not be written in.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():  # else a link that points nowhere
        raise disk_error(OSError(), errno.ENOTDIR if there.exists() else errno.EEXIST, there)
    if _is_the_systems(folder):
        raise disk_error(OSError(), errno.ENOENT, folder)
    if not os.access(there, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise disk_error(OSError(), number, folder)


def _is_the_systems(path: Path) -> bool:
    """Whether a path lies where the kernel shows itself as files; it answers there that a folder is missing."""
    return path.absolute().parts[1:2] in (("proc",), ("sys",))


def _file_among(path: Path) -> Path | None:
    """The part of a path that is a file, where folders are to be; None if it is gone by now."""
    with suppress(OSError):
        return next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    return None


def room_of(path: Path) -> int | None:
    """Bytes that one may still write on the disk of a file or folder, which need not be there yet.

    None where the file system does not say.
    """
    for place in (path, *path.absolute().parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None


def _lack(path: Path, needs: int) -> tuple[str, str] | None:
    """What to say of a disk that is full, with figures."""
    free = room_of(path)
    if free is None:
        return None
    if needs:
        return (
            f"the disk is full: {in_bytes(needs)} are to be written, and {in_bytes(free)} are free",
            f"make {in_bytes(max(needs - free, needs / 10))} of room",
        )
    folder = next(place for place in (path, *path.absolute().parents) if place.exists())
    if os.statvfs(folder).f_files and not os.statvfs(folder).f_favail:
        return "the disk is full: it cannot hold more files (it is out of inodes)", "remove some files there"
    return None
