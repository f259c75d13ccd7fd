"""Stores: where files lie, and the one way to read them.

A `Store` knows one kind of place (this machine, a web server, a bucket) and makes one attempt at
a time. A `StoredFile` is a file in one of them; its reads try again after a fault that may pass,
count it, and in the end name the true reason. Whoever reads decides how patient to be.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ..cli.names import plain
from ..errors import StoreError
from ..words import in_words
from .address import READERS

_T = TypeVar("_T")

STALLED = 20.0  # seconds without an answer, or with less than `SLOWEST`, end an attempt
SLOWEST = 1024  # bytes a second
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0  # seconds between attempts; they double
_SAY_EVERY = 30.0  # seconds between lines on what is being waited for


PIECE = 16 << 20  # bytes of one request, where a file is read from its beginning to its end


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Where the requests begin and end that read a file of so many bytes, or so much of its beginning."""
    return ((start, min(start + PIECE, size)) for start in range(0, size, PIECE))


class WholeFilesOnly(StoreError):
    """A server that gives no parts of files."""


class StoreFault(Exception):
    """One attempt has failed.

    Args:
        reason: the true one, in words.
        passing: whether another attempt may do better.
        wait: seconds that the store asks to wait.
        fix: what to do where it does not pass.
    """

    def __init__(self, reason: str, *, passing: bool = True, wait: float = 0.0, fix: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing
        self.wait = wait
        self.fix = fix

    kind: type[StoreError] = StoreError  # what is raised where the fault lasts


class NoRanges(StoreFault):
    """The server gives whole files only."""

    kind = WholeFilesOnly

    def __init__(self) -> None:
        super().__init__(
            "the server gives no parts of files (it ignores Range requests), and samples are read by their place",
            passing=False,
            fix="--cache DIR, which holds whole shards then; or another server (nginx, caddy and object stores can)",
        )


@dataclass(frozen=True)
class ReadPart:
    """Bytes of a file, and what the same answer says of the whole."""

    data: bytearray
    size: int | None = None  # bytes of the whole file
    etag: str = ""  # another one where the content has changed; empty where there is none


class Store(Protocol):
    """One kind of place. Every call is one attempt.

    All raise FileNotFoundError for what is not there, and `StoreFault` for anything else.
    """

    remote: bool

    def read(self, path: str, start: int, end: int) -> ReadPart:
        """Bytes from ``start`` to before ``end``; fewer only where the file ends earlier."""

    def read_all(self, path: str) -> ReadPart: ...

    def stat(self, path: str, *, fresh: bool = False) -> ReadPart:
        """Size and etag, without data; ``fresh``: as they are now, not as a listing has told them."""

    def names(self, folder: str) -> list[str]:
        """Paths of what lies in a folder."""

    def matching(self, pattern: str) -> list[str]:
        """Paths that a glob matches."""


@dataclass(frozen=True)
class Patience:
    """How long a read is tried again for, after its first attempt began."""

    seconds: float


OPENING = Patience(60)  # somebody is waiting
WRITING = Patience(300)  # what is to be written was hours in the making
TRAINING = Patience(300)  # hours of work are behind, and other hosts wait: less than their collectives' time-out


class Stop:
    """Ends waiting readers when their run has ended."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Whether it was set within this time."""
        return self._event.wait(seconds)


@dataclass
class Faults:
    """Counts the faults that passed, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _said: float = -_SAY_EVERY

    def add(self, reason: str, shown: str, patience: Patience | None) -> None:
        """Count a fault, and tell of it.

        Args:
            patience: with which it is tried again; none where that has been done, or is about to be.
        """
        with self._lock:
            self.counts[reason] += 1
            now = time.monotonic()
            if now - self._said < _SAY_EVERY:
                return
            self._said = now
        then = f"trying again, for up to {in_words(patience.seconds)}" if patience else "it is read again"
        print(plain(f"{shown}: {reason}; {then}"), file=sys.stderr, flush=True)

    def __str__(self) -> str:
        """``3 failed attempts to read or write, made good by further ones: 2 x ...``; empty without any."""
        with self._lock:
            counts = self.counts.most_common()
        total = sum(count for _, count in counts)
        listed = ", ".join(f"{count} x {reason}" for reason, count in counts[:4])
        return f"{total} failed attempts to read or write, made good by further ones: {listed}" if total else ""


FAULTS = Faults()  # of this process


@dataclass(frozen=True)
class StoredFile:
    """A file in a store.

    Args:
        path: as the store wants it; may hold a signature.
        shown: as messages name it; holds none.
    """

    store: Store
    path: str
    shown: str

    @property
    def remote(self) -> bool:
        return self.store.remote

    def read(self, start: int, end: int, patience: Patience | None = None, stop: Stop | None = None) -> ReadPart:
        """Bytes from ``start`` to before ``end``; fewer only where the file ends earlier.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: it cannot be read, and why.
        """
        return self._try(lambda: self.store.read(self.path, start, end), patience, stop)

    def read_all(self, patience: Patience | None = None, stop: Stop | None = None) -> ReadPart:
        """The whole file, a small one. Raises as `read`."""
        return self._try(lambda: self.store.read_all(self.path), patience, stop)

    def stat(self, *, fresh: bool = False) -> ReadPart:
        """Size and etag, without data; ``fresh``: as they are now. Raises as `read`."""
        return self._try(lambda: self.store.stat(self.path, fresh=fresh), None, None)

    def count(self, reason: str) -> None:
        """Count a fault that was made good by reading again."""
        FAULTS.add(reason, self.shown, None)

    def beside(self, ending: str) -> StoredFile:
        """The file of the same name with another ending; a query string, which may sign for both, stays."""
        return StoredFile(self.store, _renamed(self.path, lambda name: name.rpartition(".")[0] + ending),
                          _renamed(self.shown, lambda name: name.rpartition(".")[0] + ending))  # fmt: skip

    def sibling(self, name: str) -> StoredFile:
        """Another file of the same folder."""
        return StoredFile(self.store, _renamed(self.path, lambda _: name), _renamed(self.shown, lambda _: name))

    def _try(self, attempt: Callable[[], _T], patience: Patience | None, stop: Stop | None) -> _T:
        return patiently(attempt, self.shown, patience or OPENING, stop)


def patiently(
    attempt: Callable[[], _T], shown: str, patience: Patience, stop: Stop | None = None, *, what: str = "read"
) -> _T:
    """Try until it succeeds, the fault is a lasting one, or patience is at its end.

    Args:
        what: is being done, for the message.

    Raises:
        StoreError: with the last attempt's reason.
    """
    began = time.monotonic()
    tries, wait = 0, _FIRST_WAIT
    while True:
        tries += 1
        try:
            return attempt()
        except StoreFault as fault:
            pause = max(wait, fault.wait)
            left = began + patience.seconds - time.monotonic()
            if not fault.passing or pause > left:
                more = f", and asks to wait {in_words(fault.wait)}" if fault.wait > max(left, 0) else ""
                more += f" ({tries} attempts in {in_words(time.monotonic() - began)})" if tries > 1 else ""
                raise fault.kind(f"cannot be {what}: {fault.reason}{more}", where=shown, fix=fault.fix) from None
            FAULTS.add(fault.reason, shown, patience)
        if (stop or Stop()).wait(pause):
            raise StoreError(f"not {what}: the run has ended", where=shown)
        wait = min(2 * wait, _LONGEST_WAIT)


def _renamed(path: str, rename: Callable[[str], str]) -> str:
    """A path or URL with another last name; the query string stays."""
    path, mark, query = path.partition("?") if is_web(path) else (path, "", "")
    folder, slash, name = path.rpartition("/")
    return folder + slash + rename(name) + mark + query


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def without_secrets(text: str) -> str:
    """A text whose URLs have lost their query strings (signatures) and users' names and passwords.

    In an object store ``#`` and ``?`` are signs of a name like any other, but for a query that sets something.
    """

    def bare(match: re.Match[str]) -> str:
        scheme, place, rest = match.groups()
        return f"{scheme}://{place}" + (re.sub(r"\?[^?/]*=.*", "", rest) if scheme in READERS else "")

    return re.sub(r"\b([a-z][a-z0-9+.-]*)://(?:[^\s/@]*@)?([^\s?#'\"]*)((?:[?#][^\s'\"]*)?)", bare, text)
