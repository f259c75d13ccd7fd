"""Shards that are made here and go to a folder behind an address: see `outlet`.

What is there is what counts. A shard's tar is uploaded first, only where there is none of its name; then its record is
created in one request that fails where there is one. So a record is never without its tar, and of two writers one
wins; the other finds that out, drops its own shard and goes on. A tar without a record is one whose writer was killed,
or is about to write it: its samples are taken over, and it is replaced only when it is old.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cogcommon.files.atomic import temporary_beside
from cogcommon.files.hashes import sha256_of
from cogcommon.files.ownership import foreign_folder, refuse_lists
from cogcommon.shards.contract import CONTRACT_FILE, EMPTY_CAPTION_FILE
from cogcommon.shards.records import ShardHeader, read_table, record_name, shard_number
from cogcommon.store.remote_folder import Entry, RemoteFolder

from .desk import Desk, record_number, stand_in, tar_of
from .locks import ShardBusy
from .outlet import ABOUT_TO_WRITE_S, Outlet
from .proof import OF_THE_SHARDS, check_shards_output, is_beside_shards
from .remote_rewrite import HALF, WHOLE, finish_replacing, replace_shard
from .shards import ShardDone

T = TypeVar("T")

_ABANDONED_S = 600.0  # of a tar without a record: it follows within seconds where its writer lives


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
        self._desk = Desk(remote, desk)
        self._there: dict[str, Entry] = {}  # as it was mirrored

    # The folder there, mirrored.

    def begin(self, lists: tuple[str, ...]) -> None:
        """Make the desk fit for an encode, and publish what a killed run has left on it.

        Raises:
            SettingError, ShardError: as `check_shards_output`.
        """
        there = self._desk.look()
        refuse_lists(there.__contains__, self.place, "--out", lists)
        there = self._finished(there)
        self._desk.sync(there)
        for name in [name for name in there if record_number(name) is not None and tar_of(name) not in there]:
            self._remote.remove(name)  # its tar is gone, so it counts for nothing
            for path in (self.folder / name, self.folder / tar_of(name)):
                path.unlink(missing_ok=True)
            self._desk.seen.forget(name)
            del there[name]
        foreign = [name for name in there if not _is_our_name(name)]
        check_shards_output(self.folder, "--out", lists)
        if foreign and not (there.keys() & {CONTRACT_FILE} or any(record_number(name) is not None for name in there)):
            raise foreign_folder(self.place, "--out")
        for folder, number in self._desk.unpublished():
            with suppress(ShardDone, ShardBusy):
                self.publish(folder, number)

    def mirror(self, option: str, *, changing: bool, leftovers: bool) -> None:
        """Make the desk an image of the folder there, also of tars without a record; see `open_image`."""
        there = self._desk.look()
        if changing:
            refuse_lists(there.__contains__, self.place, option)
            there = self._finished(there)
        self._there = there
        self._desk.sync(there)
        heads = {
            name: entry
            for name, entry in there.items()
            if (shard_number(Path(name).name, "tar") is not None and (leftovers or not (self.folder / name).exists()))
            or (leftovers and WHOLE.fullmatch(Path(name).name))
        }
        self._desk.stand_in_with_heads(heads)

    def _finished(self, there: dict[str, Entry]) -> dict[str, Entry]:
        """Finish the rewrites that others have left half-way; returns what is there by then."""
        left = [name for name in there if HALF.fullmatch(Path(name).name)]
        for half in left:
            finish_replacing(self._remote, half)
        return self._desk.look() if left else there

    def publish_changes(self) -> list[str]:
        mirrored = [name for name in self._there if _is_our_name(name) and not HALF.fullmatch(Path(name).name)]
        gone = [name for name in mirrored if not (self.folder / name).exists()]
        stay = []
        for name in sorted(gone, key=_goes):
            entry = self._remote.stat(name)
            if entry is not None and (entry.version != self._there[name].version or self._taken_up(name)):
                stay.append(name)
            else:
                self._remote.remove(name)
        for name in mirrored:
            path = self.folder / name
            number = record_number(name)
            if number is not None and path.exists() and not self._desk.is_as_seen(name):
                try:
                    self.publish(path.parent, number)
                except ShardBusy:
                    stay.append(name)
        return stay

    def _taken_up(self, name: str) -> bool:
        """Whether a writer has since committed what looked left over: a tar without its record, or a half rewrite."""
        folder, slash, last = name.rpartition("/")
        half = WHOLE.fullmatch(last)
        if half is not None:
            commits = f"{folder}{slash}.{half[1]}.parquet.new"
        elif (number := shard_number(last, "tar")) is not None:
            commits = f"{folder}{slash}{record_name(number)}"
        else:
            return False
        return commits not in self._there and self._remote.stat(commits) is not None

    def shown(self, path: Path) -> str:
        return self._remote.name(self._desk.name(path))

    @contextmanager
    def at_hand(self, tar: Path) -> Iterator[None]:
        if not tar.exists():  # nor is it there; whoever reads it says so
            yield
            return
        size = tar.stat().st_size
        self._desk.bring(self._desk.name(tar))
        try:
            yield
        finally:
            if tar.exists():
                stand_in(tar, size)

    # The three moments.

    def prepare(self, folder: Path, number: int, *, rewrite: bool = False) -> None:
        record, tar = self._desk.names(folder, number)
        if record in self._desk.seen:
            if rewrite:
                self._desk.bring(tar)
        elif (folder / record_name(number)).exists() or self._desk.adopt(folder, number):
            pass  # committed, here or there: the writer will see it
        elif self._remote.stat(tar) is not None:
            self._desk.bring(tar)  # its samples are taken over

    def publish(self, folder: Path, number: int) -> None:
        record, tar = self._desk.names(folder, number)
        path = self.folder / record
        if not path.exists():
            if record in self._desk.seen:
                self._check_unchanged(record)
                self._remote.remove(record, tar)
                self._desk.seen.forget(record)
            return
        data = path.read_bytes()
        header, _ = read_table(io.BytesIO(data), ["key"])
        if record not in self._desk.seen:
            self._commit(folder, number, header, data)
        elif hashlib.sha256(data).hexdigest() != self._desk.seen[record].sha256:
            self._check_unchanged(record)
            replace_shard(self._remote, record, header, data, self.folder / tar)
        entry = self._remote.stat(record)
        if entry is not None:
            self._desk.saw(record, entry, data)
        stand_in(self.folder / tar, header.tar_size)

    def agree(self, settle: Callable[[], T]) -> T:
        result = settle()
        for name in (CONTRACT_FILE, EMPTY_CAPTION_FILE):
            path = self.folder / name
            if name in self._desk.seen:
                continue
            if not self._remote.create(name, path.read_bytes()):
                self._desk.take_small(name)
                if name == CONTRACT_FILE:
                    self._desk.take_small(EMPTY_CAPTION_FILE, wait_s=ABOUT_TO_WRITE_S)
                result = settle()
            elif (entry := self._remote.stat(name)) is not None:
                self._desk.saw(name, entry, path.read_bytes())
        return result

    def put(self, name: str) -> None:
        self._remote.put(name, (self.folder / name).read_bytes())

    # Steps of these.

    def _commit(self, folder: Path, number: int, header: ShardHeader, data: bytes) -> None:
        """A new shard: the tar, then the record."""
        record, tar = self._desk.names(folder, number)
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
        if known and tar not in self._desk.left:
            return False
        entry = self._remote.stat(tar)
        if entry is None or entry.size != header.tar_size:
            return False
        if (left := self._desk.left.get(tar)) and left[0] == entry.etag:
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
        for name in self._desk.names(folder, number):
            (self.folder / name).unlink(missing_ok=True)
        self._desk.adopt(folder, number)
        raise ShardDone

    def _check_unchanged(self, record: str) -> None:
        """Leave a shard alone that somebody else has changed since the desk saw it."""
        entry = self._remote.stat(record)
        if entry is None or entry.version != self._desk.seen[record].version:
            raise ShardBusy


def _is_our_name(name: str) -> bool:
    last = name.rpartition("/")[2]
    ours = any(shard_number(last, kind) is not None for kind in ("tar", "parquet"))
    return bool(ours or is_beside_shards(name) or HALF.fullmatch(last) or WHOLE.fullmatch(last))


def _goes(name: str) -> tuple[int, str]:
    """When an object goes: a record before its tar, what proves the folder ours last."""
    if name in OF_THE_SHARDS:
        return 2 + OF_THE_SHARDS.index(name), name
    return int(record_number(name) is None), name
