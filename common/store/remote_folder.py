"""A folder behind an address: whole objects in and out, by their names below it.

`RemoteFolder` is what commands write to where ``--out`` is ``s3://...``. Every call tries again after a passing fault
and in the end names the true reason (`store.patiently`). An object is there whole or not at all, and `create` leaves
one that is there alone: of several writers the first wins, where the store compares for itself (S3, Google, Azure).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import SettingError, StoreError
from ..files.readers import read_in_order
from .fsspec_store import FsspecStore, etag_of, open_fsspec
from .store import OPENING, WRITING, Patience, StoreFault, is_web, patiently, pieces, without_secrets

_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """An object of a folder."""

    size: int
    etag: str
    age: float  # seconds since it was written; infinite where the store does not say

    @property
    def version(self) -> tuple[int, str]:
        """Another one where the content has changed."""
        return self.size, self.etag


class RemoteFolder:
    """See the module; `open_folder` gives one.

    All raise StoreError for what the store refuses, and why.
    """

    def __init__(self, store: FsspecStore, path: str, address: str) -> None:
        self._store = store
        self._path = path.rstrip("/")
        self.shown = without_secrets(address)

    def name(self, name: str) -> str:
        """An object as messages name it."""
        return f"{self.shown}/{name}"

    def entries(self, below: str = "") -> dict[str, Entry]:
        """The objects of the folder, or of one below it, by name; what lies deeper is left out."""
        folder = f"{self._path}/{below}".rstrip("/")
        found = self._try(self._store.entries, folder, below, missing=[])
        before = f"{below}/" if below else ""
        return {before + str(info["name"]).rpartition("/")[2]: _entry(info) for info in found}

    def stat(self, name: str) -> Entry | None:
        """An object as it is now; None where there is none."""
        info = self._try(self._store.info, self._at(name), name, missing=None)
        return None if info is None else _entry(info)

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none."""
        got = self._try(self._store.read_all, self._at(name), name, missing=None)
        return None if got is None else bytes(got.data)

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Small objects, many at a time; those that are gone are left out."""
        got = read_in_order(lambda name: (name, self.read(name)), names)
        return {name: data for name, data in got if data is not None}

    def fetch(self, name: str, to: Path, *, most: int | None = None) -> Entry | None:
        """Download an object, piece by piece; None where there is none, or it goes meanwhile.

        Args:
            to: the file, which is written over.
            most: bytes from the start, if not all.
        """
        for _ in range(3):
            before = self.stat(name)
            if before is None:
                return None
            end = before.size if most is None else min(most, before.size)
            with to.open("wb") as stream:
                for start, last in pieces(end):
                    got = self._try(self._store.read, self._at(name), name, start, last, missing=None)
                    if got is None:
                        return None
                    stream.write(got.data)
                whole = stream.tell() == end
            after = self.stat(name)
            if whole and after is not None and after.version == before.version:
                return before
        raise StoreError("cannot be read: it changes all the time", where=self.name(name))

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, over what is there."""
        self._try(self._store.put, self._at(name), name, data, writing=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object in one request, if there is none; whether it is ours (or the same to the byte)."""
        return self._create(self._store.put, name, data, lambda: self.read(name) == data)

    def upload(self, name: str, path: Path) -> None:
        """Write a file's content, over what is there."""
        self._try(self._store.upload, self._at(name), name, path, writing=True)

    def create_from(self, name: str, path: Path) -> bool:
        """Write a file's content, if there is no such object; False where there is one.

        That may be ours, where the answer to an earlier attempt was lost: compare the contents.
        """
        return self._create(self._store.upload, name, path, lambda: False)

    def copy(self, name: str, to: str) -> bool:
        """Copy an object within the store, over what is there; whether there was one."""
        gone = object()
        return self._try(self._store.copy, self._at(name), name, self._at(to), missing=gone, writing=True) is not gone

    def remove(self, *names: str) -> None:
        """Remove objects, in this order; what is not there is no fault."""
        for name in names:
            self._try(self._store.remove, self._at(name), name, missing=None, writing=True)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _create(self, write: Callable[..., Any], name: str, content: Any, same: Callable[[], bool]) -> bool:
        def attempt() -> bool:
            try:
                write(self._at(name), content, create=True)
            except FileExistsError:
                return same()  # an earlier attempt may have been ours: HTTP libraries repeat a PUT without a word
            except FileNotFoundError:
                raise _no_place() from None
            return True

        return patiently(attempt, self.name(name), WRITING, what="written")

    def _try(
        self, act: Callable[..., _T], path: str, name: str, *args: Any, missing: Any = ..., writing: bool = False
    ) -> Any:
        """One call, tried again while it may help.

        Args:
            missing: what to give where there is no such object.
        """

        def attempt() -> Any:
            try:
                return act(path, *args)
            except FileNotFoundError:
                if missing is ...:
                    raise _no_place() from None
                return missing

        patience: Patience = WRITING if writing else OPENING
        return patiently(attempt, self.name(name), patience, what="written" if writing else "read")


def open_folder(address: str, option: str) -> RemoteFolder:
    """The folder behind an address. Nothing is asked of the store yet.

    Raises:
        StoreError: nothing reads this kind of address, or what does is not installed.
        SettingError: a web server, which takes no files; or a folder of this machine, which is named by its path.
    """
    if is_web(address):
        raise SettingError(
            "a web server takes no files",
            where=f"{option} {without_secrets(address)}",
            fix=f"{option} with a folder, or an address of s3://, gs:// or another object store",
        )
    if address.lower().startswith("file:"):  # where objects come bit by bit, and no folder is made for them
        raise SettingError(
            "file:// is a folder of this machine, and no object store",
            where=f"{option} {address}",
            fix=f"{option} with an address of s3://, gs:// or another object store, or with the path alone where a "
            "folder will do, as for --out",
        )
    store, path = open_fsspec(address, option)
    return RemoteFolder(store, path, address)


def _no_place() -> StoreFault:
    return StoreFault(
        "there is no such bucket or folder", passing=False, fix="create the bucket, or name one that is there"
    )


def _entry(info: dict[str, Any]) -> Entry:
    """What a store says of an object; of times, the first that is one (gcsfs gives ``updated`` as text, too)."""
    told = [info.get(name) for name in ("LastModified", "last_modified", "mtime", "updated", "created")]
    stamp: Any = next((getattr(at, "timestamp", None) for at in told if hasattr(at, "timestamp")), None)
    return Entry(int(info.get("size") or 0), etag_of(info), time.time() - stamp() if stamp else float("inf"))
