"""The desk of a folder behind an address: its image on this machine, in which shards are made (see `outlet`)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cogcommon.errors import ShardError, StoreError
from cogcommon.files.atomic import TEMPORARY, commit_bytes, temporary_beside
from cogcommon.files.hashes import sha256_of
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE
from cogcommon.shards.records import read_record, record_name, shard_number, tar_name
from cogcommon.store.remote_folder import Entry, RemoteFolder

from .locks import shard_disk_errors
from .proof import is_beside_shards
from .seen import SeenObject, SeenObjects

_FOLDERS = ("", "val")  # of a folder of shards
_AT_ONCE = 16  # requests
_HEAD = 1 << 16  # bytes of a tar that tell whose it is


class Desk:
    """Records, and what lies beside the shards, are here whole, and tars as stand-ins of their size.

    Args:
        remote: the folder there.
        folder: of this process alone.

    Attributes:
        seen: what is here as it was there.
        left: tars without a record that were brought: etag and sha256.
    """

    def __init__(self, remote: RemoteFolder, folder: Path) -> None:
        self.remote, self.folder = remote, folder
        self.seen = SeenObjects(folder.with_name(folder.name + ".json"))
        self.left: dict[str, tuple[str, str]] = {}

    def look(self) -> dict[str, Entry]:
        """What is there, by name."""
        with ThreadPoolExecutor(len(_FOLDERS)) as pool:
            return {name: entry for found in pool.map(self.remote.entries, _FOLDERS) for name, entry in found.items()}

    def sync(self, there: Mapping[str, Entry]) -> None:
        """Bring what is another one there, or new, and drop what is gone.

        Args:
            there: what is there now (`look`).
        """
        wanted = {
            name: entry for name, entry in there.items() if is_beside_shards(name) or record_number(name) is not None
        }
        with shard_disk_errors(self.folder):
            (self.folder / "val").mkdir(exist_ok=True)
            self.seen.begin(self._believed(wanted))
            self._drop_others(wanted)
            new = [name for name in wanted if name not in self.seen]
            for name, data in self.remote.read_many(new).items():
                self.take(name, data, wanted[name])
            for name in self.seen:
                if record_number(name) is not None and tar_of(name) in there:
                    stand_in(self.folder / tar_of(name), there[tar_of(name)].size)
            with suppress(OSError):
                (self.folder / "val").rmdir()  # as on a disk: none where it would be empty

    def _believed(self, wanted: Mapping[str, Entry]) -> dict[str, SeenObject]:
        """What the desk has whole, and is still the same there."""
        return {
            name: seen
            for name, seen in self.seen.noted().items()
            if (entry := wanted.get(name))
            and entry.version == seen.version
            and seen.etag
            and (self.folder / name).is_file()
            and sha256_of(self.folder / name) == seen.sha256
        }

    def _drop_others(self, wanted: Mapping[str, Entry]) -> None:
        """Remove from the desk what neither is there nor waits to be published; half-written tars stay."""
        keep = set(self.seen)
        if {CONTRACT_FILE, EMPTY_CAPTION_FILE} <= keep:  # else what was made here is of another contract
            keep |= {self.name(folder / record_name(number)) for folder, number in self.unpublished()} - wanted.keys()
        for folder in (self.folder, self.folder / "val"):
            for path in list(folder.iterdir()) if folder.is_dir() else []:
                name = self.name(path)
                record = record_number(name) is not None
                if path.name.endswith((".tar.new", ".parquet.new")) or TEMPORARY.fullmatch(path.name):
                    path.unlink()
                elif name not in keep and (record or is_beside_shards(name)):
                    path.unlink()
                    if record:
                        path.with_suffix(".tar").unlink(missing_ok=True)

    def stand_in_with_heads(self, there: Mapping[str, Entry]) -> None:
        """Stand-ins whose beginning is the tar's, which tells whose it is."""

        def one(name: str) -> None:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            self.remote.fetch(name, path, most=_HEAD)
            with path.open("ab") as stream:
                stream.truncate(there[name].size)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, there))

    def unpublished(self) -> list[tuple[Path, int]]:
        """Shards that are whole on the desk and have not been seen there.

        Not those that somebody has removed there: of these the desk has the record, and a stand-in of the tar.
        """
        found = []
        for folder in (self.folder, self.folder / "val"):
            for path in sorted(folder.glob("*.parquet")):
                number = shard_number(path.name)
                if number is not None and self.name(path) not in self.seen and _is_whole(path):
                    found.append((folder, number))
        return found

    def bring(self, tar: str) -> None:
        """The tar itself in place of its stand-in."""
        path = self.folder / tar
        path.parent.mkdir(exist_ok=True)
        coming = temporary_beside(path)
        with shard_disk_errors(coming):
            try:
                entry = self.remote.fetch(tar, coming)
                if entry is None:
                    raise StoreError("cannot be read: it is gone by now", where=self.remote.name(tar))
                self.left[tar] = entry.etag, sha256_of(coming)
                coming.replace(path)
            finally:
                coming.unlink(missing_ok=True)

    def adopt(self, folder: Path, number: int) -> bool:
        """Take over the record that is there by now, if there is one."""
        record, tar = self.names(folder, number)
        entry, tar_entry = self.remote.stat(record), self.remote.stat(tar)
        data = self.remote.read(record) if entry else None
        if entry is None or data is None or tar_entry is None:
            return False
        self.take(record, data, entry)
        stand_in(self.folder / tar, tar_entry.size)
        return True

    def take_small(self, name: str, wait_s: float = 0.0) -> None:
        """Put what is there in place of ours; wait a little for what is about to be written."""
        until = time.monotonic() + wait_s
        while (data := self.remote.read(name)) is None:
            if time.monotonic() > until:
                return
            time.sleep(0.2)
        if (entry := self.remote.stat(name)) is not None:
            self.take(name, data, entry)

    def take(self, name: str, data: bytes, entry: Entry) -> None:
        """Put what is there in place of ours, if there is one."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        commit_bytes(path, data)
        self.saw(name, entry, data)

    def saw(self, name: str, entry: Entry, data: bytes) -> None:
        """Note that an object there has this content."""
        self.seen.note(name, SeenObject(entry.size, entry.etag, hashlib.sha256(data).hexdigest()))

    def is_as_seen(self, name: str) -> bool:
        """Whether a file here is still what was there."""
        return name in self.seen and sha256_of(self.folder / name) == self.seen[name].sha256

    def name(self, path: Path) -> str:
        """What a file of the desk is called there."""
        return path.relative_to(self.folder).as_posix()

    def names(self, folder: Path, number: int) -> tuple[str, str]:
        """Of a shard's record and its tar."""
        return self.name(folder / record_name(number)), self.name(folder / tar_name(number))


def tar_of(record: str) -> str:
    """The tar beside a record."""
    return record.removesuffix(".parquet") + ".tar"


def record_number(name: str) -> int | None:
    """The number of the shard whose record an object is; None of any other object."""
    return shard_number(name.removeprefix("val/"))


def _is_whole(record: Path) -> bool:
    """Whether the tar beside a record is the tar itself, to the byte; a stand-in mostly shows by taking no room."""
    tar = record.with_suffix(".tar")
    try:
        return tar.stat().st_blocks > 0 and sha256_of(tar) == read_record(record).header.tar_sha256
    except (OSError, ShardError):
        return False


def stand_in(tar: Path, size: int) -> None:
    """A file of a tar's size that takes no room."""
    with tar.open("wb") as stream:
        stream.truncate(size)
