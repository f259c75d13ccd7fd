"""Writing shards: a tar and its record, there whole or not at all.

A sample is one contiguous run of bytes in the tar, its extent: two headers, the
json, the safetensors, padding. A tar is extents back to back and zeros at the
end, so a shard is rewritten by copying extents, and one hash answers for all of
a sample. What a killed writer leaves behind is its temporary tar; the next one
takes the whole extents in it over, so only the clips in flight are lost. Samples
lie in planned order whatever happened on the way, so the bytes are always the same.

The names a shard goes through, and what each means::

    .000007.tar.tmp     being written, locked by its writer (a rewrite locks it too, and leaves it empty)
    000007.tar          whole, but without its record it does not count
    000007.parquet      the record: from here on the shard is committed
    .000007.tar.new     a rewrite without some samples, whole
    .000007.parquet.new its record: from here on the next writer will finish the rewrite
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from cogcommon.cli.names import command_line
from cogcommon.errors import ShardError
from cogcommon.files.atomic import commit, commit_bytes, fsync_folder
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import (
    SampleRow,
    ShardRecord,
    extent_intact,
    read_record,
    record_bytes,
    record_name,
    shard_number,
    split_extent,
    tar_name,
    write_record,
)

from .extents import FOUND_FIELDS, TarExtent, finish_tar, make_extent, whole_extents
from .locks import ShardBusy, lock_shard, open_temporary_tar, shard_disk_errors, temporary_name
from .proof import is_ours, refuse_foreign

if TYPE_CHECKING:
    import torch


class ShardDone(Exception):
    """Another process has committed the shard in the meantime."""


def committed_shards(folder: Path) -> list[int]:
    """Numbers of the shards that have a record, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(number for name in names if (number := shard_number(name)) is not None)


def tars_without_record(folder: Path) -> list[Path]:
    """Tars that do not count: still being written, left by a killed writer, or with a lost record."""
    tars = sorted(path for path in folder.glob("*.tar") if shard_number(path.name, "tar") is not None)
    return [tar for tar in tars if not tar.with_suffix(".parquet").exists()]


def read_extent(tar: Path, row: SampleRow) -> bytes:
    """A sample's bytes, checked against its hash.

    Raises:
        OSError: the tar cannot be read.
        ShardError: the sample is damaged.
    """
    with tar.open("rb") as stream:
        stream.seek(row.offset)
        extent = stream.read(row.size)
    if not extent_intact(extent, row.sha256):
        raise ShardError(
            f"sample {row.key} is damaged",
            where=f"{tar}, bytes {row.offset} to {row.offset + row.size}",
            fix=f"`{command_line('rm', tar, tar.with_suffix('.parquet'))}`, and run `cogprep encode` again",
        )
    return extent


def read_tensors(tar: Path, row: SampleRow) -> dict[str, torch.Tensor]:
    """A sample's tensors, by the names in `cogcommon.shards.records`.

    Raises:
        ShardError: the tar cannot be read, or the sample is damaged.
    """
    import safetensors.torch

    try:
        extent = read_extent(tar, row)
    except OSError as error:
        raise ShardError(f"the shard cannot be read: {error.strerror}", where=str(tar)) from error
    return safetensors.torch.load(split_extent(extent, row)[1])


class _LeftBehind(NamedTuple):
    """A sample that a killed writer finished, and the file in which it lies."""

    extent: TarExtent
    stream: IO[bytes]


