"""Writing shards: a tar and its record, there whole or not at all.

A sample is one contiguous run of bytes in the tar, its extent: two headers, the
json, the safetensors, padding. A tar is extents back to back and zeros at the
end, so a shard is rewritten by copying extents, and one hash answers for all of
a sample. What a killed writer leaves behind is its temporary tar; the next one
takes the whole extents in it over, so only the clips in flight are lost.

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cogcommon.contract import Contract
from cogcommon.errors import ShardError
from cogcommon.files import commit, commit_bytes, fsync_folder
from cogcommon.names import command_line
from cogcommon.records import (
    SampleRow,
    ShardHeader,
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

from .disk import ShardBusy, disk_errors, lock_shard, open_locked, temporary_name
from .extents import FOUND_FIELDS, Extent, finish_tar, make_extent, whole_extents
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
    """A sample's tensors, by the names in `cogcommon.records`.

    Raises:
        ShardError: the tar cannot be read, or the sample is damaged.
    """
    import safetensors.torch

    try:
        extent = read_extent(tar, row)
    except OSError as error:
        raise ShardError(f"the shard cannot be read: {error.strerror}", where=str(tar)) from error
    return safetensors.torch.load(split_extent(extent, row)[1])


class ShardWriter:
    """One shard from lock to commit.

    Args:
        folder: where shards go; it exists.
        number: of the shard.
        contract: of every sample in it.
        planned: keys of its samples; what a killed writer left is taken over only if it is planned.

    Raises:
        ShardBusy: another live process writes it.
        ShardDone: its record exists already.
        DiskError: the disk is full, or another fault of the file system.
    """

    def __init__(self, folder: Path, number: int, contract: Contract, planned: Collection[str]) -> None:
        self.folder = folder
        self.number = number
        self.contract = contract
        self._rows: list[SampleRow] = []
        self._left_behind: dict[str, Extent] = {}
        with disk_errors(folder / tar_name(number)):
            self._stream = open_locked(folder / temporary_name(number))
            try:
                _finish_rewrite(folder, number)
                if (folder / record_name(number)).exists():
                    (folder / temporary_name(number)).unlink(missing_ok=True)
                    raise ShardDone
                refuse_foreign(folder / tar_name(number))  # it would be replaced
                self._take_over(set(planned))
            except BaseException:
                self._stream.close()
                raise

    def left_behind(self) -> set[str]:
        """Keys of the samples that a killed writer finished; pass them to `add_left_behind`."""
        return set(self._left_behind)

    def add(self, row: SampleRow, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append an encoded sample. The row's extent is filled in here."""
        extent = make_extent(row, tensors)
        with disk_errors(self.folder / tar_name(self.number)):
            offset = self._stream.tell()
            self._stream.write(extent.data)
            self._stream.flush()  # what a kill finds in our own buffer would be encoded again
        self._rows.append(extent.placed(row, offset))

    def add_left_behind(self, row: SampleRow) -> None:
        """Count a sample that a killed writer finished; what encoding found out comes from its json."""
        extent = self._left_behind[row.key]
        found = {name: extent.info[name] for name in FOUND_FIELDS}
        self._rows.append(extent.placed(dataclasses.replace(row, **found), extent.offset))

    def add_rejected(self, row: SampleRow) -> None:
        """A planned sample that has no tensors: its row keeps the reason."""
        assert row.status == "rejected" and row.reason and row.offset == -1
        self._rows.append(row)

    def commit(self) -> ShardRecord:
        """Finish the tar, give it its name, then write the record."""
        path = self.folder / tar_name(self.number)
        with disk_errors(path):
            size, digest = finish_tar(self._stream)
            refuse_foreign(path)
            commit(self.folder / temporary_name(self.number), path)
            record = ShardRecord(ShardHeader(self.number, size, digest, self.contract), self._rows)
            write_record(record, self.folder / record_name(self.number))
        self._stream.close()
        return record

    def abandon(self) -> None:
        """Let go of the shard. What was written stays for the next writer."""
        # Closing flushes; on a full disk that fails again, and the first error is the one to show.
        with suppress(OSError):
            self._stream.close()

    def _take_over(self, planned: set[str]) -> None:
        """Keep whole, planned extents of the temporary tar, or of a tar that never got its record."""
        uncommitted = self.folder / tar_name(self.number)
        end = 0
        for extent in whole_extents(self._stream):
            if extent.info["key"] not in planned:
                break
            self._left_behind[extent.info["key"]] = dataclasses.replace(extent, data=b"")
            end = extent.offset + extent.size
        self._stream.truncate(end)
        self._stream.seek(end)
        if end == 0 and uncommitted.exists():
            with uncommitted.open("rb") as stream:
                for extent in whole_extents(stream):
                    if extent.info["key"] in planned:
                        offset = self._stream.tell()
                        self._stream.write(extent.data)
                        self._left_behind[extent.info["key"]] = dataclasses.replace(extent, offset=offset, data=b"")


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
    new_tar, new_record = _new(tar), _new(record_path)
    # Locked to the end, or another process would take this rewrite for one that a killed process left.
    with disk_errors(tar), lock_shard(folder, number):
        _finish_rewrite(folder, number)
        if not record_path.exists():  # somebody was first
            return None
        old = read_record(record_path)
        rows = [row for row in old.rows if keep(row)]
        if len(rows) == len(old.rows):
            return old
        if not rows:
            remove_shard(folder, number)
            return None
        refuse_foreign(tar)
        with _open_new(new_tar) as sink:
            placed = list(_copied(rows, tar, sink))
            size, digest = finish_tar(sink)
        record = ShardRecord(ShardHeader(number, size, digest, old.header.contract), placed)
        commit_bytes(new_record, record_bytes(record))
        _finish_rewrite(folder, number)
    return record


