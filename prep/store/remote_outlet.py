"""Shards that are made here and go to a folder behind an address: see `outlet`.

What is there is what counts. A shard's tar is uploaded first, only where there is none of its name; then its record is
created in one request that fails where there is one. So a record is never without its tar, and of two writers one
wins; the other finds that out, drops its own shard and goes on. A tar without a record is one whose writer was killed,
or is about to write it: its samples are taken over, and it is replaced only when it is old.

A committed shard that loses or gains samples is replaced as on a disk, in steps that the next writer can finish::

    .000007.tar.rewrite-SHA256.tmp  the new tar, whole
    .000007.parquet.new             its record: from here on the next writer will finish the rewrite
    000007.parquet removed, 000007.tar copied from the new one, 000007.parquet written, these two removed
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cogcommon.errors import StoreError
from cogcommon.files.atomic import TEMPORARY, commit_bytes, temporary_beside
from cogcommon.files.hashes import sha256_of
from cogcommon.files.ownership import foreign_folder, refuse_lists
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE
from cogcommon.shards.records import ShardHeader, read_table, record_name, shard_number, tar_name
from cogcommon.store.remote_folder import Entry, RemoteFolder

from .locks import ShardBusy, shard_disk_errors
from .outlet import ABOUT_TO_WRITE_S, Outlet
from .proof import OF_THE_SHARDS, check_shards_output, is_beside_shards
from .seen import SeenObject, SeenObjects
from .shards import ShardDone

T = TypeVar("T")

_FOLDERS = ("", "val")  # of a folder of shards
_AT_ONCE = 16  # requests
_HEAD = 1 << 16  # bytes of a tar that tell whose it is
_ABANDONED_S = 600.0  # of a tar without a record: it follows within seconds where its writer lives
_HALF = re.compile(r"\.(\d{6,18})\.parquet\.new", re.ASCII)
_WHOLE = re.compile(r"\.(\d{6,18})\.tar\.rewrite-[0-9a-f]{16}\.tmp", re.ASCII)


class RemoteOutlet(Outlet):
    """See the module.

    Args:
        remote: the folder there.
        desk: a folder of this process alone.
    """

    keeps = False

    def __init__(self, remote: RemoteFolder, desk: Path) -> None:
        super().__init__(desk, remote.shown)
        self._remote = remote
        self._seen = SeenObjects(desk.with_name(desk.name + ".json"))
        self._there: dict[str, Entry] = {}  # as it was mirrored
        self._left: dict[str, tuple[str, str]] = {}  # tars without a record that were brought: etag and sha256

    # The folder there, mirrored.

    def begin(self, lists: tuple[str, ...]) -> None:
        """Make the desk fit for an encode, and publish what a killed run has left on it.

        Raises:
            SettingError, ShardError: as `check_shards_output`.
        """
        there = self._look()
        refuse_lists(there.__contains__, self.place, "--out", lists)
        there = self._sync(there, changing=True)
        for name in [name for name in there if _record_number(name) is not None and _tar_of(name) not in there]:
            self._remote.remove(name)  # its tar is gone, so it counts for nothing
            for path in (self.folder / name, self.folder / _tar_of(name)):
                path.unlink(missing_ok=True)
            self._seen.forget(name)
            del there[name]
        foreign = [name for name in there if not _is_our_name(name)]
        check_shards_output(self.folder, "--out", lists)
        if foreign and not (there.keys() & {CONTRACT_FILE} or any(_record_number(name) is not None for name in there)):
            raise foreign_folder(Path(self.place), "--out")
        for folder, number in self._unpublished():
            with suppress(ShardDone, ShardBusy):
                self.publish(folder, number)

    def mirror(self, option: str, *, changing: bool, leftovers: bool) -> None:
        """Make the desk an image of the folder there, also of tars without a record; see `open_image`."""
        there = self._look()
        if changing:
            refuse_lists(there.__contains__, self.place, option)
        there = self._there = self._sync(there, changing=changing)
        heads = [
            name
            for name in there
            if (shard_number(Path(name).name, "tar") is not None and (leftovers or not (self.folder / name).exists()))
            or (leftovers and _WHOLE.fullmatch(Path(name).name))
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: self._stand_in_with_head(name, there[name]), heads))

    def _stand_in_with_head(self, name: str, entry: Entry) -> None:
        """A stand-in whose beginning is the tar's, which tells whose it is."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        self._remote.fetch(name, path, most=_HEAD)
        with path.open("ab") as stream:
            stream.truncate(entry.size)

    def publish_changes(self) -> int:
        mirrored = [name for name in self._there if _is_our_name(name) and not _HALF.fullmatch(Path(name).name)]
        gone = [name for name in mirrored if not (self.folder / name).exists()]
        stay = 0
        for name in sorted(gone, key=_goes):
            entry = self._remote.stat(name)
            if entry is not None and (entry.version != self._there[name].version or self._taken_up(name)):
                stay += 1
            else:
                self._remote.remove(name)
        for name in mirrored:
            path = self.folder / name
            number = _record_number(name)
            if number is not None and path.exists() and not self._is_as_seen(name):
                try:
                    self.publish(path.parent, number)
                except ShardBusy:
                    stay += 1
        return stay

    def _is_as_seen(self, name: str) -> bool:
        return name in self._seen and sha256_of(self.folder / name) == self._seen[name].sha256

    def _taken_up(self, name: str) -> bool:
        """Whether a writer has since committed what looked left over: a tar without its record, or a half rewrite."""
        folder, slash, last = name.rpartition("/")
        half = _WHOLE.fullmatch(last)
        if half is not None:
            commits = f"{folder}{slash}.{half[1]}.parquet.new"
        elif (number := shard_number(last, "tar")) is not None:
            commits = f"{folder}{slash}{record_name(number)}"
        else:
            return False
        return commits not in self._there and self._remote.stat(commits) is not None

    def shown(self, path: Path) -> str:
        return self._remote.name(self._name(path))

    @contextmanager
    def at_hand(self, tar: Path) -> Iterator[None]:
        if not tar.exists():  # nor is it there; whoever reads it says so
            yield
            return
        size = tar.stat().st_size
        self._bring(self._name(tar))
        try:
            yield
        finally:
            if tar.exists():
                _stand_in(tar, size)

    def _sync(self, there: dict[str, Entry], *, changing: bool) -> dict[str, Entry]:
        """Bring what is another one there, or new, and drop what is gone; returns what is there by then."""
        halves = [name for name in there if _HALF.fullmatch(Path(name).name)]
        if changing and halves:
            for half in halves:
                self._finish(half)
            there = self._look()
        wanted = {
            name: entry for name, entry in there.items() if is_beside_shards(name) or _record_number(name) is not None
        }
        with shard_disk_errors(self.folder):
            (self.folder / "val").mkdir(exist_ok=True)
            self._seen.begin(self._believed(wanted))
            self._drop_others(wanted)
            new = [name for name in wanted if name not in self._seen]
            for name, data in self._remote.read_many(new).items():
                self._take(name, data, wanted[name])
            for name in self._seen:
                if _record_number(name) is not None and _tar_of(name) in there:
                    _stand_in(self.folder / _tar_of(name), there[_tar_of(name)].size)
            with suppress(OSError):
                (self.folder / "val").rmdir()  # as on a disk: none where it would be empty
        return there

    def _look(self) -> dict[str, Entry]:
        with ThreadPoolExecutor(len(_FOLDERS)) as pool:
            return {name: entry for found in pool.map(self._remote.entries, _FOLDERS) for name, entry in found.items()}

    def _believed(self, wanted: dict[str, Entry]) -> dict[str, SeenObject]:
        """What the desk has whole, and is still the same there."""
        return {
            name: seen
            for name, seen in self._seen.noted().items()
            if (entry := wanted.get(name))
            and entry.version == seen.version
            and seen.etag
            and (self.folder / name).is_file()
            and sha256_of(self.folder / name) == seen.sha256
        }

    def _drop_others(self, wanted: dict[str, Entry]) -> None:
        """Remove from the desk what neither is there nor waits to be published; half-written tars stay."""
        keep = set(self._seen)
        if {CONTRACT_FILE, EMPTY_CAPTION_FILE} <= wanted.keys():  # what was made before that is of another contract
            keep |= {self._name(folder / record_name(number)) for folder, number in self._unpublished()} - wanted.keys()
        for folder in (self.folder, self.folder / "val"):
            for path in list(folder.iterdir()) if folder.is_dir() else []:
                name = self._name(path)
                record = _record_number(name) is not None
                if path.name.endswith((".tar.new", ".parquet.new")) or TEMPORARY.fullmatch(path.name):
                    path.unlink()
                elif name not in keep and (record or is_beside_shards(name)):
                    path.unlink()
                    if record:
                        path.with_suffix(".tar").unlink(missing_ok=True)

    def _unpublished(self) -> list[tuple[Path, int]]:
        """Shards that are whole on the desk and have not been seen there."""
        found = []
        for folder in (self.folder, self.folder / "val"):
            for path in sorted(folder.glob("*.parquet")):
                number = shard_number(path.name)
                if number is not None and self._name(path) not in self._seen and path.with_suffix(".tar").exists():
                    found.append((folder, number))
        return found

    # The three moments.

    def prepare(self, folder: Path, number: int, *, rewrite: bool = False) -> None:
        record, tar = self._names(folder, number)
        if record in self._seen:
            if rewrite:
                self._bring(tar)
        elif (folder / record_name(number)).exists() or self._adopt(folder, number):
            pass  # committed, here or there: the writer will see it
        elif self._remote.stat(tar) is not None:
            self._bring(tar)  # its samples are taken over

    def publish(self, folder: Path, number: int) -> None:
        record, tar = self._names(folder, number)
        path = self.folder / record
        if not path.exists():
            if record in self._seen:
                self._check_unchanged(record)
                self._remote.remove(record, tar)
                self._seen.forget(record)
            return
        data = path.read_bytes()
        header, _ = read_table(io.BytesIO(data), ["key"])
        if record not in self._seen:
            self._commit(folder, number, header, data)
        elif hashlib.sha256(data).hexdigest() != self._seen[record].sha256:
            self._check_unchanged(record)
            self._replace(record, tar, header, data)
        entry = self._remote.stat(record)
        if entry is not None:
            self._saw(record, entry, data)
        _stand_in(self.folder / tar, header.tar_size)

    def agree(self, settle: Callable[[], T]) -> T:
        result = settle()
        for name in (CONTRACT_FILE, EMPTY_CAPTION_FILE):
            path = self.folder / name
            if name in self._seen:
                continue
            if not self._remote.create(name, path.read_bytes()):
                self._take_small(name)
                if name == CONTRACT_FILE:
                    self._take_small(EMPTY_CAPTION_FILE, wait_s=ABOUT_TO_WRITE_S)
                result = settle()
            elif (entry := self._remote.stat(name)) is not None:
                self._saw(name, entry, path.read_bytes())
        return result

    def put(self, name: str) -> None:
        self._remote.put(name, (self.folder / name).read_bytes())

    # Steps of these.

    def _commit(self, folder: Path, number: int, header: ShardHeader, data: bytes) -> None:
        """A new shard: the tar, then the record."""
        record, tar = self._names(folder, number)
        if not self._is_there(tar, header, known=True) and not self._remote.create_from(tar, self.folder / tar):
            if self._remote.stat(record) is not None:
                self._lose(folder, number)
            if not self._is_there(tar, header):
                entry = self._remote.stat(tar)
                if entry is not None and entry.age < _ABANDONED_S:
                    raise ShardBusy
                self._remote.upload(tar, self.folder / tar)
        if not self._remote.create(record, data):
            self._lose(folder, number)

    def _is_there(self, tar: str, header: ShardHeader, *, known: bool = False) -> bool:
        """Whether the tar there has the content of this one.

        Args:
            known: only where that can be told without reading it.
        """
        if known and tar not in self._left:
            return False
        entry = self._remote.stat(tar)
        if entry is None or entry.size != header.tar_size:
            return False
        if (left := self._left.get(tar)) and left[0] == entry.etag:
            return left[1] == header.tar_sha256
        if known:
            return False
        copy = temporary_beside(self.folder / tar)
        try:
            return self._remote.fetch(tar, copy) is not None and sha256_of(copy) == header.tar_sha256
        finally:
            copy.unlink(missing_ok=True)

    def _lose(self, folder: Path, number: int) -> None:
        """Another writer was first: its record takes the place of ours."""
        for name in self._names(folder, number):
            (self.folder / name).unlink(missing_ok=True)
        self._adopt(folder, number)
        raise ShardDone

    def _adopt(self, folder: Path, number: int) -> bool:
        """Take over the record that is there by now, if there is one."""
        record, tar = self._names(folder, number)
        entry, tar_entry = self._remote.stat(record), self._remote.stat(tar)
        data = self._remote.read(record) if entry else None
        if entry is None or data is None or tar_entry is None:
            return False
        self._take(record, data, entry)
        _stand_in(self.folder / tar, tar_entry.size)
        return True

    def _check_unchanged(self, record: str) -> None:
        """Leave a shard alone that somebody else has changed since the desk saw it."""
        entry = self._remote.stat(record)
        if entry is None or entry.version != self._seen[record].version:
            raise ShardBusy

    def _replace(self, record: str, tar: str, header: ShardHeader, data: bytes) -> None:
        """A committed shard, rewritten: see the module."""
        half, whole = _halves(record, header)
        self._remote.upload(whole, self.folder / tar)
        if not self._remote.create(half, data):
            raise ShardBusy
        self._finish(half)

    def _finish(self, half: str) -> None:
        """Carry out a rewrite whose record is there; any number of writers may."""
        data = self._remote.read(half)
        if data is None:
            return
        folder, _, name = half.rpartition("/")
        record = f"{folder}/{name[1:]}".lstrip("/").removesuffix(".new")
        tar = _tar_of(record)
        header, _ = read_table(io.BytesIO(data), ["key"])
        half, whole = _halves(record, header)
        if self._remote.stat(whole) is not None:
            self._remote.remove(record)
            copied = self._remote.copy(whole, tar)
            if copied or ((entry := self._remote.stat(tar)) and entry.size == header.tar_size):
                self._remote.create(record, data)
        self._remote.remove(half, whole)

    def _bring(self, tar: str) -> None:
        """The tar itself in place of its stand-in."""
        path = self.folder / tar
        path.parent.mkdir(exist_ok=True)
        coming = temporary_beside(path)
        with shard_disk_errors(coming):
            try:
                entry = self._remote.fetch(tar, coming)
                if entry is None:
                    raise StoreError("cannot be read: it is gone by now", where=self._remote.name(tar))
                self._left[tar] = entry.etag, sha256_of(coming)
                coming.replace(path)
            finally:
                coming.unlink(missing_ok=True)

    def _take_small(self, name: str, wait_s: float = 0.0) -> None:
        """Put what is there in place of ours; wait a little for what is about to be written."""
        until = time.monotonic() + wait_s
        while (data := self._remote.read(name)) is None:
            if time.monotonic() > until:
                return
            time.sleep(0.2)
        if (entry := self._remote.stat(name)) is not None:
            self._take(name, data, entry)

    def _take(self, name: str, data: bytes, entry: Entry) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        commit_bytes(path, data)
        self._saw(name, entry, data)

    def _saw(self, name: str, entry: Entry, data: bytes) -> None:
        self._seen.note(name, SeenObject(entry.size, entry.etag, hashlib.sha256(data).hexdigest()))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _names(self, folder: Path, number: int) -> tuple[str, str]:
        """Of a shard's record and its tar."""
        return self._name(folder / record_name(number)), self._name(folder / tar_name(number))


