"""Files of this machine, as a store."""

from __future__ import annotations

import errno
import glob
import os
from pathlib import Path

from cogcommon.files.failures import machines_fault
from cogcommon.store.store import ReadPart, StoreFault

# A network file system that was restarted, and a process that has too many files open at the moment.
_PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.EAGAIN}


class LocalStore:
    """Files by their paths, relative ones from the working folder; see `store.Store`."""

    remote = False

    def read(self, path: str, start: int, end: int) -> ReadPart:
        return self._read(path, start, end)

    def read_all(self, path: str) -> ReadPart:
        return self._read(path, 0, None)

    def stat(self, path: str, *, fresh: bool = False) -> ReadPart:
        try:
            status = Path(path).stat()
            return ReadPart(bytearray(), status.st_size, f"{status.st_mtime_ns}-{status.st_ino}")
        except OSError as error:
            raise _told(error) from error

    def names(self, folder: str) -> list[str]:
        return self.matching(glob.escape(folder.rstrip("/")) + "/*")

    def matching(self, pattern: str) -> list[str]:
        return glob.glob(pattern)  # noqa: PTH207 pathlib would drop "./" and "//", and messages show what was typed

    def _read(self, path: str, start: int, end: int | None) -> ReadPart:
        try:
            with open(path, "rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                data = bytearray(max(0, min(size if end is None else end, size) - start))
                view, at = memoryview(data), 0
                while at < len(data):
                    got = os.preadv(stream.fileno(), [view[at:]], start + at)
                    if not got:
                        raise StoreFault("it became shorter while it was read")
                    at += got
                return ReadPart(data, size)
        except OSError as error:
            raise _told(error) from error


def _told(error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return FileNotFoundError(error.filename)
    told = machines_fault(error)
    return StoreFault(error.strerror or str(error), passing=error.errno in _PASSING, fix=told.fix if told else None)