class ShardWriter:
    """One shard from lock to commit.

    Args:
        folder: where shards go; it exists.
        number: of the shard.
        contract: of every sample in it.
        planned: keys of its samples; what a killed writer left is taken over only if it is planned.

    Samples are given in planned order, by one of the ``add`` methods or `postpone`.

    Raises:
        ShardBusy: another live process writes it.
        ShardDone: its record exists already.
        DiskError: the disk is full, or another fault of the file system.
    """

    def __init__(self, folder: Path, number: int, contract: Contract, planned: Collection[str]) -> None:
        self.folder = folder
        self.number = number
        self.contract = contract
        self._places: list[SampleRow | str] = []
        self._left_behind: dict[str, _LeftBehind] = {}
        self._in_place: deque[str] = deque()  # of those, the ones that lie where they may stay
        self._end = 0  # of what was given
        self._sources = ExitStack()  # open files that samples are taken over from
        with shard_disk_errors(folder / tar_name(number)):
            self._stream = open_temporary_tar(folder, number)
            try:
                complete_rewrite(folder, number)
                if (folder / record_name(number)).exists():
                    (folder / temporary_name(number)).unlink(missing_ok=True)
                    raise ShardDone
                refuse_foreign(folder / tar_name(number))  # it would be replaced
                self._take_over(planned)
            except BaseException:
                self.abandon()
                raise

    def left_behind(self) -> set[str]:
        """Keys of the samples that a killed writer finished; pass them to `add_left_behind`."""
        return set(self._left_behind)

    def add(self, row: SampleRow, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append an encoded sample. The row's extent is filled in here."""
        extent = make_extent(row, tensors)
        with shard_disk_errors(self.folder / tar_name(self.number)):
            offset = self._append(extent.data)
        self._places.append(extent.placed(row, offset))

    def add_left_behind(self, row: SampleRow) -> None:
        """Count a sample that a killed writer finished; what encoding found out comes from its json."""
        extent, stream = self._left_behind[row.key]
        if self._in_place and self._in_place[0] == row.key:
            self._in_place.popleft()
            offset, self._end = extent.offset, extent.offset + extent.size
        else:
            with shard_disk_errors(self.folder / tar_name(self.number)):
                stream.seek(extent.offset)
                offset = self._append(stream.read(extent.size))
        found = {name: extent.info[name] for name in FOUND_FIELDS}
        self._places.append(extent.placed(dataclasses.replace(row, **found), offset))

    def add_rejected(self, row: SampleRow) -> None:
        """A planned sample that has no tensors: its row keeps the reason."""
        assert row.status == "rejected" and row.reason and row.offset == -1
        self._places.append(row)

    def postpone(self, key: str) -> None:
        """A planned sample that waits for another run; its place is kept."""
        self._places.append(key)

    def commit(self) -> ShardRecord | None:
        """Finish the tar, give it its name, then write the record; None where every sample waits."""
        path = self.folder / tar_name(self.number)
        temporary = self.folder / temporary_name(self.number)
        with self._sources, shard_disk_errors(path):
            if all(isinstance(place, str) for place in self._places):
                temporary.unlink(missing_ok=True)
                self._stream.close()
                return None
            self._stream.seek(self._end)
            self._stream.truncate()
            tar = finish_tar(self._stream)
            refuse_foreign(path)
            commit(temporary, path)
            record = ShardRecord.of(self.number, tar, self.contract, self._places)
            write_record(record, self.folder / record_name(self.number))
        self._stream.close()
        return record

    def abandon(self) -> None:
        """Let go of the shard. What was written stays for the next writer."""
        # Closing flushes; on a full disk that fails again, and the first error is the one to show.
        with suppress(OSError), self._sources:
            self._stream.close()

    def _append(self, data: bytes) -> int:
        """Write a sample behind those that were given; returns where it lies."""
        if self._in_place:
            self._set_aside()
        offset = self._end
        self._stream.seek(offset)
        self._stream.write(data)
        self._stream.flush()  # what a kill finds in our own buffer would be encoded again
        self._end += len(data)
        return offset

    def _take_over(self, planned: Collection[str]) -> None:
        """Keep whole, planned extents of the temporary tar, or of a tar that never got its record."""
        uncommitted = self.folder / tar_name(self.number)
        end = 0
        for extent in whole_extents(self._stream):
            key = extent.info["key"]
            if key not in planned:
                break
            self._left_behind[key] = _LeftBehind(dataclasses.replace(extent, data=b""), self._stream)
            self._in_place.append(key)
            end = extent.offset + extent.size
        self._stream.truncate(end)
        if uncommitted.exists():
            stream = self._sources.enter_context(uncommitted.open("rb"))
            for extent in whole_extents(stream):
                key = extent.info["key"]
                if key in planned and key not in self._left_behind:
                    self._left_behind[key] = _LeftBehind(dataclasses.replace(extent, data=b""), stream)

    def _set_aside(self) -> None:
        """Make room for a sample that was kept out the last time: what lies there goes to a nameless file."""
        aside = self._sources.enter_context(tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115
        for key in self._in_place:
            extent, stream = self._left_behind[key]
            stream.seek(extent.offset)
            moved = _LeftBehind(dataclasses.replace(extent, offset=aside.tell()), aside)
            aside.write(stream.read(extent.size))
            self._left_behind[key] = moved
        self._in_place.clear()
        self._stream.truncate(self._end)


def drop_samples(folder: Path, number: int, keep: Callable[[SampleRow], bool]) -> ShardRecord | None:
    """Rewrite a committed shard without the samples that are gone, from its own bytes.

    Args:
        keep: whether a sample stays. It is asked under the shard's lock, for what the shard holds then.

    Returns:
        The new record; None if nothing stays and the shard was removed.

    Raises:
        ShardBusy: another live process writes it.
        ShardError: the shard is damaged.
        DiskError: the disk is full.
    """
    tar, record_path = folder / tar_name(number), folder / record_name(number)
    # Locked to the end, or another process would take this rewrite for one that a killed process left.
    with shard_disk_errors(tar), lock_shard(folder, number):
        complete_rewrite(folder, number)
        if not record_path.exists():  # somebody was first
            return None
        old = read_record(record_path)
        kept = [place for place in old.places if isinstance(place, str) or keep(place)]
        if len(kept) == len(old.places):
            return old
        if all(isinstance(place, str) for place in kept):
            remove_shard(folder, number)
            return None
        with open_rewrite(folder, number) as sink:
            places = [place if isinstance(place, str) else copy_sample(place, tar, sink) for place in kept]
            record = ShardRecord.of(number, finish_tar(sink), old.header.contract, places)
        finish_rewrite(folder, number, record)
    return record


def copy_sample(row: SampleRow, tar: Path, sink: IO[bytes]) -> SampleRow:
    """Copy a sample to the end of another tar; returns its row with the new offsets."""
    if row.status != "ok":
        return row
    shift = sink.tell() - row.offset
    sink.write(read_extent(tar, row))
    return dataclasses.replace(
        row,
        offset=row.offset + shift,
        json_offset=row.json_offset + shift,
        tensors_offset=row.tensors_offset + shift,
    )


def open_rewrite(folder: Path, number: int) -> IO[bytes]:
    """Open the tar of a rewrite, over what a killed process left of one; never through a link.

    Needs the shard's lock, to the end of `finish_rewrite`.
    """
    refuse_foreign(folder / tar_name(number))
    path = _new(folder / tar_name(number))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    return os.fdopen(descriptor, "w+b", buffering=1 << 20)


def finish_rewrite(folder: Path, number: int, record: ShardRecord) -> None:
    """Put a whole rewrite and its record in place of the committed ones."""
    commit_bytes(_new(folder / record_name(number)), record_bytes(record))
    complete_rewrite(folder, number)


def remove_shard(folder: Path, number: int) -> None:
    """Remove a shard: first the record, so that it stops counting, then the tar. What is not ours stays."""
    for path in (folder / record_name(number), folder / tar_name(number)):
        if is_ours(path):
            path.unlink(missing_ok=True)
            fsync_folder(folder)


def recover_folder(folder: Path) -> None:
    """Make a folder fit for writing: finish rewrites, and remove records whose tar is gone.

    What a live process works on is left alone.
    """
    finish_rewrites(folder)
    committed = committed_shards(folder)
    there = {path.name for path in folder.iterdir()} if committed else set()
    for number in committed:
        if tar_name(number) not in there:
            with suppress(ShardBusy), shard_disk_errors(folder), lock_shard(folder, number):
                if not os.path.lexists(folder / tar_name(number)):
                    remove_shard(folder, number)


def finish_rewrites(folder: Path) -> None:
    """Finish, or undo, the rewrites that a killed process left half-way."""
    halves = [path.name[1:].removesuffix(".new") for path in folder.glob(".*.new")]
    found = [shard_number(name, kind) for name in halves for kind in ("tar", "parquet")]
    for number in sorted({number for number in found if number is not None}):
        with suppress(ShardBusy), shard_disk_errors(folder), lock_shard(folder, number):
            complete_rewrite(folder, number)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def complete_rewrite(folder: Path, number: int) -> None:
    """Carry out a rewrite whose record is there, drop one whose record is not. Needs the lock."""
    tar, record = folder / tar_name(number), folder / record_name(number)
    if _new(record).exists():
        refuse_foreign(tar)
        refuse_foreign(record)
        if _new(tar).exists():
            record.unlink(missing_ok=True)
            fsync_folder(folder)
            commit(_new(tar), tar)
        commit(_new(record), record)
    else:
        _new(tar).unlink(missing_ok=True)