def _tar_of(record: str) -> str:
    return record.removesuffix(".parquet") + ".tar"


def _halves(record: str, header: ShardHeader) -> tuple[str, str]:
    """Names of a rewrite's record and tar."""
    folder, slash, name = record.rpartition("/")
    stem = name.removesuffix(".parquet")
    return f"{folder}{slash}.{name}.new", f"{folder}{slash}.{stem}.tar.rewrite-{header.tar_sha256[:16]}.tmp"


def _record_number(name: str) -> int | None:
    return shard_number(name.removeprefix("val/"))


def _is_our_name(name: str) -> bool:
    last = name.rpartition("/")[2]
    ours = any(shard_number(last, kind) is not None for kind in ("tar", "parquet"))
    return bool(ours or is_beside_shards(name) or _HALF.fullmatch(last) or _WHOLE.fullmatch(last))


def _stand_in(tar: Path, size: int) -> None:
    """A file of a tar's size that takes no room."""
    with tar.open("wb") as stream:
        stream.truncate(size)


def _goes(name: str) -> tuple[int, str]:
    """When an object goes: a record before its tar, what proves the folder ours last."""
    if name in OF_THE_SHARDS:
        return 2 + OF_THE_SHARDS.index(name), name
    return int(_record_number(name) is None), name