def _open_new(path: Path) -> IO[bytes]:
    """Open a rewrite's tar, over what a killed process left of one; never through a link."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    return os.fdopen(descriptor, "w+b", buffering=1 << 20)


def _copied(rows: Sequence[SampleRow], tar: Path, sink: IO[bytes]) -> Iterator[SampleRow]:
    """Copy samples into another tar; yields their rows with the new offsets."""
    for row in rows:
        if row.status != "ok":
            yield row
            continue
        shift = sink.tell() - row.offset
        sink.write(read_extent(tar, row))
        yield dataclasses.replace(
            row,
            offset=row.offset + shift,
            json_offset=row.json_offset + shift,
            tensors_offset=row.tensors_offset + shift,
        )


def remove_shard(folder: Path, number: int) -> None:
    """Remove a shard: first the record, so that it stops counting, then the tar. What is not ours stays."""
    for path in (folder / record_name(number), folder / tar_name(number)):
        if is_ours(path):
            path.unlink(missing_ok=True)
            fsync_folder(folder)


def settle(folder: Path) -> None:
    """Make a folder fit for writing: finish rewrites, and remove records whose tar is gone.

    What a live process works on is left alone.
    """
    finish_rewrites(folder)
    for number in committed_shards(folder):
        if not os.path.lexists(folder / tar_name(number)):
            with suppress(ShardBusy), disk_errors(folder), lock_shard(folder, number):
                if not os.path.lexists(folder / tar_name(number)):
                    remove_shard(folder, number)


def finish_rewrites(folder: Path) -> None:
    """Finish, or undo, the rewrites that a killed process left half-way."""
    halves = [path.name[1:].removesuffix(".new") for path in folder.glob(".*.new")]
    found = [shard_number(name, kind) for name in halves for kind in ("tar", "parquet")]
    for number in sorted({number for number in found if number is not None}):
        with suppress(ShardBusy), disk_errors(folder), lock_shard(folder, number):
            _finish_rewrite(folder, number)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _finish_rewrite(folder: Path, number: int) -> None:
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
