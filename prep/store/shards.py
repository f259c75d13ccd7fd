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
import tempfile
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from cogcommon.files.atomic import commit
from cogcommon.shards.contract import Contract
from cogcommon.shards.records import SampleRow, ShardRecord, record_name, tar_name, write_record

from .extents import FOUND_FIELDS, TarExtent, finish_tar, make_extent, whole_extents
from .locks import open_temporary_tar, shard_disk_errors, temporary_name
from .proof import refuse_foreign
from .rewrite import complete_rewrite

if TYPE_CHECKING:
    import torch


class ShardDone(Exception):
    """Another process has committed the shard in the meantime."""


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
