"""Clips and lists behind addresses (s3, gs, hf, http, and what else fsspec reaches): read as files of this machine.

`remote_address` tells that a path names one. An object is brought whole to a cache of this machine (`clip_cache`) and
opened there. The file's time of change in the cache stands for the etag, so that `Hashed`, which remembers a file's
size and time, knows the object again by address, etag and size, without reading it, and sees that it has been replaced.

What a server refuses is never the clip's fault: `Unreached` says what it was, and the clip is left for the next run.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cogcommon.errors import StoreError
from cogcommon.files.atomic import temporary_beside
from cogcommon.files.locks import Busy, open_locked
from cogcommon.files.readers import read_in_order
from cogcommon.files.regular_file import Empty, Missing, Unreadable
from cogcommon.store.http_faults import page_instead
from cogcommon.store.network import is_page
from cogcommon.store.store import Patience, StoreFault, is_web, patiently, pieces, without_secrets

from .addresses import any_remote, in_full, remote_address
from .clip import BadClip, ClipFault
from .clip_cache import ObjectState, believe, believed, keep, make_room, open_kept, place_of
from .heartbeat import beat

if TYPE_CHECKING:
    from cogcommon.store.fsspec_store import FsspecStore
    from cogcommon.store.http_store import HttpStore

T = TypeVar("T")

_KNOWN, _UNKNOWN = Patience(60), Patience(4)  # of a host that has answered before, and of one that never has
FETCHING = 8  # clips on their way at once


class Unreached(BadClip):
    """An object that its store does not give now; it says nothing of the clip."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "unreached")

    def fault(self) -> ClipFault:
        """As a value: the next run tries again."""
        return ClipFault(str(self), passing=True, kind=self.kind)


def state_of(address: str) -> ObjectState:
    """Size and what stands for the etag, as they are now, or were a moment ago.

    Raises:
        Missing: there is no such object.
        Unreached: the store does not say.
    """
    content = place_of(address)
    if (state := believed(content)) is None:
        asked_ns = time.time_ns()
        state = _ask(address)
        believe(content, state, asked_ns)
    return state


def _ask(address: str) -> ObjectState:
    store, path, shown = _place(address)

    def ask() -> ObjectState:
        part = store.stat(path, fresh=True)
        if part.size is None:
            raise StoreFault("the server does not say how long the file is", passing=False)
        return ObjectState.of(part.size, part.etag)

    return _reach(ask, shown)


def read_object(address: str) -> bytes:
    """The content of a small object. Raises as `state_of`."""
    store, path, shown = _place(address)

    def whole() -> bytes:
        data = bytes(store.read_all(path).data)
        if is_web(path) and is_page(data):
            raise page_instead()
        return data

    return _reach(whole, shown)


def open_object(address: str) -> FileIO:
    """An object, opened as a file of the cache; it is brought there if need be.

    Raises:
        Unreadable: it is missing or empty.
        Unreached: the store does not give it, or the cache's disk does not take it.
    """
    path = place_of(address)
    for _ in range(3):
        state = state_of(address)
        if not state.size:
            raise Empty("the file is empty (0 bytes)")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if (opened := open_kept(path, state)) is None and _fetch(address, state, path):
                opened = open_kept(path, state)
        except OSError as error:
            what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"refuses: {error.strerror}"
            raise Unreached(f"the disk of the cache {what} (--cache {path.parent.parent})") from error
        if opened is not None:
            return opened
    raise Unreached(f"{_place(address)[2]} changes all the time")


def _fetch(address: str, state: ObjectState, path: Path) -> bool:
    """Bring an object to the cache; false if it was replaced meanwhile."""
    while True:  # one process fetches, the others find it
        try:
            lock = open_locked(path.with_name(path.name + ".lock"))
            break
        except Busy:
            beat()
            time.sleep(0.05)
    temporary = temporary_beside(path)
    with lock:
        try:
            if believed(path) == state:
                return True
            make_room(state.size)
            whole = _download(address, state.size, temporary)
            asked_ns = time.time_ns()
            if not whole or _ask(address) != state:
                return False
            keep(temporary, path, state)
            believe(path, state, asked_ns)
        finally:
            temporary.unlink(missing_ok=True)
            path.with_name(path.name + ".lock").unlink(missing_ok=True)
    return True


def _download(address: str, length: int, to: Path) -> bool:
    """The whole object; false if it has another length by now."""
    from cogcommon.store.fsspec_store import FsspecStore

    store, path, shown = _place(address)
    if not isinstance(store, FsspecStore):

        def whole() -> int:
            with to.open("wb") as stream:
                for piece in store.download(path):
                    stream.write(piece)
                    beat()
                return stream.tell()

        size = _reach(whole, shown)
    else:
        with to.open("wb") as stream:
            for start, last in pieces(length):
                stream.write(_reach(lambda start=start, last=last: store.read(path, start, last).data, shown))  # type: ignore[misc]
                beat()
            size = stream.tell()
    return size == length


def ahead(items: Iterable[T], files: Callable[[T], Sequence[Path]]) -> Iterator[T]:
    """The items in their order, while the files of those to come are brought to the cache.

    Args:
        items: read a few ahead, in the caller's thread.
        files: what an item will read. Those of this machine cost nothing; what goes wrong with one is told when it is
            opened.
    """

    def bring(item: T) -> T:
        for path in files(item):
            if (address := remote_address(path)) is not None:
                with suppress(BadClip, Unreadable):
                    open_object(address).close()
        return item

    waiting = iter(items)
    for item in waiting:  # none is read ahead, nor a thread begun, before the first one that is behind an address
        if any_remote(files(item)):
            yield from read_in_order(bring, chain([item], waiting), threads=FETCHING)
        else:
            yield item


# How stores are asked.


def _place(address: str) -> tuple[FsspecStore | HttpStore, str, str]:
    """The store of an address, the path there, and the address as messages name it.

    Raises:
        Unreached: nothing reads such an address.
    """
    full = in_full(address)
    from cogcommon.store.fsspec_store import open_fsspec
    from cogcommon.store.http_store import HttpStore

    if is_web(full):
        return HttpStore(), full, without_secrets(full)
    try:
        return *open_fsspec(full, "videos.txt"), without_secrets(full)
    except StoreError as error:
        raise Unreached(_in_a_line(error)) from error


_answered: set[str] = set()
_silent: set[str] = set()
_hosts = threading.Lock()


def _reach(act: Callable[[], T], shown: str) -> T:
    """Ask a store, patiently where that has helped before.

    Raises:
        Missing: there is no such object.
        Unreached: with the true reason.
    """
    host = "/".join(shown.split("/")[:3])
    with _hosts:
        patience = Patience(0) if host in _silent else _KNOWN if host in _answered else _UNKNOWN
    passing = False

    def attempt() -> T:
        nonlocal passing
        try:
            return act()
        except StoreFault as fault:
            passing = fault.passing
            raise

    try:
        result = patiently(attempt, shown, patience)
    except FileNotFoundError:
        raise Missing("the file is missing") from None
    except StoreError as error:
        if passing:  # patience was of no use
            with _hosts:
                _silent.add(host)
        raise Unreached(_in_a_line(error)) from error
    with _hosts:
        _answered.add(host)
        _silent.discard(host)
    return result


def _in_a_line(error: StoreError) -> str:
    return f"{error.what} ({error.where})" + (f"; {error.fix}" if error.fix else "")
